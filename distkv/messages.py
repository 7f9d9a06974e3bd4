"""What goes between a front end (text, requests) and the engine (tokens, pages), within a process or over a socket."""

import msgspec

from distkv.sampling_params import SamplingParams
from distkv.workers.sampler import TokenLogprobs


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine settled on at start. Byte figures are of the whole group, replicated heads counted as often as
    they are held."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    page_bytes: int
    pool_bytes: int  # of the pools as allocated
    kv_bytes_per_token: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seed: int


class EngineRequest(msgspec.Struct, frozen=True):
    """A checked request; `max_tokens` is set and fits the model's limit."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int


class TokenOutput(msgspec.Struct, frozen=True):
    """One more token of one answer."""

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    stop_reason: int | None


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """State of the KV cache."""

    pages_in_use: int
    peak_pages_in_use: int
    num_running: int
    num_waiting: int


class Add(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: queue requests; answered by Accepted or Refused."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: end answers, see `Engine.abort`. Not answered."""

    answers: list[tuple[str, int | None]]


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Client to leader; answered by EngineStats."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: end the group. Not answered."""


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: the requests are queued."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: none of the requests is queued; why, as the text of a CapacityError."""

    reason: str


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: what a step drew."""

    outputs: list[TokenOutput]


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Add | Abort | GetStats | Shutdown).decode
decode_reply = msgspec.msgpack.Decoder(Accepted | Refused | Tokens | EngineStats).decode
