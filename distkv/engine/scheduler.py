"""Which tokens run in the next step. Bookkeeping only, no tensor."""

import time
from bisect import insort
from itertools import count as counter

from distkv.engine.admission_order import AdmissionOrder
from distkv.engine.answer_lengths import AnswerLengths
from distkv.engine.cold_budget import ColdBudget
from distkv.engine.load_choice import LoadChoice
from distkv.engine.page_promises import PagePromises, num_held_pages
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.request_meter import RequestMeter
from distkv.engine.room import most_tokens, room_for
from distkv.engine.sequence import Scheduled, Sequence, most_pages
from distkv.engine.speculation.speculator import Speculator
from distkv.engine.token_rules import make_rules
from distkv.errors import CapacityError
from distkv.option_checks import raise_to
from distkv.storage.ledger.page import Page
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.prefix_index import root_key
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.paging import pages_for
from distkv.workers.attention.policies.registry import FULL

MAX_EXPECTED = 8  # waiting requests whose known pages are brought up ahead


class Scheduler:
    """First come, first served within a priority. A step takes one token of every answer being written, then chunks of
    prompts. The first prompt in line gets half of what is left for prompts at least, and the others share the rest, the
    one with the fewest tokens to go first: so none waits for ever, the long ones or the short.

    A request is admitted when it can be read at once and all that run can still end, see `PagePromises`; where they
    cannot all go on, those further back wait, with the pages that they have. The pages themselves are taken as tokens
    arrive, but for those of a prefix that is known: these it takes up at once. One whose next page another request is
    about to compute waits for that, and lets those behind it pass.

    What a step writes must lie on the device. A sequence whose new pages do not fit beside those that others are
    writing waits for a later step; its chunk is never cut for it, since the cut would change the rounding.
    """

    def __init__(self, info: EngineInfo):
        self._info = info
        step_pages = pages_for(min(info.max_num_batched_tokens, info.max_model_len), info.page_size)
        sizes = info.num_pages, info.num_host_pages, info.num_disk_pages
        self.cache = TieredCache(sizes, step_pages, info.write_through, info.max_share_per_salt, info.host_share)
        self.cold_budget = ColdBudget(info, self.cache)
        self.load_choice = LoadChoice(info, self.cache)
        self.meter = RequestMeter()
        self.speculator: Speculator | None = None  # of the engine whose steps these are
        self._promises = PagePromises(self.cache)
        self._order = AdmissionOrder(self.cache, info.max_num_seqs)
        self._lengths = AnswerLengths()
        self._numbers = counter()
        self.waiting: list[Sequence] = []  # the first to be admitted first
        self.running: list[Sequence] = []

    def check(self, request: EngineRequest) -> None:
        """Raises CapacityError when a request could never run."""
        num_together = 1 if request.begun else request.params.n  # answers that were begun can wait for each other
        needed = most_pages(request, self._info.page_size, num_together, self._info.num_observed)
        held, bytes_of = self.cache.capacity, self._info.bytes_of
        if needed > held:
            device, host, disk = (slots.num_slots for slots in self.cache.slots)
            raise CapacityError(
                f"the request may need {needed} KV pages ({bytes_of(needed)} bytes) for "
                f"{len(request.prompt_token_ids)} prompt tokens and up to {request.max_tokens} more, "
                f"n={request.params.n}; the tiers hold {held} ({bytes_of(held)} bytes; device {device}, host {host}, "
                f"disk {disk}){self.cache.disk_refusal}; "
                f"{self._cure(request, needed)}"
            )
        if needed > (most := self.cache.share_capacity):
            tokens = most_tokens(request, self._info.page_size, most, self._info.num_observed)
            raise CapacityError(
                f"the request may need {needed} KV pages ({bytes_of(needed)} bytes), and those of one cache_salt hold "
                f"at most {most} ({bytes_of(most)} bytes) by max_share_per_salt {self._info.max_share_per_salt}; "
                + (f"raise it, or lower max_tokens to {tokens}" if tokens > 0 else "raise it, or shorten the prompt")
            )
        if request.params.n > self._info.max_num_seqs:
            raise CapacityError(
                f"n is {request.params.n} and max_num_seqs {self._info.max_num_seqs}; lower n or raise max_num_seqs"
            )
        written = self._chunk_pages(request.num_to_read) + num_together
        if written > self._info.num_pages and needed > self._info.num_pages:
            raise CapacityError(
                f"a step of the request writes {written} KV pages, n={request.params.n}; the device holds "
                f"{self._info.num_pages}; {raise_to('device_kv_bytes', written * self._info.page_bytes)}, or lower "
                "max_num_batched_tokens or n"
            )

    def _cure(self, request: EngineRequest, needed: int) -> str:
        """What makes room for a request of so many pages, which the tiers do not hold."""
        if self.cache.disk_refusal:
            return "make room on the disk, raise host_kv_bytes or disk_kv_bytes, or lower max_tokens"
        tokens = most_tokens(request, self._info.page_size, self.cache.capacity, self._info.num_observed)
        lower = f", or lower max_tokens to {tokens}" if tokens > 0 else ""
        return room_for(self._info, needed) + lower

    def add(self, request: EngineRequest) -> None:
        """Queues a request that passed `check`; what is known of its prefix counts as used from now on. Raises
        RequestError as `make_rules` does."""
        rules = make_rules(request, self._info)
        tenant = root_key(self._info.fingerprint, request.cache_salt)
        is_shared = self._info.enable_prefix_caching and request.synthetic_kv_seed is None
        root = tenant if is_shared else None
        arrival = -1
        is_scored = request.num_to_read > len(request.prompt_token_ids)
        for index, tokens in (request.begun or {0: []}).items():
            table = PageTable(self.cache, self._info.page_size, tenant, self._info.coded_page_size)
            sequence = Sequence(
                request, index, next(self._numbers), table, [*request.prompt_token_ids, *tokens], root,
                keeps_answer=self._info.attention_policy == FULL, lengths=self._lengths,
                num_observed=self._info.num_observed, arrival=arrival,
            )  # fmt: skip
            sequence.arrived_at = time.perf_counter()
            sequence.rules = rules.fresh() if rules and arrival >= 0 else rules
            arrival = sequence.arrival
            sequence.is_guessed = request.params.max_tokens is None and self._may_read_again(request)
            sequence.num_scored = sequence.prompt_len - 1 if is_scored else 0
            sequence.expected = self._find_prefix(sequence)
            self.cache.touch(sequence.expected, tenant)
            self._queue(sequence)

    def schedule(self, num_held: int, only: Sequence | None) -> Scheduled:
        """The sequences of the next step with the number of tokens each runs; empty when there is nothing to do.

        Args:
            num_held: device pages that must stay and belong to no sequence.
            only: leaves all others out; None leaves out those that are parked.
        """
        if self.waiting:
            self._admit()
        self._promises.review(self.running, only)
        self.cold_budget.review(self.running)
        budget, size = self._info.max_num_batched_tokens, self._info.page_size
        room = self._info.num_pages - num_held
        step: Scheduled = []
        prefilling = []
        decoding = []
        for sequence in self.running:
            table = sequence.table
            sequence.draft, sequence.is_drafting = [], False  # of a step that was not made
            room -= len(table.pages) - table.num_tokens // size
            if sequence.lacks_room or (sequence.is_parked if only is None else sequence is not only):
                continue
            if sequence.is_prefilling:
                prefilling.append(sequence)
            elif sequence.may_decode:
                decoding.append(sequence)
        for sequence in decoding:
            needed = sequence.table.missing(1)
            if budget and needed <= room:
                step.append((sequence, 1))
                budget -= 1
                room -= needed
        if self.speculator is not None and only is None:
            pages = room if self._promises.are_met else 0
            decoding = [sequence for sequence, _ in step]
            drafting = self.speculator.schedule_drafting(decoding, budget, pages, reads_prompts=bool(prefilling))
            if drafting:
                return drafting
            step = self.speculator.add_drafts(decoding, budget, pages)
            budget -= sum(count - 1 for _, count in step)
            room -= sum(sequence.table.missing(count) - sequence.table.missing(1) for sequence, count in step)
        for sequence, count in self._chunks(prefilling, budget):
            pages = sequence.table.missing(count) + sequence.num_fork_pages(count)
            if pages <= room:
                step.append((sequence, count))
                room -= pages
        return step

    def refuse(self) -> EngineRequest | None:
        """Takes the first waiting request out when nothing runs that could make room for it; that is an error of it."""
        if self.running or not self.waiting:
            return None
        sequence = self.waiting.pop(0)
        self.meter.ended(sequence, "error")
        return sequence.request

    def preempt(self) -> Sequence | None:
        """Has the last in line of those whose need was guessed give its pages up and wait to be admitted again, when
        nobody has room to go on. None when all need no more than they were promised, or do not lack room."""
        if not any(one.lacks_room for one in self.running):
            return None
        guessed = [one for one in self.running if one.is_guessed]
        if not guessed:
            return None
        sequence = max(guessed, key=lambda one: one.place)
        self.running.remove(sequence)
        sequence.preempt()
        for one in self.waiting:
            if one.awaits is sequence:  # which may be gone before it computes anything again
                one.awaits = None
        self._queue(sequence)
        return sequence

    def expected_pages(self) -> list[Page]:
        """What the requests at the head of the line will take up, the first of them first."""
        return [page for sequence in self.waiting[:MAX_EXPECTED] for page in sequence.expected]

    def fork(self, sequence: Sequence) -> list[tuple[Sequence, tuple[Page, Page] | None]]:
        """Starts the other answers of a request whose prompt has been read."""
        forks = [sequence.fork(index, next(self._numbers)) for index in range(1, sequence.request.params.n)]
        self.running += [fork for fork, _ in forks]
        return forks

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends one answer, or all that a sequence stands for, and lets go of the pages."""
        self.meter.ended(sequence, reason)
        if reason in ("stop", "length"):
            self._lengths.add(sequence.num_output_tokens)
        sequence.finished = True
        sequence.table.release()
        self.running.remove(sequence)

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> list[Sequence]:
        """Ends one answer of a request, or all of them with index None; one that has ended already is passed over.
        Returns those that had begun.

        Args:
            reason: see `RequestStats.finished`.
        """

        def ends(one: Sequence) -> bool:
            return one.request.request_id == request_id and one.drop(index)

        for sequence in list(filter(ends, self.waiting)):
            self.waiting.remove(sequence)
            self.meter.ended(sequence, reason)
        ended = list(filter(ends, self.running))
        for sequence in ended:
            self.finish(sequence, reason)
        return ended

    def _admit(self) -> None:
        taken = sum(sequence.num_answers for sequence in self.running)
        left = [one.num_to_read - one.table.num_tokens for one in self.running if one.is_prefilling]
        chunk = self._chunk_pages(max(left, default=0))
        at_their_share: set[bytes | None] = set()  # tenants, whose other requests wait behind
        if taken >= self._info.max_num_seqs:
            return
        nobody_ahead = False  # one that would go ahead has no room: then those in order are next
        for sequence, is_ahead in self._order.line(self.waiting):
            if sequence.table.tenant in at_their_share or (is_ahead and nobody_ahead):
                continue
            seats = taken + sequence.num_answers
            prefix = self.load_choice.worth_taking(self._find_prefix(sequence))
            if self._is_coming(sequence, len(prefix)):
                continue
            has_share = self._promises.has_share(self.running, sequence, prefix)
            if not has_share and not is_ahead:
                at_their_share.add(sequence.table.tenant)
                continue
            # the largest chunk must fit beside a page of each other answer, or all pages on the device
            own = max(chunk, self._chunk_pages(sequence.num_to_read - len(prefix) * self._info.page_size))
            if not (has_share and self._has_room(sequence, prefix, seats, own)):
                if not is_ahead:
                    return
                nobody_ahead = True
                continue
            taken, chunk = seats, own
            self._order.note_admitted(sequence, self.waiting[0])
            self.waiting.remove(sequence)
            self._begin(sequence, prefix)

    def _has_room(self, sequence: Sequence, prefix: list[Page], seats: int, chunk: int) -> bool:
        """Whether a request may begin beside those that run.

        Args:
            prefix: what it takes up.
            seats: answers that would run then.
            chunk: the most pages that a prompt among them fills in a step.
        """
        if seats > self._info.max_num_seqs or not self._promises.may_begin(self.running, sequence, prefix):
            return False
        promised = self._promises.num_promised(self.running) + sequence.expected_pages - num_held_pages(prefix)
        return not seats + chunk > self._info.num_pages < promised

    def _begin(self, sequence: Sequence, prefix: list[Page]) -> None:
        if not sequence.was_preempted:  # else it finds pages of its own
            sequence.cached_tiers = [page.tier for page in prefix]
            self.meter.admitted(sequence, num_passed_over=len(sequence.found) - len(prefix))
        sequence.table.begin(prefix)
        sequence.expected, sequence.found, sequence.awaits = [], [], None
        self.running.append(sequence)

    def _find_prefix(self, sequence: Sequence) -> list[Page]:
        """The pages that are known of a prompt, without its last token."""
        if sequence.found_at != self.cache.num_findable_changes:
            sequence.found_at = self.cache.num_findable_changes
            keys = sequence.page_keys(sequence.num_to_read - 1)
            sequence.found = [] if keys is None else self.cache.find(keys[: sequence.num_prefix_pages])
        return sequence.found

    def _is_coming(self, sequence: Sequence, num_found: int) -> bool:
        """Whether a running request that goes before this one is about to compute the page after the prefix that was
        found."""
        if num_found == sequence.num_prefix_pages or sequence.root is None:
            return False
        key = sequence.keys[num_found]

        def computes_it(one: Sequence) -> bool:
            is_before = not one.is_parked and one.request.priority <= sequence.request.priority
            return is_before and one.will_compute(num_found, key)

        if sequence.awaits is None or not computes_it(sequence.awaits):
            sequence.awaits = next(filter(computes_it, self.running), None)
        return sequence.awaits is not None

    def _chunks(self, prefilling: list[Sequence], budget: int) -> Scheduled:
        """How the prompts that are being read share the tokens of a step: the sequences that get any, with how many."""
        if not prefilling:
            return []
        first, *others = sorted(prefilling, key=lambda one: one.place)
        chunks = []
        own = self._chunk(first, -(-budget // 2))
        left = budget - self._cost(first, own)
        for sequence in sorted(others, key=lambda one: (one.request.priority, one.num_to_read - one.table.num_tokens)):
            count = self._chunk(sequence, left)
            if count:
                chunks.append((sequence, count))
                left -= self._cost(sequence, count)
        own = self._chunk(first, left + self._cost(first, own))  # what the others leave
        return [(first, own), *chunks] if own else chunks

    @staticmethod
    def _cost(sequence: Sequence, count: int) -> int:
        """Tokens of a chunk that the model reads."""
        return 0 if sequence.num_synthetic_left else count

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens of the prompt to run; a chunk that is not the last ends on a page border where it can."""
        size = self._info.page_size
        if sequence.num_synthetic_left:
            whole_pages = self._info.max_num_batched_tokens // size or 1
            return min(sequence.num_synthetic_left, whole_pages * size)
        start = sequence.table.num_tokens
        if sequence.num_to_read - start <= budget:
            return sequence.num_to_read - start
        border = (start + budget) // size * size
        return border - start if border > start else budget

    def _chunk_pages(self, num_tokens: int) -> int:
        """Pages that a step may fill with a chunk of so many tokens at most."""
        return pages_for(min(num_tokens, self._info.max_num_batched_tokens), self._info.page_size)

    def _may_read_again(self, request: EngineRequest) -> bool:
        """Whether an answer of a request could be admitted again, however long it has become."""
        longest = len(request.prompt_token_ids) + request.max_tokens
        device = self._info.num_pages
        return 1 + self._chunk_pages(longest) <= device or most_pages(request, self._info.page_size, 1) <= device

    @property
    def newest(self) -> Sequence:
        """The last in line of those that run."""
        return max(self.running, key=lambda one: one.place)

    def _queue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda one: one.place)
