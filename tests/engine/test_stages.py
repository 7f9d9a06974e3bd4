"""Layers split over stages: logits are bit for bit those of one stage, wherever pages lie."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_llama
from support.prompts import random_prompt
from support.ranks import rank_config
from support.runs import run
from support.thread_group import communicators, ranks_in_threads
from torch import Tensor

from distkv import SamplingParams
from distkv.workers import micro_batches
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.model.layout import Layout
from distkv.workers.rank import Rank
from distkv.workers.sizes import PoolSizes

OPTIONS: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 96, "max_num_seqs": 8, "num_threads": 1}
RESIDENT, ON_HOST, ON_DISK = (None, 0, 0), (14, 60, 0), (14, 6, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(
        tmp_path_factory.mktemp("model"), max_position_embeddings=2048, num_attention_heads=6, num_key_value_heads=3,
        hidden_size=96, head_dim=16, num_hidden_layers=5, vocab_size=130, intermediate_size=113,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    "stages, size, dtype",
    [(3, 1, "float32"), (2, 2, "bfloat16"), pytest.param(2, 1, "bfloat16", marks=pytest.mark.slow)],
)
def test_stages_change_no_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int, size: int, dtype: str
) -> None:
    """Of prompts that are scored, of answers that share their prompt, and of tokens that the step before sampled; in
    more micro-batches than pay."""
    monkeypatch.setattr(micro_batches, "ROWS_PER_READ", 2.0)
    prompts = [random_prompt(length, length) for length in (250, 40, 7)]
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, prompt_logprobs=1),
        SamplingParams(temperature=1, seed=3, n=2, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=1.2),
    ]
    options = OPTIONS | {"dtype": dtype, "tensor_parallel_size": size}
    with ranks_in_threads(monkeypatch):
        alone = run(folder, prompts, params, **options)
        for pages in (RESIDENT, ON_HOST, ON_DISK):
            staged = run(
                folder, prompts, params, pipeline_parallel_size=stages, pages=pages, cache_dir=tmp_path, **options
            )
            staged.assert_same(alone)
            assert [one.prompt_logprobs for one in staged.outputs] == [one.prompt_logprobs for one in alone.outputs]
            assert bool(staged.moved("host_streamed")) == bool(pages[1])
            assert bool(staged.moved("disk_streamed")) == bool(pages[2]) and not staged.stats.pages_recomputed
            assert 0 < staged.stats.stage_wait_seconds < staged.stats.stage_seconds


@pytest.mark.parametrize(
    "more",
    [
        {"kv_cache_dtype": "int8", "speculative_config": {"method": "ngram", "adaptive": False}},
        pytest.param(
            {"speculative_config": {"method": "self", "adaptive": False}, "decode_context_parallel_size": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"attention_policy": "decay(pages=4)"}, marks=pytest.mark.slow),
        pytest.param({"attention_policy": "top_pages(pages=4)", "kv_cache_dtype": "int4"}, marks=pytest.mark.slow),
        pytest.param({"decode_context_parallel_size": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stages_go_with_other_options(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Drafts and codes, which round pages as they fill, policies of attention that look back, shared pages."""
    monkeypatch.setattr(micro_batches, "ROWS_PER_READ", 2.0)
    prompts = [random_prompt(150, 1) * 2, random_prompt(60, 2)]
    parts = more.get("decode_context_parallel_size", 1)
    pages = (ON_HOST[0] // parts, *ON_HOST[1:])
    options = OPTIONS | {"pages": pages, "max_num_seqs": 12, "tensor_parallel_size": parts} | more
    with ranks_in_threads(monkeypatch):
        alone = run(folder, prompts, **options)
        staged = run(folder, prompts, pipeline_parallel_size=2, **options)
    assert [one.outputs for one in staged.outputs] == [one.outputs for one in alone.outputs]
    assert staged.moved("host_streamed")
    assert staged.stats.speculation.num_drafts == alone.stats.speculation.num_drafts


def test_pages_of_other_stages_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two stages have left on disk serves two stages again; a file that one of them has lost is one page to be
    computed again."""
    prompt = random_prompt(200, 1)
    options = OPTIONS | {"pages": (16, 8, 60), "cache_dir": tmp_path, "enable_prefix_caching": True}
    with ranks_in_threads(monkeypatch):
        first = run(folder, [prompt], pipeline_parallel_size=2, **options)
        again = run(folder, [prompt], pipeline_parallel_size=2, **options)
        arrays = sorted(tmp_path.glob("*/kv*.zarr"))
        assert len(arrays) == 2
        sorted(arrays[1].glob("c.*"))[3].unlink()
        third = run(folder, [prompt], pipeline_parallel_size=2, **options)
    for one in (again, third):
        assert one.outputs[0].outputs == first.outputs[0].outputs
    assert again.outputs[0].num_cached_tokens == 192 > third.outputs[0].num_cached_tokens


def test_random_pages_are_those_of_one_stage(folder: Path) -> None:
    def filled(stages: int) -> Tensor:
        config, layers = rank_config(folder, layout=Layout(pipeline_parallel_size=stages)), []
        for peers in communicators(config.layout):
            rank = Rank(config, peers)
            rank.allocate(PoolSizes(device=2))
            rank.execute(StepPlan([], [], [], synthetic_pages=[(1, 7)]))
            layers.append(rank.pools.device.data[:, :, 1].clone())
            rank.close()
        return torch.cat(layers)

    assert torch.equal(filled(2), filled(1))
