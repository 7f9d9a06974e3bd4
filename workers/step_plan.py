"""The message from the leader to all ranks: what to run in this step. It is all a rank needs; ranks keep no tables."""

import msgspec


class SequencePlan(msgspec.Struct, array_like=True):
    """The part of one sequence in a step."""

    token_ids: list[int]  # the new tokens, at positions start, start + 1, ...
    start: int
    slots: list[int]  # device slots of the pages of tokens 0 .. start + len(token_ids) - 1, in logical order
    prompt_len: int
    num_logits: int  # logits are wanted for this many of the last new tokens


class StepPlan(msgspec.Struct, array_like=True):
    """One step of the whole group. `copies` happen first, then `clear`, then the sequences run."""

    sequences: list[SequencePlan]
    copies: list[tuple[int, int]]  # (source, target) device slots
    clear: list[int]  # device slots that change hands


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(StepPlan).decode
