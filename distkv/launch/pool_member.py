"""One of several engines, or the place of one that is lost."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from distkv.engine.replay import Replay
from distkv.launch.ray_engine import RayEngine


@dataclass
class Member:
    """It has an engine that runs, starts or saves its pages to leave a node, or waits for the next start."""

    number: int
    engine: RayEngine | None = None
    starting: Future[RayEngine] | None = None
    leaving: Future[None] | None = None  # the end of an engine whose node goes
    start_at: float = 0.0  # monotonic time of the next start, where it is neither started nor starting
    has_run: bool = False
    looked_at: float = 0.0  # monotonic time when its ranks were looked after last
    trouble: str = ""  # why it does not run, or did not start the last time
    replays: dict[str, Replay] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.number)

    @property
    def may_start(self) -> bool:
        """Whether it has no engine, in whatever state."""
        return self.engine is None and self.starting is None and self.leaving is None

    @property
    def leaves(self) -> bool:
        """Whether its engine is to be closed, since one of its nodes goes: at once where there is room elsewhere, else
        when it must."""
        notice = None if self.engine is None else self.engine.notice
        return notice is not None and self.engine is not None and (notice.has_room or self.engine.has_to_leave)

    def close(self) -> None:
        """Closes its engine, and gives up one that starts. Raises what `RayEngine.close` does."""
        if self.leaving is not None:
            return self.leaving.result()
        if self.starting is not None and (self.starting.cancel() or self.starting.exception() is not None):
            return
        engine = self.starting.result() if self.starting is not None else self.engine
        if engine is not None:
            engine.close()
