"""Small random checkpoints, a driver of one rank, and the measure by which tensors are compared."""

import _pydecimal as decimal_module
import argparse
import inspect
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distkv import LLM
from distkv.bench.device import DeviceMeter, Work
from distkv.engine.engine import Engine
from distkv.storage.paging import NUM_BUFFERS, PREFILL_SPLIT
from distkv.workers.attention.cpu import prefix_pieces
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.group.step_plan import SequencePlan, StepPlan
from distkv.workers.kv_pools import PoolSizes
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.page_directory import SequenceStep
from distkv.workers.rank import Rank, RankConfig

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_llama(
    folder: Path, *, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any
) -> tuple[Path, LlamaForCausalLM]:
    """Saves a random fp32 LLaMA of the TINY shape, changed by `overrides` (fields of LlamaConfig), as safetensors.

    Every weight is random, norms and biases too, and wide enough that attention is far from uniform and logits are far
    from ties, so that a mistake anywhere shows in the logits.
    """
    config = LlamaConfig(**(TINY | overrides))
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.5 * noise)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(noise)
            else:
                weight.copy_(noise * 1.5 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder, model


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes `config.json` in place by hand, so that a spelling of our choice is read by both sides."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def idle_engine(llm: LLM) -> Engine:
    """The engine of an LLM without requests, once it has nothing left to do and may be called from here."""
    engine = llm._engine
    assert isinstance(engine, Engine)
    while llm.stats() and engine.has_work:  # stats come after the commands that were given before
        time.sleep(0.001)
    return engine


def load_rank(
    folder: Path, *, page_size: int = 16, num_pages: int = 32, dtype: torch.dtype = torch.float32, **options: Any
) -> Rank:
    """A group of one rank on the CPU with its pool; `options` are fields of RankConfig."""
    fields: dict[str, Any] = {
        "folder": folder,
        "model": ModelConfig.load(folder),
        "load_format": "auto",
        "seed": 0,
        "dtype": dtype,
        "device": "cpu",
        "page_size": page_size,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": 0.9,
        "num_threads": None,
        "staging_pages": NUM_BUFFERS * PREFILL_SPLIT // page_size,
        "cache_dir": None,
        "keep_cache": False,
        "fingerprint": "",
    }
    rank = Rank(RankConfig(**(fields | options)), ProcessGroup())
    rank.allocate(PoolSizes(device=num_pages))
    return rank


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


def sequence_step(
    token_ids: Sequence[int], start: int, pages: Sequence[int], prompt_len: int, num_logits: int
) -> SequenceStep:
    """The part of a sequence in a step, with its pages in place."""
    return SequenceStep(list(token_ids), start, np.asarray(pages, dtype=np.int64), prompt_len, num_logits)


def step_plan(
    steps: Sequence[SequenceStep], copies: Sequence[tuple[int, int]] = (), clear: Sequence[int] = ()
) -> StepPlan:
    """A plan that tells the ranks of every page anew."""
    sequences: list[SequencePlan] = []
    places: list[int] = []
    for table, one in enumerate(steps):
        ids = list(range(len(places), len(places) + len(one.pages)))
        places += one.pages.tolist()
        sequences.append(SequencePlan(table, one.token_ids, one.start, one.prompt_len, one.num_logits, 0, ids))
    return StepPlan(sequences, list(copies), list(clear), relocated=list(enumerate(places)))


def read_prefix(pool: Tensor, pages: np.ndarray, prefix_len: int) -> list[tuple[Tensor, Tensor]]:
    """The pieces of a prefix that lies in resident pages of `pool` `[2, pages, kv_head, page_size, head_dim]`."""
    pieces = prefix_pieces(pages, prefix_len, pool.shape[3])
    return [piece.gather(pool, None) for piece in pieces]


def rank_pages(rank: Rank) -> int:
    """Pages in the rank's pool."""
    return rank.pools.device.num_pages


def scatter(count: int, num_pages: int) -> list[int]:
    """`count` distinct slots of `num_pages`, in an order that has neighbours, gaps and steps back."""
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(7)).tolist()
    assert count <= num_pages
    return order[:count]


def stdlib_text() -> str:
    """Long real text that every Python has."""
    return "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, decimal_module, inspect))


def seeded(seed: int) -> torch.Generator:
    """A generator for `torch.randn`, so that a test's numbers are a function of its drawn seed."""
    return torch.Generator().manual_seed(seed)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`|actual - expected| / |expected|` in the Euclidean norm; infinite where something is not a number."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return difference.item() if torch.isfinite(difference) else float("inf")


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """`max |actual - expected| / max |expected|`; infinite where something is not a number."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return difference.item() if torch.isfinite(difference) else float("inf")


class FakeMeter(DeviceMeter):
    """Runs the work on a CPU and says that it took a millisecond, of a second work at once two."""

    def __init__(self, free_bytes: int = 2**60):
        self.processors = 4
        self.order: list[Work] = []  # of what was timed
        self._peak = 0
        self._free_bytes = free_bytes

    def seconds(self, work: Work) -> float:
        self.order.append(work)
        work()
        return 1e-3

    def seconds_each(self, works: tuple[Work, Work]) -> tuple[float, float]:
        for work in works:
            self.seconds(work)
        return 1e-3, 2e-3

    def forget_peak(self) -> None:
        self._peak += 1000

    def peak_bytes(self) -> int:
        return self._peak

    def free_bytes(self) -> int:
        return self._free_bytes
