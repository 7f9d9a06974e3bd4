"""Requests that another engine has begun go on as if that had not been lost."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from support.invariance import said
from support.rules import rule_requests, save_speaking_llama

from distkv import LLM
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, StepOutput
from distkv.engine.replay import Replay


class ForgetfulEngine(Engine):
    """Every few steps it knows nothing of its requests any more, nor of their pages, and is given them anew."""

    steps_between = 7

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.replays: dict[str, Replay] = {}
        self.num_steps = self.num_losses = 0

    def add(self, requests: list[EngineRequest]) -> None:
        self.replays |= {request.request_id: Replay(request) for request in requests}
        super().add(requests)

    def abort(self, answers: Iterable[tuple[str, int | None]], reason: str = "abort") -> None:
        answers = list(answers)
        for request_id, index in answers:
            if request_id in self.replays:
                self.replays[request_id].close(index)
        super().abort(answers, reason)

    def step(self) -> list[StepOutput]:
        passed = [self.replays[output.request_id].pass_on(output) for output in super().step()]
        self.num_steps += 1
        if self.num_steps % self.steps_between == 0:
            super().abort([(request_id, None) for request_id in self.replays])
            self.reset_prefix_cache()
            again = [replay for replay in self.replays.values() if replay.is_open]
            super().add([replay.run() for replay in again])
            super().abort([(one.request.request_id, index) for one in again for index in one.closed])
            self.num_losses += bool(again)
        return [output for output in passed if output is not None]


@pytest.mark.parametrize("host_kv_bytes", [0, "8MiB"], ids=["device", "streamed"])
def test_answers_are_those_of_an_engine_that_was_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_kv_bytes: int | str
) -> None:
    """Sampled and greedy, one answer and several, with each kind of rule, in text and log-probabilities."""
    folder = save_speaking_llama(tmp_path)
    prompts, params = map(list, zip(*rule_requests(), strict=True))
    options: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "host_kv_bytes": host_kv_bytes}
    options |= {"device_kv_bytes": "300KiB" if host_kv_bytes else "8MiB"}
    with LLM(folder, **options) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    monkeypatch.setattr("distkv.launch.launch.Engine", ForgetfulEngine)
    with LLM(folder, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        engine = llm._engine
        assert isinstance(engine, ForgetfulEngine)
        assert engine.num_losses > 10
        assert sum(replay.num_runs > 1 for replay in engine.replays.values()) > len(prompts) / 2
    assert [said(output) for output in outputs] == [said(output) for output in expected]
