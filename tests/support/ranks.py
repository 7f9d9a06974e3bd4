"""A group of one rank, driven step by step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.plans import sequence_step, step_plan
from torch import Tensor

from distkv.storage.paging import NUM_BUFFERS, PREFILL_SPLIT
from distkv.workers.group.communicators import Communicators
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank import Rank
from distkv.workers.rank_config import RankConfig
from distkv.workers.sizes import PoolSizes


def load_rank(folder: Path, *, num_pages: int = 32, **options: Any) -> Rank:
    """A group of one rank on the CPU with its pool; `options` are those of `rank_config`."""
    rank = Rank(rank_config(folder, **options), Communicators())
    rank.allocate(PoolSizes(device=num_pages))
    return rank


def rank_config(folder: Path, *, page_size: int = 16, dtype: str = "float32", **options: Any) -> RankConfig:
    """What ranks on the CPU are told; `options` are fields of RankConfig."""
    fields: dict[str, Any] = {
        "folder": folder,
        "model": ModelConfig.load(folder),
        "load_format": "auto",
        "seed": 0,
        "dtype": dtype,
        "kv_cache_dtype": "auto",
        "device": "cpu",
        "page_size": page_size,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.9,
        "num_threads": None,
        "staging_pages": NUM_BUFFERS * PREFILL_SPLIT // page_size,
        "batch_invariant": None,
        "digest_weights": False,
    }
    return RankConfig(**(fields | options))


def run_chunks(
    rank: Rank, token_ids: Sequence[int], chunks: Sequence[int], prompt_len: int | None = None, wanted: int = 1 << 30
) -> Tensor:
    """The logits `[rows, vocab_size]` of one sequence that takes its tokens in steps of the given sizes: those of the
    last `wanted` tokens of each step, all unless given.

    Its pages lie scattered over the pool. `prompt_len` is the whole sequence unless given.
    """
    assert sum(chunks) == len(token_ids)
    pages_for = rank.page_spec.pages_for
    slots = scatter(pages_for(len(token_ids)), rank_pages(rank))
    logits, start = [], 0
    for count in chunks:
        end = start + count
        step = sequence_step(
            token_ids[start:end], start, slots[: pages_for(end)], prompt_len or len(token_ids), min(count, wanted)
        )
        result = rank.execute(step_plan([step]))
        assert result is not None
        logits.append(result)
        start = end
    return torch.cat(logits)


def rank_pages(rank: Rank) -> int:
    """Pages in the rank's pool."""
    return rank.pools.device.num_pages


def scatter(count: int, num_pages: int) -> list[int]:
    """`count` distinct slots of `num_pages`, in an order that has neighbours, gaps and steps back."""
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(7)).tolist()
    assert count <= num_pages
    return order[:count]
