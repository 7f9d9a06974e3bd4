"""The message from the leader to all ranks: what to run in this step. It is all a rank needs; ranks keep no tables."""

import msgspec

from distkv.storage.tier import Transfer


class SequencePlan(msgspec.Struct, array_like=True):
    """The part of one sequence in a step."""

    token_ids: list[int]  # the new tokens, at positions start, start + 1, ...
    start: int
    # where the pages of tokens 0 .. start + len(token_ids) - 1 lie, in logical order, see `tier.location`; those of the
    # new tokens on the device
    pages: list[int]
    prompt_len: int
    num_logits: int  # logits are wanted for this many of the last new tokens


class StepPlan(msgspec.Struct, array_like=True):
    """One step of the whole group. First comes `adopt`; transfers are started and `await_ids` waited for; then come
    `copies`, `clear` and `random_pages`; then the sequences run, of which there may be none."""

    sequences: list[SequencePlan]
    copies: list[tuple[int, int]]  # (source, target) device slots
    clear: list[int]  # device slots that change hands
    transfers: list[Transfer] = []
    await_ids: list[int] = []  # transfers that must have ended
    random_pages: list[tuple[int, int]] = []  # (device slot, seed): filled with random numbers, for stress tests
    # the pages on disk that an earlier process left, by slot with their checksums, see `DiskPool.adopt`; given once,
    # before anything is written there
    adopt: dict[int, bytes] | None = None


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(StepPlan).decode
