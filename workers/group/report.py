"""What ranks tell the leader after a step plan."""

from collections import Counter
from collections.abc import Callable

import msgspec

from distkv.storage.meter import Measures
from distkv.workers.group.log_lines import LogLine


class Report(msgspec.Struct, array_like=True):
    """What has ended on a rank, or on all of them, since the last report."""

    done: list[int] = []  # ids of transfers
    failed: list[tuple[int, str]] = []  # ids with the reason
    checksums: dict[int, bytes] = {}  # of pages written to disk, by id
    bad_reads: list[tuple[int, str]] = []  # disk slots that this step could not read back, with the reason
    bytes_moved: dict[str, int] = {}  # bytes by route, see `Rank.take_report`
    missing: list[int] = []  # disk slots of `StepPlan.adopt` or `added` whose page is not there
    log: list[LogLine] = []  # of a rank behind rank 0
    measures: Measures = msgspec.field(default_factory=Measures)
    lack: str = ""  # why pages of `StepPlan.adopt` are missing


encode_report = msgspec.msgpack.Encoder().encode
decode_report = msgspec.msgpack.Decoder(Report).decode


class ReportCollector:
    """Makes one report of those of all ranks: a transfer has ended when it has on each of them, and has failed when it
    has on one."""

    def __init__(self, num_ranks: int, join: Callable[[list[bytes]], bytes] = b"".join):
        """
        Args:
            join: makes the checksums of a page of those of its parts, in order of rank.
        """
        self._num_ranks, self._join = num_ranks, join
        self._ended: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}
        self._checksums: dict[int, list[bytes]] = {}  # by id, in order of rank

    def add(self, reports: list[Report]) -> Report:
        """Takes in one report of each rank, in order of rank."""
        together = Report()
        moved: Counter[str] = Counter()
        missing: set[int] = set()
        for rank, report in enumerate(reports):
            for id in report.done + [id for id, _ in report.failed]:
                self._ended[id] += 1
            self._reasons |= dict(report.failed)
            for id, own in report.checksums.items():
                self._checksums.setdefault(id, [b""] * self._num_ranks)[rank] = own
            together.bad_reads += report.bad_reads
            moved.update(report.bytes_moved)
            missing.update(report.missing)
            together.lack = together.lack or report.lack
            together.measures.add(report.measures)
        together.bytes_moved, together.missing = dict(moved), sorted(missing)
        for id in [id for id, count in self._ended.items() if count == self._num_ranks]:
            del self._ended[id]
            checksums = self._checksums.pop(id, [])
            if id in self._reasons:
                together.failed.append((id, self._reasons.pop(id)))
                continue
            together.done.append(id)
            if checksums:
                together.checksums[id] = self._join(checksums)
        return together
