"""What ranks remember between step plans: the pages of each sequence, where each page lies, and what a policy of
attention remembers of the sequence."""

from dataclasses import dataclass, field, replace

import numpy as np

from distkv.storage.paging import pages_for
from distkv.workers.attention.sequence_memory import SequenceMemory
from distkv.workers.errors import DistKVError
from distkv.workers.group.step_plan import StepPlan

NOT_SHARED = -2


@dataclass(frozen=True)
class SequenceStep:
    """The part of one sequence in a step, with its pages in place."""

    token_ids: list[int]  # at positions start, start + 1, ..., see `SequencePlan.token_ids`
    start: int  # behind the tokens before them that are in `pages`
    # int64, where the pages of tokens 0 .. start + len(token_ids) - 1 lie, in logical order, see `encode_location`;
    # those of the new tokens on the device. With `num_left_out`, full pages before these are missing
    pages: np.ndarray
    prompt_len: int
    num_logits: int  # of the last new tokens, those whose logits score what follows them among them
    # int64, by which names the leader knows the pages; where a policy of attention chooses among them
    page_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    memory: SequenceMemory = field(default_factory=SequenceMemory)  # of the sequence, as long as it has a table
    num_left_out: int = 0  # tokens that nobody attends to, in pages below the device
    # int64, by page, where the host has a share of attention: the slot of its copy on the host if it is the host's to
    # attend to, -1 where it has none there, NOT_SHARED for all others; empty without such a share
    host_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def position(self) -> int:
        """Of the first new token, among all tokens of the sequence."""
        return self.start + self.num_left_out


class PageDirectory:
    """Page tables by number, over page ids, each with a memory; and the location of each id."""

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._locations = np.zeros(0, dtype=np.int64)
        self._host_slots = np.zeros(0, dtype=np.int64)  # by id, see `SequenceStep`; empty until any is told
        self._tables: dict[int, np.ndarray] = {}
        self._memories: dict[int, SequenceMemory] = {}

    def update(self, plan: StepPlan) -> list[SequenceStep]:
        """Takes in what a plan says; returns its sequences."""
        for number in plan.ended:
            self._tables.pop(number, None)
            self._memories.pop(number, None)
        if plan.relocated:
            relocated = np.asarray(plan.relocated)
            self._locations = _grown(self._locations, int(relocated[:, 0].max()) + 1)
            self._locations[relocated[:, 0]] = relocated[:, 1]
            self._share_out(relocated[:, 0], plan.host_pages)
        steps = []
        for one in plan.sequences:
            table = self._tables.setdefault(one.table, np.zeros(0, dtype=np.int64))
            if one.pages:
                last = one.first_page + len(one.pages)
                table = self._tables[one.table] = _grown(table, last)
                table[one.first_page : last] = one.pages
            pages = table[: (count := pages_for(one.start + len(one.token_ids), self._page_size))]
            if len(pages) < count or pages.max() >= len(self._locations):
                raise DistKVError("a step plan has tokens whose pages nobody has placed")
            locations = self._locations[pages]
            if locations[one.start // self._page_size :].min() < 0:
                raise DistKVError("a step plan writes to pages that are not on the device")
            wanted = len(one.scored) + one.num_logits
            memory = self._memories.setdefault(one.table, SequenceMemory())
            step = SequenceStep(
                one.token_ids, one.start, locations, one.prompt_len, wanted, pages.copy(), memory,
                host_slots=self._host_slots[pages] if len(self._host_slots) else self._host_slots,
            )  # fmt: skip
            steps.append(_resident(step, self._page_size) if one.resident_only else step)
        return steps

    def _share_out(self, relocated: np.ndarray, host_pages: list[tuple[int, int]]) -> None:
        """Takes in which of the relocated pages are the host's to attend to."""
        if host_pages or len(self._host_slots):
            known = len(self._host_slots)
            self._host_slots = _grown(self._host_slots, len(self._locations))
            self._host_slots[known:] = NOT_SHARED
            self._host_slots[relocated] = NOT_SHARED
        if host_pages:
            told = np.asarray(host_pages)
            self._host_slots[told[:, 0]] = told[:, 1]


def _resident(step: SequenceStep, page_size: int) -> SequenceStep:
    """The same over pages on the device alone. All that are left out are full, since the new tokens' are there."""
    kept = step.pages >= 0
    num_left_out = int(len(kept) - kept.sum()) * page_size
    return replace(
        step, start=step.start - num_left_out, pages=step.pages[kept], page_ids=step.page_ids[kept],
        num_left_out=num_left_out, host_slots=step.host_slots[kept] if len(step.host_slots) else step.host_slots,
    )  # fmt: skip


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """The array with room for `size` numbers."""
    if len(array) >= size:
        return array
    larger = np.zeros(max(size, 2 * len(array)), dtype=np.int64)
    larger[: len(array)] = array
    return larger
