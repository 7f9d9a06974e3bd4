"""A rank without a tensor: pages of hashes in three tiers, and transfers that take time."""

import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field

from simulation.disk import Disk
from simulation.model import VALUE_BYTES, synthetic_value
from simulation.world import Process, World

from distkv.engine.protocol import EngineInfo
from distkv.errors import StoreError
from distkv.storage.tier import DEVICE, DISK, HOST, Transfer, decode_location
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import PageDirectory, SequenceStep

NAN = b"\xff" * VALUE_BYTES  # spreads from wherever it is read, and stays where a slot is not cleared
LATE_REPORT = 0.2  # how often the end of a transfer is told in a later report than the next one

Heads = list[bytes]
"""The content of a page, for each head that the rank holds."""


@dataclass(eq=False)
class _Job:
    transfer: Transfer
    after: set[int]  # copies that must have ended
    content: Heads | None = None  # of the source when it began
    end: float | None = None  # when it ends, once it has begun


@dataclass(eq=False)
class SimulatedRank:
    """One rank's memory, its part of the disk, and what it knows of both.

    Copies between device and host run one after the other; what goes to or comes from disk waits for the copies before
    that touch its host slot, and ends in any order. Until then its target holds nothing that can be read. All ends may
    be told late, but for those that a plan without sequences waits for.
    """

    world: World
    process: Process
    info: EngineInfo
    disk: Disk
    heads: range  # of the model's KV heads
    num_heads: int  # of the model
    reports: bool  # checksums: no rank before this one has the same heads
    writes: bool  # the files of its heads

    directory: PageDirectory = field(init=False)
    bad_reads: dict[int, str] = field(default_factory=dict)
    rounded: set[int] = field(default_factory=set)  # device slots of pages that were filled: no token may be added
    _copies: deque[_Job] = field(default_factory=deque)  # the first is under way
    _on_disk: dict[int, _Job] = field(default_factory=dict)
    _ended: dict[int, str | None] = field(default_factory=dict)  # not told yet; why it failed
    _told_checksums: dict[int, bytes] = field(default_factory=dict)
    _missing: list[int] = field(default_factory=list)
    _last_id: int = -1

    def __post_init__(self) -> None:
        self.page_bytes = self.info.page_size * VALUE_BYTES
        self.directory = PageDirectory(self.info.page_size)
        nothing = NAN * self.info.page_size
        self.device = [[bytearray(nothing) for _ in self.heads] for _ in range(self.info.num_pages)]
        self.host: list[Heads] = [[nothing for _ in self.heads] for _ in range(self.info.num_host_pages)]
        self.crcs: dict[int, list[int]] = {}  # of slots of the disk, by head

    # --- plans ---

    def begin(self, plan: StepPlan) -> list[SequenceStep]:
        """Does all that a plan says but for computing."""
        steps = self.directory.update(plan)
        if plan.adopt is not None:
            self._adopt(plan.adopt)
        self._start(plan.transfers)
        self._finish(plan.await_ids)
        if self.world.chance(0.02):  # once more, which is to do no harm
            steps = self.directory.update(plan)
            self._start(plan.transfers)
        for source, target in plan.copies:
            for own, new in zip(self.device[source], self.device[target], strict=True):
                new[:] = NAN * self.info.page_size if source in self.rounded else own
            self.rounded.discard(target)
        for slot in plan.clear:
            for content in self.device[slot]:
                content[:] = bytes(self.page_bytes)
            self.rounded.discard(slot)
        for slot, seed in plan.synthetic_pages:
            for head, content in zip(self.heads, self.device[slot], strict=True):
                values = (synthetic_value(seed, head, offset) for offset in range(self.info.page_size))
                content[:] = b"".join(values)
        return steps

    def read(self, step: SequenceStep) -> Heads:
        """What attention finds of the tokens before a step's, for each head; zeros where the disk does not give a page
        back, which the report says, and nothing to go on with where the page of its first token was full before."""
        count = step.start * VALUE_BYTES
        if step.start % self.info.page_size and int(step.pages[step.start // self.info.page_size]) in self.rounded:
            return [NAN for _ in self.heads]
        pages: list[list[bytes | bytearray]] = [[] for _ in self.heads]
        for place in step.pages.tolist()[: -(-step.start // self.info.page_size)]:
            tier, slot = decode_location(place)
            contents = self._read_slot(slot) if tier is DISK else (self.device, self.host)[tier][slot]
            for own, content in zip(pages, contents, strict=True):
                own.append(content)
        found = []
        for own in pages:
            whole = b"".join(own)
            found.append(NAN if NAN in whole else whole[:count])
        return found

    def write(self, step: SequenceStep, values: list[bytes]) -> None:
        """Writes the values of a step's tokens, for each head, into the pages of the device."""
        size = self.info.page_size
        for number, position in enumerate(range(step.start, step.start + len(step.token_ids))):
            page = self.device[int(step.pages[position // size])]
            first = position % size * VALUE_BYTES
            for content, own in zip(page, values, strict=True):
                content[first : first + VALUE_BYTES] = own[number * VALUE_BYTES : (number + 1) * VALUE_BYTES]
        if self.info.kv_cache_dtype != "auto":
            end = step.start + len(step.token_ids)
            self.rounded.update(step.pages[step.start // size : end // size].tolist())

    def report(self, awaited: list[int]) -> Report:
        """What has ended, `awaited` in any case."""
        self._go_on()
        report = Report(bad_reads=list(self.bad_reads.items()), missing=self._missing)
        self.bad_reads, self._missing = {}, []
        for id in list(self._ended):
            if id not in awaited and self.world.chance(LATE_REPORT):
                continue
            reason = self._ended.pop(id)
            if reason is not None:
                report.failed.append((id, reason))
            else:
                report.done.append(id)
                if id in self._told_checksums:
                    report.checksums[id] = self._told_checksums.pop(id)
        return report

    # --- transfers ---

    def _start(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            if transfer.id <= self._last_id:
                continue
            self._last_id = transfer.id
            if DISK not in (transfer.source, transfer.target):
                self._copies.append(_Job(transfer, set()))
                if len(self._copies) == 1:
                    self._begin(self._copies[0])
                continue
            slot = transfer.source_slot if transfer.source is HOST else transfer.target_slot
            after = {
                job.transfer.id
                for job in self._copies
                if slot == (job.transfer.source_slot if job.transfer.source is HOST else job.transfer.target_slot)
            }
            self._on_disk[transfer.id] = job = _Job(transfer, after)
            if not after:
                self._begin(job)
        self.process.point("transfers are under way")

    def _begin(self, job: _Job) -> None:
        transfer, slot = job.transfer, job.transfer.source_slot
        if transfer.source is not DISK:
            contents = self.host[slot] if transfer.source is HOST else self.device[slot]
            job.content = [bytes(content) for content in contents]
        nothing = NAN * self.info.page_size
        if transfer.target is HOST:
            self.host[transfer.target_slot] = [nothing for _ in self.heads]
        elif transfer.target is DEVICE:
            for content in self.device[transfer.target_slot]:
                content[:] = nothing
        is_copy = DISK not in (transfer.source, transfer.target)
        job.end = self.world.now + (self.world.rng.random() * 0.001 if is_copy else self.disk.seconds())

    def _go_on(self) -> None:
        """Ends what should have ended by now, in the order of time."""
        while True:
            begun = [job for job in self._on_disk.values() if job.end is not None] + list(self._copies)[:1]
            due = min(begun, key=lambda job: job.end or 0.0, default=None)
            if due is None or due.end is None or due.end > self.world.now:
                return
            self._end(due)

    def _finish(self, ids: list[int]) -> None:
        """Waits for transfers."""
        for id in ids:
            while id in self._on_disk or any(job.transfer.id == id for job in self._copies):
                begun = [job.end for job in [*self._on_disk.values(), *list(self._copies)[:1]] if job.end is not None]
                self.world.sleep(max(0.0, min(begun) - self.world.now))
                self._go_on()

    def _end(self, job: _Job) -> None:
        transfer = job.transfer
        reason: str | None = None
        if DISK not in (transfer.source, transfer.target):
            self._copies.popleft()
        else:
            del self._on_disk[transfer.id]
        try:
            if transfer.target is DISK:
                self._store(transfer.target_slot, job.content or [])
                self._told_checksums[transfer.id] = array("I", self.crcs[transfer.target_slot]).tobytes()
                if not self.reports:
                    del self._told_checksums[transfer.id]
            elif transfer.source is DISK:
                self.host[transfer.target_slot] = self._load(transfer.source_slot)
            elif transfer.target is HOST:
                self.host[transfer.target_slot] = job.content or []
            else:
                for content, new in zip(self.device[transfer.target_slot], job.content or [], strict=True):
                    content[:] = new
        except StoreError as error:
            reason = str(error)
        self._ended[transfer.id] = reason
        self.world.count(f"{transfer.route}{' failed' if reason else ''}")
        if DISK not in (transfer.source, transfer.target):
            if self._copies:
                self._begin(self._copies[0])
            for other in self._on_disk.values():
                if transfer.id in other.after:
                    other.after.remove(transfer.id)
                    if not other.after:
                        self._begin(other)

    # --- the disk ---

    def _store(self, slot: int, content: Heads) -> None:
        self.crcs.pop(slot, None)
        crcs = [zlib.crc32(one) for one in content]
        if self.writes:
            self.disk.write(slot, zip(self.heads, content, strict=True), self.process)
            self.disk.spoilt.discard(slot)
        self.crcs[slot] = crcs

    def _load(self, slot: int) -> Heads:
        if slot not in self.crcs:
            raise StoreError(f"slot {slot} holds no page")
        crcs = zip(self.heads, self.crcs[slot], strict=True)
        return [self.disk.read(slot, head, crc, self.page_bytes) for head, crc in crcs]

    def _read_slot(self, slot: int) -> Heads:
        try:
            self.world.count("page streamed from disk")
            return self._load(slot)
        except StoreError as error:
            self.bad_reads[slot] = str(error)
            return [bytes(self.page_bytes) for _ in self.heads]

    def _adopt(self, entries: dict[int, bytes]) -> None:
        self.process.point("before the folder is swept")
        for slot, head in list(self.disk.files):
            if slot not in entries and head in self.heads and self.writes:
                del self.disk.files[slot, head]
        self.crcs, self._missing = {}, []
        for slot, checksums in entries.items():
            crcs = array("I", checksums if len(checksums) % 4 == 0 else b"")
            files = [self.disk.files.get((slot, head), b"") for head in self.heads]
            whole = all(len(content) == self.page_bytes for content in files)
            if slot >= self.info.num_disk_pages or len(crcs) != self.num_heads or not whole:
                self._missing.append(slot)
            else:
                self.crcs[slot] = list(crcs[self.heads.start : self.heads.stop])
        self.process.point("after the folder is swept")
