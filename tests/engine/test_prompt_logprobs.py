"""The log-probabilities of a prompt's own tokens, against transformers; bit for bit the same however it is read."""

import random
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.checkpoints import save_llama
from support.llms import idle_engine, tiered, tiered_options
from support.memory import VOCAB, drain, engine_info
from support.prompts import random_prompt
from support.speaker import Speaker, speak
from torch import Tensor
from transformers import LlamaForCausalLM

from distkv import LLM, RequestError, RequestOutputKind, SamplingParams
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineRequest, PromptLogprobs, TokenOutput
from distkv.engine.request_bounds import check_request
from distkv.launch.launch import launch
from distkv.outputs import RequestOutput, join_deltas
from distkv.workers import rank
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.sampling.sampled_token import TokenLogprobs

PROMPTS = [random_prompt(length, length) for length in (1, 2, 16, 17, 90, 150)]
SCORED = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=3)
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    return save_llama(tmp_path_factory.mktemp("model"))


@torch.inference_mode()
def expected_logprobs(model: LlamaForCausalLM, prompt: list[int]) -> Tensor:
    return torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1)


def check(output: RequestOutput, logprobs: Tensor, num_top: int) -> None:
    """The tables are those of a prompt with these log-probabilities."""
    tokens, tables = output.prompt_token_ids, output.prompt_logprobs
    assert tables is not None and len(tables) == len(tokens) and tables[0] is None
    for place, (token, table) in enumerate(zip(tokens[1:], tables[1:], strict=True)):
        assert table is not None
        top = logprobs[place].topk(num_top).indices.tolist()
        assert set(table) == {*top, token}
        assert table[token].rank == 1 + int((logprobs[place] > logprobs[place][token]).sum())
        assert [table[one].rank for one in top] == list(range(1, num_top + 1))
        for one, found in table.items():
            assert found.logprob == pytest.approx(logprobs[place][one].item(), abs=1e-4)


