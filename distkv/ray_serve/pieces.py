"""What goes between the ingress and a replica: requests, and what has become of them."""

from collections.abc import Sequence

import msgspec

from distkv.engine.protocol import EngineInfo, EngineRequest, StepOutput
from distkv.engine.stats import EngineStats


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What has come of a request since the piece before."""

    replica: str  # that has it, by the name that Serve gives it
    outputs: Sequence[StepOutput]
    lost: str | None = None  # why this replica cannot go on, where another one may


class PromptOnly(msgspec.Struct, frozen=True):
    """What of an encoded `EngineRequest` its way to a replica depends on."""

    prompt_token_ids: list[int]
    cache_salt: str | None = None


encode = msgspec.msgpack.Encoder().encode
decode_piece = msgspec.msgpack.Decoder(Piece).decode
decode_request = msgspec.msgpack.Decoder(EngineRequest).decode
decode_prompt = msgspec.msgpack.Decoder(PromptOnly).decode
decode_info = msgspec.msgpack.Decoder(EngineInfo).decode
decode_stats = msgspec.msgpack.Decoder(EngineStats).decode
