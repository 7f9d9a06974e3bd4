"""Who wants to know how an engine's steps go: metrics, traces, benchmarks."""

from typing import TYPE_CHECKING

from distkv.engine.protocol import StepOutput
from distkv.storage.meter import Span

if TYPE_CHECKING:
    from distkv.engine.step import Step


class StepObserver:
    """Is told of each stage of a step when it is over, in the engine's thread; this one does nothing with it.

    While step n runs, n + 1 is prepared. Then n is reported and completed, n + 1 is started, and what n sampled is
    emitted. So the time between two calls is that of the stage which the second one names; `reported` ends a wait. What
    an observer raises comes out of `Engine.step`, and from `prepared` it leaves an engine that cannot go on.
    """

    def begun(self) -> None:
        """A call of `Engine.step` begins."""

    def prepared(self, step: "Step | None") -> None:
        """The next step has its pages and its plan; None when there is none, or the device has no room for it yet.
        It is taken back without a word when the running one leaves another state than it was prepared for."""

    def reported(self, step: "Step") -> None:
        """The ranks have reported on a step."""

    def completed(self, step: "Step") -> None:
        """A step is booked or taken back; its tokens may still be unknown."""

    def started(self, step: "Step") -> None:
        """The ranks have been given a step."""

    def emitted(self, outputs: list[StepOutput]) -> None:
        """The tokens of a step are read and added to the answers."""

    def measured(self, spans: list[Span]) -> None:
        """What ranks have reported of their work, where they are asked to, also of plans that belong to no step."""

    def closed(self) -> None:
        """Nothing more comes."""