@pytest.mark.parametrize("budget", [8, 40, 2048])
@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_they_are_those_of_transformers(
    model: tuple[Path, LlamaForCausalLM], budget: int, num_top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a prompt is cut, beside requests that want none, and in blocks that are smaller than chunks."""
    folder, reference = model
    monkeypatch.setattr(rank, "SCORED_ROWS", 7)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=num_top)
    options: dict[str, Any] = {"max_num_batched_tokens": budget, "max_num_seqs": 4, "device_kv_bytes": "4MiB"}
    with LLM(folder, **options) as llm:
        mixed = [one for prompt in PROMPTS for one in (prompt, prompt)]
        outputs = llm.generate(mixed, [params, GREEDY] * len(PROMPTS), use_tqdm=False)
        for scored, plain in zip(outputs[::2], outputs[1::2], strict=True):
            check(scored, expected_logprobs(reference, scored.prompt_token_ids), num_top)
            assert plain.prompt_logprobs is None
            assert scored.outputs[0].token_ids == plain.outputs[0].token_ids[:3]


def test_a_prefix_that_is_cached_leaves_no_holes(model: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    """All of the prompt is computed, with the same bits; others find its pages, in any tier and after a restart."""
    with tiered(model[0], (30, 0, 0)) as llm:
        alone = [llm.generate([prompt], SCORED, use_tqdm=False)[0].prompt_logprobs for prompt in PROMPTS]
    for _ in range(2):
        with tiered(model[0], (14, 20, 60), tmp_path) as llm:
            for _ in range(2):
                outputs = llm.generate(PROMPTS, SCORED, use_tqdm=False)
                assert [output.prompt_logprobs for output in outputs] == alone
                assert not any(output.num_cached_tokens for output in outputs)
            found = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [output.num_cached_tokens for output in found] == [0, 0, 0, 16, 80, 144]
            assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in outputs]
            idle_engine(llm).integrity_check()


class Scorer(Speaker):
    """Scores prompts as well; garbage where it could not read a page."""

    scores: list[TokenLogprobs] | None = None

    def execute(self, plan: StepPlan, sampled: Tensor | None) -> tuple[Tensor | None, Report]:
        self.scores = None
        result = super().execute(plan, sampled)
        known = [(self.owners[part.table].token_ids, part) for part in plan.sequences]
        if any(part.scored for _, part in known):
            self.scores = []
            for (tokens, part), broken in zip(known, self._broken, strict=True):
                first = part.start + len(part.token_ids) - part.num_logits - len(part.scored)
                for place, token in enumerate(part.scored, first):
                    assert token == tokens[place + 1]
                    self.scores.append(TokenLogprobs(-1.0 if broken else scored(tokens, place), 1, []))
        return result

    def take_scores(self) -> Any:
        return None if self.scores is None else SimpleNamespace(result=list(self.scores).copy)


def scored(tokens: list[int], place: int) -> float:
    return float(speak(tokens[: place + 1])[tokens[place + 1]])


@pytest.mark.parametrize("seed", range(6))
def test_steps_that_fail_or_run_in_vain_leave_no_holes(seed: int) -> None:
    """Pages that cannot be read, and a request that makes steps raise."""
    rng = random.Random(seed)
    info = engine_info(
        num_pages=9, num_host_pages=3, num_disk_pages=200, enable_prefix_caching=True, max_model_len=1000,
        max_num_batched_tokens=48,
    )  # fmt: skip
    memory = Scorer(info, seed=seed)
    engine = Engine(info, RankExecutor(memory.execute, take_scores=memory.take_scores))
    memory.watch(engine)
    memory.late_damage = set(rng.sample(range(1, 60), 25))
    memory.poison = "2", 30
    params = SamplingParams(prompt_logprobs=0, ignore_eos=True)
    stem = [rng.randrange(10, VOCAB) for _ in range(200)]
    added = [
        EngineRequest(str(number), [*stem[: rng.randint(40, 150)], number], params, 20, seed=number)
        for number in range(6)
    ]
    engine.add(added[:3])
    outputs = drain(engine)
    engine.add(added[3:])
    outputs += drain(engine)
    assert memory.num_damaged
    for request in added:
        found: list[float] = []
        for output in outputs:
            if isinstance(output, PromptLogprobs) and output.request_id == request.request_id:
                assert output.first == 1 + len(found)
                found += [one.logprob for one in output.tokens]
        tokens = request.prompt_token_ids
        expected = [scored(tokens, place) for place in range(len(tokens) - 1)]
        assert found == (expected if request.request_id != "2" else expected[: len(found)])
        if request.request_id == "2":
            assert len(found) < 32
    engine.integrity_check()


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_outputs_of_each_kind_have_them(model: tuple[Path, LlamaForCausalLM], kind: RequestOutputKind) -> None:
    """Answers of one request share them; of deltas the first has them."""
    params = SamplingParams(n=2, max_tokens=5, ignore_eos=True, prompt_logprobs=1, seed=1, output_kind=kind)
    with LLM(model[0], device_kv_bytes="4MiB") as llm:
        outputs = list(llm.stream(PROMPTS[4], params))
    [*_, last] = outputs
    if kind is RequestOutputKind.DELTA:
        assert [output.prompt_logprobs is None for output in outputs] == [False] + [True] * (len(outputs) - 1)
        last = join_deltas(outputs)
    check(last, expected_logprobs(model[1], PROMPTS[4]), 1)
    assert [len(answer.token_ids) for answer in last.outputs] == [5, 5]


@pytest.mark.parametrize("budget", [8, 100])
def test_an_answer_that_was_begun_is_scored_as_a_prompt_is(
    model: tuple[Path, LlamaForCausalLM], budget: int, tmp_path: Path
) -> None:
    """In every bit, while its own prompt may be found in the cache; the token that ends the request is the same."""
    [*_, prompt] = PROMPTS
    request = EngineRequest("0", prompt, SCORED, 1, seed=0)
    options = tiered_options((14, 20, 60), tmp_path, max_num_batched_tokens=budget)
    with closing(launch(EngineConfig(model[0], **options))) as engine:
        engine.add([request])
        alone, [token] = _outputs(engine)
        for place in (1, 16, 100, 149):
            continued = replace(
                request, prompt_token_ids=prompt[:place], params=GREEDY, begun={0: prompt[place:]}, begun_logprobs=3,
                max_tokens=1 + len(prompt) - place,
            )  # fmt: skip
            before = sum(engine.stats().requests.prefix_hits.values())
            engine.add([continued])
            scores, [last] = _outputs(engine)
            assert scores == {at: one for at, one in alone.items() if at >= place}
            assert last.token_id == token.token_id and last.finish_reason == "length"
            found = sum(engine.stats().requests.prefix_hits.values())
            assert found - before == (place - 1) // 16 * 16
        for wrong in ({"begun": {}}, {"max_tokens": 90}, {"begun_logprobs": 129}, {"begun_logprobs": -1}):
            with pytest.raises(RequestError, match="begun_logprobs"):
                check_request(replace(continued, **wrong), engine.info)


def _outputs(engine: EngineClient) -> tuple[dict[int, TokenLogprobs], list[TokenOutput]]:
    """Scores by their places, and tokens, until a request has ended."""
    scores: dict[int, TokenLogprobs] = {}
    tokens: list[TokenOutput] = []
    while not tokens or tokens[-1].finish_reason is None:
        for output in engine.step():
            if isinstance(output, PromptLogprobs):
                scores |= dict(enumerate(output.tokens, output.first))
            else:
                assert isinstance(output, TokenOutput)
                tokens.append(output)
    return scores, tokens
