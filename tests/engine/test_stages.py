"""Layers split over stages: logits are bit for bit those of one stage, wherever pages lie."""

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.prompts import random_prompt
from support.runs import run
from support.thread_group import ranks_in_threads

from distkv import SamplingParams
from distkv.workers import micro_batches

OPTIONS: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 96, "max_num_seqs": 8, "num_threads": 1}
RESIDENT, ON_HOST, ON_DISK = (None, 0, 0), (14, 60, 0), (14, 6, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(
        tmp_path_factory.mktemp("model"), max_position_embeddings=2048, num_attention_heads=6, num_key_value_heads=3,
        hidden_size=96, head_dim=16, num_hidden_layers=5, vocab_size=130, intermediate_size=113,
    )[0]  # fmt: skip


@pytest.mark.parametrize("stages, size, dtype", [(2, 1, "bfloat16"), (3, 1, "float32"), (2, 2, "bfloat16")])
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
