"""Ways to break the engine, each of which the simulation must find."""

from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

from distkv.engine.catalogue_writer import CatalogueWriter
from distkv.engine.fork_copies import ForkCopies
from distkv.engine.replay import Replay
from distkv.engine.scheduler import Scheduler
from distkv.engine.sequence import Sequence
from distkv.engine.speculation.self_speculator import SelfSpeculator
from distkv.engine.speculation.speculator import Speculator
from distkv.engine.step import Step
from distkv.engine.step_runner import StepRunner
from distkv.launch.pool import EnginePool
from distkv.launch.ray_engine import RayEngine
from distkv.launch.watchdog import Watchdog
from distkv.storage.ledger import prefix_index
from distkv.storage.ledger.disk_journal import DiskJournal
from distkv.storage.ledger.held_pages import HeldPages
from distkv.storage.ledger.page_table import PageTable
from distkv.storage.ledger.tiered_cache import TieredCache
from distkv.storage.ledger.transfers import Transfers
from distkv.workers.attention.sequence_memory import SequenceMemory
from distkv.workers.group.report import Report, ReportCollector
from distkv.workers.sampling.sample_row import uniform_number


def _step_is_not_undone() -> Any:
    """The tokens of a step that failed count as run."""
    return patch.object(PageTable, "rewind", lambda self, count: None)


def _filled_page_is_gone_on_with() -> Any:
    """A page that a step has filled in vain keeps its tokens from before, which may be rounded."""
    return patch.object(PageTable, "cut", lambda self, num_pages: None)


def _draft_stays() -> Any:
    """Tokens that were drafted in vain count as run."""
    return patch.object(Sequence, "reject", lambda self, count: None)


def _draft_fills_a_page() -> Any:
    """A page is filled, and rounded, with tokens that may not stay."""
    return patch.object(Speculator, "_fitting", lambda self, sequence, length, most_pages: length)


def _drafting_fills_a_page() -> Any:
    """A step that drafts fills a page, and rounds it, with a token that is run again."""
    return patch.object(SelfSpeculator, "_fitting", Speculator._fitting)


def _memory_is_not_made_anew() -> Any:
    """What a policy of attention remembers is gone on with where a sequence is read again."""

    def begin(self: SequenceMemory, start: int, first: int, make: Any) -> None:
        self.layers = self.layers or make()

    return patch.object(SequenceMemory, "begin", begin)


def _observed_tokens_are_not_read_again() -> Any:
    """A step that was taken back leaves what a policy of attention remembers as it is."""
    return patch.object(Sequence, "read_again", lambda self: 0)


def _spill_is_not_awaited() -> Any:
    """A plan does not name the copies that its step must wait for."""
    take = Transfers.take
    return patch.object(Transfers, "take", lambda self: (take(self)[0], []))


def _slot_is_reused_early() -> Any:
    """A slot counts as free while a transfer reads it."""
    make = Transfers.start

    def start(self: Transfers, page: Any, source: Any, target: Any) -> None:
        make(self, page, source, target)
        page.count_reading(source, -1)

    close = Transfers._close

    def _close(self: Transfers, id: int) -> Any:
        page = self.under_way[id][1]
        page.count_reading(self.under_way[id][0].source, 1)
        return close(self, id)

    return patch.multiple(Transfers, start=start, _close=_close)


def _location_is_not_sent() -> Any:
    """Ranks are not told that a page lies elsewhere now."""
    return patch.object(HeldPages, "relocate", lambda self, page: None)


def _bad_read_is_ignored() -> Any:
    """A step that could not read a page goes on with zeros."""
    apply = TieredCache.apply
    return patch.object(TieredCache, "apply", lambda self, done, failed, bad_reads: apply(self, done, failed, []))


def _failed_write_counts() -> Any:
    """A page that the disk refused counts as written."""
    apply = TieredCache.apply

    def taken(self: TieredCache, done: Iterable[int], failed: Iterable[Any], bad_reads: Iterable[int]) -> Any:
        return apply(self, [*done, *(id for id, _ in failed)], [], bad_reads)

    return patch.object(TieredCache, "apply", taken)


def _first_rank_decides() -> Any:
    """A transfer counts as ended once a rank has ended it."""

    def add(self: ReportCollector, reports: list[Report]) -> Report:
        together, known = Report(), self.__dict__.setdefault("known", set())
        for report in reports:
            together.done += [id for id in report.done if id not in known]
            together.failed += [(id, reason) for id, reason in report.failed if id not in known]
            known.update(report.done, (id for id, _ in report.failed))
            together.bad_reads += report.bad_reads
            together.missing += report.missing
            for id, own in report.checksums.items():
                together.checksums[id] = together.checksums.get(id, b"") + own
        return together

    return patch.object(ReportCollector, "add", add)


