"""A model that gives no numbers for some tokens: the request that meets them ends with an error that says so."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import edit_weights, save_llama
from support.llms import OPTIONS, idle_engine
from support.prompts import random_prompts

from distkv import LLM, DistKVError, SamplingParams
from distkv.outputs import RequestOutput

BAD = 100  # the token whose embedding is no number
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2)
PARAMS = {
    "greedy": GREEDY,
    "random": SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=3),
    "truncated": SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=3, top_k=5, top_p=0.9, logprobs=1),
    "three answers": SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=3, n=3, logprobs=0),
    "penalised": SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, frequency_penalty=0.2),
}


def damage(folder: Path, name: str, row: int, value: float) -> None:
    """Writes a number into a row of a weight."""
    edit_weights(folder, lambda weights: weights[name][row].fill_(value))


def assert_fails(output: RequestOutput, folder: Path, words: str = "NaN or infinity") -> None:
    assert type(output.error) is DistKVError
    assert "logits of this request are not finite" in str(output.error) and words in str(output.error)
    assert str(folder) in str(output.error), "the model is named"
    assert output.finished


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_the_requests_that_meet_it_fail(tmp_path: Path, value: float) -> None:
    """At once when it is in the prompt, later when it is sampled; the others have the tokens that they have without."""
    folder, _ = save_llama(tmp_path)
    prompts = [[token % BAD for token in prompt] for prompt in random_prompts(33, 9, 21, 17, 40)]
    bad = [[*prompt[:-3], BAD, *prompt[-2:]] for prompt in prompts]
    with LLM(folder, **OPTIONS) as llm:
        expected = llm.generate(prompts, list(PARAMS.values()), use_tqdm=False)
        meets = [any(BAD in one.token_ids[:-1] for one in output.outputs) for output in expected]
    damage(folder, "model.embed_tokens.weight", BAD, value)
    with LLM(folder, **OPTIONS) as llm:
        mixed = [one for pair in zip(prompts, bad, strict=True) for one in pair]
        outputs = llm.generate(mixed, [one for one in PARAMS.values() for _ in range(2)], use_tqdm=False)
        for output, before, met in zip(outputs[::2], expected, meets, strict=True):
            if met:
                assert_fails(output, folder)
            else:
                assert output.error is None
                assert [one.token_ids for one in output.outputs] == [one.token_ids for one in before.outputs]
        assert not all(meets)
        for output in outputs[1::2]:
            assert_fails(output, folder)
            assert not any(one.token_ids for one in output.outputs)
        idle_engine(llm).integrity_check()
        again = llm.generate([prompts[0]], GREEDY, use_tqdm=False)[0]
        assert again.outputs[0].token_ids == expected[0].outputs[0].token_ids, "the engine goes on"


def test_a_token_that_is_met_on_the_way(tmp_path: Path) -> None:
    """The step that runs it is under way before anybody has read it, and the one after that ends the request."""
    folder, _ = save_llama(tmp_path)
    prompt, other = random_prompts(40, 33)
    with LLM(folder, **OPTIONS) as llm:
        expected, beside = llm.generate([prompt, other], GREEDY, use_tqdm=False)
    tokens = expected.outputs[0].token_ids
    place = next(
        at for at in range(4, 19) if tokens[at] not in prompt + tokens[:at] + other + beside.outputs[0].token_ids
    )
    damage(folder, "model.embed_tokens.weight", tokens[place], float("nan"))
    with LLM(folder, **OPTIONS) as llm:
        failed, good = llm.generate([prompt, other], GREEDY, use_tqdm=False)
        assert_fails(failed, folder)
        assert failed.outputs[0].token_ids == tokens[: place + 1]
        assert good.error is None and good.outputs[0].token_ids == beside.outputs[0].token_ids


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_any_weight_will_do(tmp_path: Path, name: str, value: float) -> None:
    """One row of it; a number that overflows in a product does it as well."""
    folder, _ = save_llama(tmp_path)
    damage(folder, name, 5, value)
    with LLM(folder, **OPTIONS) as llm:
        for output in llm.generate(random_prompts(40, 33), list(PARAMS.values())[:2], use_tqdm=False):
            assert_fails(output, folder)


def test_a_penalty_that_leaves_no_number(tiny_model: Path) -> None:
    """The request that has it is told which; its neighbour goes on."""
    with LLM(tiny_model, **OPTIONS) as llm:
        harsh = SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1e-50)
        failed, good = llm.generate([[5, 6, 7] * 9, [8, 9]], [harsh, GREEDY], use_tqdm=False)
    assert_fails(failed, tiny_model, "repetition_penalty 1e-50")
    assert good.error is None and len(good.outputs[0].token_ids) == 20


def test_dtype_that_is_too_narrow(tmp_path: Path) -> None:
    """Weights whose products overflow in float16 alone."""
    folder, model = save_llama(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.mul_(6e4)
    model.save_pretrained(folder)
    with LLM(folder, dtype="float16", **OPTIONS) as llm:
        assert_fails(llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0], folder, "dtype='float32'")
    with LLM(folder, dtype="float32", **OPTIONS) as llm:
        assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].error is None
