"""Which tokens run in the next step. Bookkeeping only, no tensor."""

from collections import deque

from distkv.errors import CapacityError
from distkv.messages import EngineInfo, EngineRequest
from distkv.sequence import Sequence
from distkv.storage.page_allocator import PageAllocator
from distkv.storage.page_size import pages_for
from distkv.storage.page_table import PageTable


class Scheduler:
    """First come, first served. A step takes one token of every answer being written, then chunks of prompts.

    A request is admitted when the pages it may need at most are not promised to others, so a running request never
    waits for memory and nothing is ever computed twice. The pages themselves are taken as tokens arrive.
    """

    def __init__(self, info: EngineInfo):
        self._info = info
        self.allocator = PageAllocator(info.num_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._promised: dict[str, int] = {}  # request id -> pages

    def check(self, request: EngineRequest) -> None:
        """Raises CapacityError when a request could never run."""
        needed = self._most_pages(request)
        if needed > self._info.num_pages:
            size = self._info.page_bytes
            raise CapacityError(
                f"the request may need {needed} KV pages ({needed * size} bytes) for {len(request.prompt_token_ids)} "
                f"prompt tokens and up to {request.max_tokens} more, n={request.params.n}; the device pool holds "
                f"{self._info.num_pages} ({self._info.num_pages * size} bytes). "
                "Raise device_kv_bytes or lower max_tokens"
            )
        if request.params.n > self._info.max_num_seqs:
            raise CapacityError(
                f"n is {request.params.n} and max_num_seqs {self._info.max_num_seqs}; lower n or raise max_num_seqs"
            )

    def add(self, request: EngineRequest) -> None:
        """Queues a request that passed `check`."""
        table = PageTable(self.allocator, self._info.page_size)
        self.waiting.append(Sequence(request, 0, table, list(request.prompt_token_ids)))

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next step with the number of tokens each runs; empty when there is nothing to do."""
        self._admit()
        budget = self._info.max_num_batched_tokens
        step = []
        for sequence in self.running:
            if not sequence.in_prompt:
                step.append((sequence, 1))
                budget -= 1
        for sequence in self.running:
            if sequence.in_prompt and budget > 0:
                count = self._chunk(sequence, budget)
                step.append((sequence, count))
                budget -= count
        return step

    def fork(self, sequence: Sequence) -> list[tuple[Sequence, tuple[int, int] | None]]:
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
        seats = self._info.max_num_seqs - sum(self._seats(sequence) for sequence in self.running)
        pages = self._info.num_pages - sum(self._promised.values())
        while self.waiting:
            request = self.waiting[0].request
            needed = self._most_pages(request)
            if request.params.n > seats or needed > pages:
                return
            seats -= request.params.n
            pages -= needed
            self._promised[request.request_id] = needed
            self.running.append(self.waiting.popleft())

    @staticmethod
    def _seats(sequence: Sequence) -> int:
        """Answers this sequence stands for: all of its request's until they are forked off it."""
        return sequence.request.params.n if sequence.in_prompt else 1

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens of the prompt to run; a chunk that is not the last ends on a page border where it can."""
        if sequence.num_pending <= budget:
            return sequence.num_pending
        start = sequence.table.num_tokens
        border = (start + budget) // self._info.page_size * self._info.page_size
        return border - start if border > start else budget

    def _most_pages(self, request: EngineRequest) -> int:
        """Pages of all answers at their full length, the prompt's full pages counted once."""
        size = self._info.page_size
        prompt_len = len(request.prompt_token_ids)
        shared = prompt_len // size
        # the last token drawn is never read
        longest = pages_for(prompt_len + request.max_tokens - 1, size)
        return shared + request.params.n * (longest - shared)
