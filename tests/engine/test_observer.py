"""Who observes an engine's steps sees each stage in its order, and may raise without harm once a step is prepared."""

from typing import Any

import pytest
from support.speaker import answers, make, requests, run

from distkv import SamplingParams
from distkv.engine.observer import StepObserver

PARAMS = SamplingParams(temperature=1.0, ignore_eos=True)


class Witness(StepObserver):
    """Notes which stages it is told of, and raises when it is told of one of them for the third time."""

    def __init__(self, raises_at: str = ""):
        self.stages: list[str] = []
        self.num_emitted = 0
        self._raises_at = raises_at

    def prepared(self, step: Any) -> None:
        self._note("prepared" if step is not None else "not prepared")

    def reported(self, step: Any) -> None:
        self._note("reported")

    def completed(self, step: Any) -> None:
        self._note("completed")

    def started(self, step: Any) -> None:
        self._note("started")

    def emitted(self, outputs: list[Any]) -> None:
        self._note("emitted")
        self.num_emitted += len(outputs)

    def _note(self, stage: str) -> None:
        self.stages.append(stage)
        if stage == self._raises_at and self.stages.count(stage) == 3:
            raise KeyboardInterrupt


def test_stages_come_in_their_order() -> None:
    engine, _ = make()
    witness = engine._observer = Witness()
    engine.add(requests(1, PARAMS, 4))
    num_tokens = sum(len(engine.step()) for _ in range(3))
    assert witness.stages == [
        "prepared", "started", "emitted",
        "prepared", "reported", "completed", "started", "emitted",
        "prepared", "reported", "completed", "started", "emitted",
    ]  # fmt: skip
    assert num_tokens == witness.num_emitted == 2


@pytest.mark.parametrize("stage", ["reported", "completed", "started", "emitted"])
def test_an_observer_that_raises_loses_no_token(stage: str) -> None:
    added = requests(3, PARAMS, 12)
    expected, _ = run(added)
    engine, _ = make()
    engine._observer = Witness(stage)
    engine.add(added)
    outputs: list[Any] = []
    interrupted = 0
    while engine.has_work:
        try:
            outputs += engine.step()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 1
    assert answers(outputs) == expected
    engine.integrity_check()
    engine.close()
