"""Which tokens run in the next step. Bookkeeping only, no tensor."""

from collections import deque

from distkv.errors import CapacityError
from distkv.messages import EngineInfo, EngineRequest
from distkv.sequence import Sequence
from distkv.storage.page_size import pages_for
from distkv.storage.page_table import PageTable
from distkv.storage.tiered_cache import Page, TieredCache


class Scheduler:
    """First come, first served. A step takes one token of every answer being written, then chunks of prompts.

    A request is admitted when the pages it may need at most are not promised to others, over all tiers, so a running
    request never loses its pages and nothing is computed twice. The pages themselves are taken as tokens arrive.

    What a step writes must lie on the device. A sequence whose new pages do not fit beside those that others are
    writing waits for a later step; its chunk is never cut for it, since the cut would change the rounding.
    """

    def __init__(self, info: EngineInfo):
        self._info = info
        step_pages = pages_for(min(info.max_num_batched_tokens, info.max_model_len), info.page_size)
        self.cache = TieredCache((info.num_pages, info.num_host_pages, info.num_disk_pages), step_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._promised: dict[str, int] = {}  # request id -> pages

    def check(self, request: EngineRequest) -> None:
        """Raises CapacityError when a request could never run."""
        needed, held, size = self._most_pages(request), self.cache.capacity, self._info.page_bytes
        if needed > held:
            device, host, disk = (slots.num_slots for slots in self.cache.slots)
            raise CapacityError(
                f"the request may need {needed} KV pages ({needed * size} bytes) for {len(request.prompt_token_ids)} "
                f"prompt tokens and up to {request.max_tokens} more, n={request.params.n}; the tiers hold {held} "
                f"({held * size} bytes; device {device}, host {host}, disk {disk}){self.cache.disk_refusal}. "
                "Raise device_kv_bytes, host_kv_bytes or disk_kv_bytes, or lower max_tokens"
            )
        if request.params.n > self._info.max_num_seqs:
            raise CapacityError(
                f"n is {request.params.n} and max_num_seqs {self._info.max_num_seqs}; lower n or raise max_num_seqs"
            )
        written = self._chunk_pages(request) + request.params.n
        if written > self._info.num_pages and needed > self._info.num_pages:
            raise CapacityError(
                f"a step of the request writes {written} KV pages, n={request.params.n}; the device holds "
                f"{self._info.num_pages}. Raise device_kv_bytes, or lower max_num_batched_tokens or n"
            )

    def add(self, request: EngineRequest) -> None:
        """Queues a request that passed `check`."""
        table = PageTable(self.cache, self._info.page_size)
        self.waiting.append(Sequence(request, 0, table, list(request.prompt_token_ids)))

    def schedule(self, num_held: int = 0) -> list[tuple[Sequence, int]]:
        """The sequences of the next step with the number of tokens each runs; empty when there is nothing to do.

        Args:
            num_held: device pages that must stay and belong to no sequence.
        """
        self._admit()
        budget = self._info.max_num_batched_tokens
        room = self._info.num_pages - num_held - sum(sequence.table.num_unfilled for sequence in self.running)
        step = []
        for sequence in self._decoding() + self._reading():
            count = self._chunk(sequence, budget) if sequence.in_prompt else min(1, budget)
            pages = sequence.table.missing(count) + sequence.num_fork_pages(count)
            if count and pages <= room:
                step.append((sequence, count))
                budget -= 0 if sequence.num_random else count
                room -= pages
        return step

    def refuse(self) -> EngineRequest | None:
        """Takes the first waiting request out when nothing runs that could make room for it."""
        return None if self.running or not self.waiting else self.waiting.popleft().request

    def _decoding(self) -> list[Sequence]:
        return [sequence for sequence in self.running if not sequence.in_prompt]

    def _reading(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.in_prompt]

    def fork(self, sequence: Sequence) -> list[tuple[Sequence, tuple[Page, Page] | None]]:
        """Starts the other answers of a request whose prompt has been read."""
        forks = [sequence.fork(index) for index in range(1, sequence.request.params.n)]
        self.running += [fork for fork, _ in forks]
        return forks

    def finish(self, sequence: Sequence) -> None:
        """Ends one answer and frees what is its own."""
        sequence.table.release()
        self.running.remove(sequence)
        request_id = sequence.request.request_id
        if not any(other.request.request_id == request_id for other in self.running):
            del self._promised[request_id]

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends one answer of a request, or all of them with index None; one that has ended already is passed over."""
        if index is None:
            self.waiting = deque(sequence for sequence in self.waiting if sequence.request.request_id != request_id)
        for sequence in list(self.running):
            if sequence.request.request_id == request_id and index in (None, sequence.index):
                self.finish(sequence)

    def _admit(self) -> None:
        taken = sum(self._seats(sequence) for sequence in self.running)
        pages = self.cache.capacity - sum(self._promised.values())
        chunk = max((self._chunk_pages(sequence.request) for sequence in self._reading()), default=0)
        while self.waiting:
            request = self.waiting[0].request
            needed = self._most_pages(request)
            seats = taken + request.params.n
            if seats > self._info.max_num_seqs or needed > pages:
                return
            # the largest chunk must fit beside a page of each other answer, or all pages on the device
            chunk = max(chunk, self._chunk_pages(request))
            if seats + chunk > self._info.num_pages < sum(self._promised.values()) + needed:
                return
            taken = seats
            pages -= needed
            self._promised[request.request_id] = needed
            self.running.append(self.waiting.popleft())

    @staticmethod
    def _seats(sequence: Sequence) -> int:
        """Answers this sequence stands for: all of its request's until they are forked off it."""
        return sequence.request.params.n if sequence.in_prompt else 1

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens of the prompt to run; a chunk that is not the last ends on a page border where it can."""
        if sequence.num_random:
            whole_pages = self._info.max_num_batched_tokens // self._info.page_size or 1
            return min(sequence.num_random, whole_pages * self._info.page_size)
        if sequence.num_pending <= budget:
            return sequence.num_pending
        start = sequence.table.num_tokens
        border = (start + budget) // self._info.page_size * self._info.page_size
        return border - start if border > start else budget

    def _chunk_pages(self, request: EngineRequest) -> int:
        """Pages that a step may fill with a chunk of the prompt."""
        return pages_for(min(len(request.prompt_token_ids), self._info.max_num_batched_tokens), self._info.page_size)

    def _most_pages(self, request: EngineRequest) -> int:
        """Pages of all answers at their full length, the prompt's full pages counted once."""
        size = self._info.page_size
        prompt_len = len(request.prompt_token_ids)
        shared = prompt_len // size
        # the last token drawn is never read
        longest = pages_for(prompt_len + request.max_tokens - 1, size)
        return shared + request.params.n * (longest - shared)
