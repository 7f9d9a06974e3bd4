"""The message from the leader to all ranks: what to run in this step."""

import msgspec

from distkv.storage.tier import Transfer


def placeholder(index: int) -> int:
    """Stands in `SequencePlan.token_ids` for a token that the step before sampled, counted from 0, which the leader may
    not know yet; see `placeholders.py`."""
    return -1 - index


class SequencePlan(msgspec.Struct, array_like=True):
    """The part of one sequence in a step."""

    table: int  # number of the page table on the ranks
    # the new tokens, at positions start, start + 1, ...; a negative one is a `placeholder`
    token_ids: list[int]
    start: int
    prompt_len: int
    num_logits: int  # logits are wanted for this many of the last new tokens
    # what the table does not hold yet: ids of the pages from `first_page` on, in logical order
    first_page: int = 0
    pages: list[int] = []
    # tokens of the prompt whose log-probabilities are wanted, each behind one of the new tokens: the last of these, but
    # for the `num_logits` ones
    scored: list[int] = []
    num_top: int = 0  # how many of the likeliest tokens are wanted in the place of each
    # whether the new tokens attend to pages on the device alone, so that what they come to is a guess
    resident_only: bool = False


class StepPlan(msgspec.Struct, array_like=True):
    """One step of the whole group. First comes `adopt` or `added`; transfers are started and `await_ids` waited for;
    then come `copies`, `clear` and `synthetic_pages`; then the sequences run, of which there may be none.

    Ranks keep page tables (`page_directory.py`), so that a plan tells what has changed and not what a long context is
    made of. Telling a rank again what it knows does no harm.
    """

    sequences: list[SequencePlan]
    copies: list[tuple[int, int]]  # (source, target) device slots
    clear: list[int]  # device slots that change hands
    transfers: list[Transfer] = []
    # transfers that must have ended before pages are touched, and where no sequence runs, before the report
    await_ids: list[int] = []
    synthetic_pages: list[tuple[int, int]] = []  # (device slot, seed): filled with random numbers, for stress tests
    relocated: list[tuple[int, int]] = []  # (page id, where it lies now, see `encode_location`)
    new_pages: list[int] = []  # ids of these that name another page than before
    ended: list[int] = []  # numbers of tables that are not needed any more
    # the pages on disk that an earlier process left, by slot with their checksums, see `DiskPool.adopt`; given once,
    # before anything is written there
    adopt: dict[int, bytes] | None = None
    # pages that were put on disk since, by slot with their checksums, see `DiskPool.take_in`
    added: dict[int, bytes] = {}
    # where sequences have placeholders: how many tokens the step before sampled, which rank 0 gives the others first
    num_sampled: int = 0
    # of `relocated`, the host's to attend to: (page id, slot of its copy on the host, -1 where it has none there)
    host_pages: list[tuple[int, int]] = []


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(StepPlan).decode
