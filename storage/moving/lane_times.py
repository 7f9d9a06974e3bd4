"""How long the lanes of a device take: it tells when it has ended, and nobody waits for that."""

from collections import deque
from dataclasses import dataclass

from distkv.storage.meter import Meter, now
from distkv.storage.moving.streams import Event, Lane, Streams


@dataclass(frozen=True)
class _Work:
    lane: Lane
    kind: str
    begun: Event
    ended: Event
    details: dict[str, int]


class LaneTimes:
    """Gives a meter the work of lanes that has ended, whenever `collect` is called."""

    def __init__(self, streams: Streams, meter: Meter):
        self._streams, self._meter = streams, meter
        self._open: deque[_Work] = deque()
        self._known: tuple[Event, int] | None = None  # an event and when it happened, which a trace counts from
        if meter.traces:
            known = streams.record(Lane.COMPUTE, timed=True)
            known.synchronize()
            self._known = known, now()

    def begin(self, lane: Lane) -> Event:
        """Where work of a lane begins, once what it waits for has been enqueued."""
        return self._streams.record(lane, timed=True)

    def end(self, lane: Lane, begun: Event, kind: str, **details: int) -> Event:
        """Its end, which others may wait for."""
        ended = self._streams.record(lane, timed=True)
        self._open.append(_Work(lane, kind, begun, ended, details))
        return ended

    def collect(self) -> None:
        """Tells the meter of what has ended since the last call."""
        going_on: deque[_Work] = deque()
        for work in self._open:
            if not work.ended.query():
                going_on.append(work)
                continue
            duration = self._streams.nanoseconds_between(work.begun, work.ended)
            start = self._time(work.begun)
            self._meter.add_between(
                work.kind, start, start + duration, work.lane.value, details=work.details,
                is_summed=work.lane is not Lane.COMPUTE,
            )  # fmt: skip
        self._open = going_on

    def _time(self, event: Event) -> int:
        """When it happened, by the clock of the host; of no use without a trace. Devices count in single precision, so
        the next one is counted from here."""
        if self._known is None:
            return 0
        known, time = self._known
        self._known = event, time + self._streams.nanoseconds_between(known, event)
        return self._known[1]
