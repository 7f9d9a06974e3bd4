"""The law of `docs/invariance.md` on CUDA, with `batch_invariant=True`. Run with `pytest -m gpu`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_llama
from support.invariance import WHOLE, answers_alone, assert_answers, random_requests, said
from support.prompts import random_prompt, seeded
from support.runs import GREEDY, run

from distkv import LLM, SamplingParams

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])


def small_model(folder: Path) -> Path:
    return save_llama(
        folder, num_attention_heads=6, num_key_value_heads=3, hidden_size=768, head_dim=128, intermediate_size=2056,
        max_position_embeddings=4096,
    )[0]  # fmt: skip


@dtypes
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("seed", range(2))
def test_answers_do_not_depend_on_what_else_happens(tmp_path: Path, dtype: str, page_size: int, seed: int) -> None:
    """Neighbours in the batch, borders of chunks, graphs and single launches, hits of any length, tiers, restarts; with
    pages that are codes, too."""
    pytest.importorskip("zarr", reason="what restarts find lies on disk")
    folder = small_model(tmp_path / "model")
    rng = random.Random(seed)
    prompts, params = random_requests(rng, (16, 300, 1500))
    codec = ("auto", "int4")[seed]
    common = {"dtype": dtype, "page_size": page_size, "device": "cuda", "batch_invariant": True}
    common |= {"kv_cache_dtype": codec, "host_kv_bytes": "64MiB"}
    with LLM(folder, device_kv_bytes="512MiB", enable_prefix_caching=False, **common, **WHOLE) as alone:
        expected = answers_alone(alone, prompts, params)
    page = 2 * 2 * 3 * 128 * page_size * 4  # bytes at most
    for round in range(2):  # the second finds what the first has left
        budget = rng.choice([16, 17, 64, 100, 333, 4096])
        options: dict[str, Any] = {
            "max_num_batched_tokens": budget, "max_num_seqs": min(8, budget), "host_kv_bytes": 600 * page,
            "device_kv_bytes": page * (12 + -(-budget // page_size)), "cache_dir": str(tmp_path / "cache"),
        }  # fmt: skip
        with LLM(folder, **common | options) as llm:
            assert_answers(llm, rng, prompts, params, expected, round)


@dtypes
def test_chunks_of_any_size(tmp_path: Path, dtype: str) -> None:
    """Logits of a prompt in one chunk, and in many."""
    folder = small_model(tmp_path)
    prompt = random_prompt(700, 5)
    options: dict[str, Any] = {"page_size": 64, "dtype": dtype, "max_num_seqs": 1, "batch_invariant": True}
    whole = run(folder, [prompt], GREEDY, max_num_batched_tokens=1024, **options)
    for budget in (16, 130):
        run(folder, [prompt], GREEDY, max_num_batched_tokens=budget, **options).assert_same(whole)


@dtypes
@pytest.mark.parametrize("outputs, depth, gated", [(6144, 4096, False), (4096, 14336, False), (7168, 2056, True)])
def test_a_row_of_a_product_is_its_own(dtype: str, outputs: int, depth: int, gated: bool) -> None:
    """The tensor cores' instruction is wider for more tokens, and an element of it must not be another for that."""
    from distkv.kernels.cuda.linear import multiply  # imports triton

    kind = getattr(torch, dtype)
    generator = seeded(outputs)
    x = torch.randn(2048, depth, generator=generator).to("cuda", kind)
    weight = (torch.randn(outputs, depth, generator=generator) / 64).to("cuda", kind)
    whole = multiply(x, weight, None, gated=gated)
    for rows in (1, 2, 7, 16, 33, 64, 65, 128, 200, 256, 512, 1000):
        for side_by_side in (False, True):
            found = multiply(x[:rows], weight, None, gated=gated, side_by_side=side_by_side)
            assert torch.equal(found, whole[:rows]), (rows, side_by_side)


@pytest.mark.parametrize("method", ["ngram", "self", "draft_model"])
@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_drafts_change_no_answer(tmp_path: Path, method: str, codec: str) -> None:
    """Several tokens of a sequence in a step, most of whose pages lie on the host; sampled and greedy."""
    folder = save_llama(
        tmp_path, num_attention_heads=6, num_key_value_heads=3, hidden_size=768, head_dim=128, vocab_size=20,
        intermediate_size=2056, max_position_embeddings=4096,
    )[0]  # fmt: skip
    prompts = [random_prompt(length, length, end=20) * 5 for length in (150, 40, 9)]
    params = [SamplingParams(temperature=t, seed=4, max_tokens=60, ignore_eos=True, logprobs=2) for t in (0, 0.5, 0)]
    page = 2 * 2 * 3 * 128 * 16 * 2  # bytes
    config = {"method": method, "adaptive": False} | ({"model": str(folder)} if method == "draft_model" else {})
    common: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "device": "cuda", "kv_cache_dtype": codec}
    common |= {"device_kv_bytes": 24 * page, "host_kv_bytes": 200 * page, "max_num_batched_tokens": 128}
    answers = []
    for options in ({"batch_invariant": True}, {"speculative_config": config}):
        with LLM(folder, max_num_seqs=9, **common, **options) as llm:
            answers.append([said(output) for output in llm.generate(prompts, params, use_tqdm=False)])
            told = llm.stats().speculation
    assert answers[0] == answers[1] and told.num_accepted_tokens
