"""What goes between `Client` and a server: requests as JSON, outputs as server-sent events of JSON."""

from typing import Any

import msgspec

from distkv import errors
from distkv.errors import DistKVError
from distkv.frontend.messages import Message
from distkv.outputs import RequestOutput
from distkv.sampling_params import SamplingParams

GENERATE, STATS, RESET = "/generate", "/stats", "/reset_prefix_cache"
EXPORT, IMPORT = "/cache/export", "/cache/import"


class Params(SamplingParams, frozen=True, forbid_unknown_fields=True):
    """Sampling parameters; a field that the server does not know is refused, not passed over."""


class Item(msgspec.Struct, forbid_unknown_fields=True):
    """One request, of a prompt or of the messages of a chat. Its output kind is DELTA or FINAL_ONLY."""

    sampling_params: Params
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    priority: int = 0
    cache_salt: str | None = None
    session: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Call(msgspec.Struct, forbid_unknown_fields=True):
    """Requests that are answered together."""

    items: list[Item]


class Failure(msgspec.Struct):
    """An error as the body of a response tells it, or an event."""

    message: str
    code: str | None = None  # name of a class of `distkv.errors`, if it is one

    def error(self, status: int = 500) -> DistKVError:
        """The error to raise; what has no class of ours has one by its HTTP status."""
        known = (
            errors.ConfigError, errors.RequestError, errors.CapacityError, errors.StoreError, errors.Draining,
            errors.EngineUnavailable,
        )  # fmt: skip
        for kind in known:
            if self.code == kind.__name__:
                return kind(self.message)
        kinds = {400: errors.RequestError, 401: errors.ConfigError, 413: errors.RequestError, 429: errors.QueueFull}
        return kinds.get(status, DistKVError)(self.message)


class Event(msgspec.Struct):
    """An output of the request with this index, which may end it with an error; or why none of them can go on."""

    index: int | None = None
    output: RequestOutput | None = None
    error: Failure | None = None


def _plain(value: Any) -> Any:
    """An error within an output."""
    if isinstance(value, DistKVError):
        return Failure(str(value), type(value).__name__)
    raise NotImplementedError


def _error(kind: type, value: Any) -> Any:
    return msgspec.convert(value, Failure).error()


encode = msgspec.json.Encoder(enc_hook=_plain).encode
decode_call = msgspec.json.Decoder(Call).decode
decode_event = msgspec.json.Decoder(Event, dec_hook=_error).decode