def _key_without_history() -> Any:
    """A page's key says what is in it and not what is before it."""
    make = prefix_index.page_key
    return patch("distkv.engine.sequence.page_key", lambda parent, tokens: make(b"", tokens))


def _fork_is_not_copied() -> Any:
    """The answers of a request write into one page."""
    return patch.object(ForkCopies, "take", lambda self: [])


def _row_outlives_its_page() -> Any:
    """The catalogue is told of new pages, not of those that are gone."""
    return patch.object(DiskJournal, "vacate", lambda self, slot: self.changes.written.pop(slot, None))


def _checksum_is_stale() -> Any:
    """The catalogue keeps the checksums of the first page in a slot."""
    update = CatalogueWriter.update
    first: dict[int, bytes] = {}

    def stale(self: CatalogueWriter, changes: Any, checksums: dict[int, bytes]) -> None:
        for slot, (id, _) in changes.written.items():
            if id in checksums:
                checksums[id] = first.setdefault(slot, checksums[id])
        update(self, changes, checksums)

    return patch.object(CatalogueWriter, "update", stale)


def _begun_token_is_lost() -> Any:
    """What the next engine is told of an answer lacks its newest token."""
    run = Replay.run

    def shorter(self: Replay) -> Any:
        request = run(self)
        for tokens in request.begun.values():
            del tokens[-1:]
        return request

    return patch.object(Replay, "run", shorter)


def _clearing_is_left_out() -> Any:
    """A slot changes hands with what is in it."""
    fix = Step.fix_pages

    def fix_pages(self: Step) -> None:
        fix(self)
        self.plan.clear = []

    return patch.object(Step, "fix_pages", fix_pages)


def _answer_never_ends() -> Any:
    """A sequence that lacks room once waits for ever."""
    schedule = Scheduler.schedule

    def stuck(self: Scheduler, num_held: int, only: Any) -> Any:
        return [] if len(self.running) > 2 else schedule(self, num_held, only)

    return patch.object(Scheduler, "schedule", stuck)


def _page_is_kept() -> Any:
    """An answer that has ended holds its first page for ever."""

    def release(self: PageTable) -> None:
        for page in reversed(self.pages[1:]):
            self._cache.release(page)
        self.pages, self.num_tokens, self.num_committed = [], 0, 0

    return patch.object(PageTable, "release", release)


def _undone_location_is_not_sent_again() -> Any:
    """After a step that failed, ranks are not told once more where pages lie."""
    return patch.object(HeldPages, "put_back", lambda self, relocated: None)


def _undone_table_is_not_sent_again() -> Any:
    """After a step that failed, ranks are not told once more of the pages that it had in its tables."""
    undo = Step.undo

    def forgetful(self: Step, reported: bool = False) -> None:
        sent = {work.sequence: work.sequence.num_sent for work in self.work}
        undo(self, reported)
        for sequence, count in sent.items():
            sequence.num_sent = count

    return patch.object(Step, "undo", forgetful)


def _lost_page_counts_as_there() -> Any:
    """A page that could not be read is not computed again."""
    return patch.object(HeldPages, "lose", lambda self, page: None)


def _draw_is_of_another_place() -> Any:
    """Every second token's draw is that of the one before it."""
    return patch(
        "distkv.engine.sample_rows.uniform_number",
        lambda seed, index, place: uniform_number(seed, index, place - place % 2),
    )


def _scores_are_told_twice() -> Any:
    """What the caller knows of a prompt's log-probabilities is passed on once more."""
    return patch.object(Replay, "_scores", lambda self, output: output)


def _ended_table_is_kept() -> Any:
    """Ranks are not told of tables that have ended."""
    return patch.object(StepRunner, "take_ended", lambda self: [])


def _lost_requests_are_forgotten() -> Any:
    """The requests of an engine that was lost are given to no other one."""
    return patch.object(EnginePool, "_place_again", lambda self, replays: None)


def _answer_begins_again() -> Any:
    """The next engine is not told what the caller has of an answer."""
    return patch.object(Replay, "run", lambda self: self.request)


def _hang_is_not_noticed() -> Any:
    """A group of which nothing comes is waited for."""
    return patch.object(Watchdog, "is_hung", lambda self: False)


def _death_is_not_noticed() -> Any:
    """Nobody looks whether the ranks of a silent group live."""
    return patch.object(RayEngine, "_check", lambda self: None)


MUTATIONS: dict[str, Callable[[], Any]] = {
    name[1:].replace("_", " "): make
    for name, make in list(globals().items())
    if name.startswith("_") and callable(make) and getattr(make, "__module__", "") == __name__
}
