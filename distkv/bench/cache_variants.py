"""One model that decodes without a KV cache, with one that is concatenated, and with distkv's pages.

Weights, projections, norms, RoPE, MLP and sampling are the same code for all, in float32 on the CPU. They differ in
which tokens a step runs and where their keys and values are kept. Without a cache, attention is that of the pages:
whatever it reads was written by the same step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distkv.storage.moving.staging_ring import Load, Stream
from distkv.storage.paging import NUM_BUFFERS, PREFILL_SPLIT, pages_for
from distkv.workers.backends.cpu import CpuBackend, NativeBackend
from distkv.workers.group.communicators import Communicators
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.page_directory import SequenceStep
from distkv.workers.rank import Rank
from distkv.workers.rank_config import RankConfig
from distkv.workers.runners.batch import Attention
from distkv.workers.runners.cpu_runner import CpuRunner
from distkv.workers.sizes import PoolSizes

NO_CACHE, CONCATENATED, PAGED = "no cache", "torch.cat", "paged"
VARIANTS = (NO_CACHE, CONCATENATED, PAGED)


@dataclass
class Work:
    """What attention has done since it was made, counted where it is done."""

    rows: int = 0  # queries, in all layers
    copied_bytes: int = 0  # of keys and values that were there before, to make room for one more


@dataclass(frozen=True)
class Counted:
    """An `Attention` whose rows are counted."""

    attention: Attention
    work: Work

    @property
    def loads(self) -> list[Load]:
        """See `Attention`."""
        return self.attention.loads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`."""
        self.work.rows += len(q)
        return self.attention.attend(q, k, v, layer_pool, stream)


class Concatenated:
    """An `Attention` of one sequence that keeps its keys and values itself, a tensor each in every layer, and makes
    longer ones of them for every token, as models are often first written. Pages stay as they are."""

    def __init__(self, num_layers: int, work: Work):
        self.loads: list[Load] = []
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._layer = 0
        self._work = work

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`; layers come in order."""
        keys, values = (x.transpose(0, 1)[None] for x in (k, v))  # [1, K, 1, D]
        kept = self._kept[self._layer]
        if kept is not None:
            self._work.copied_bytes += kept[0].nbytes + kept[1].nbytes
            keys, values = torch.cat([kept[0], keys], 2), torch.cat([kept[1], values], 2)
        else:
            keys, values = keys.clone(), values.clone()  # they are views of the step's own memory
        self._kept[self._layer] = keys, values
        self._layer = (self._layer + 1) % len(self._kept)
        out = scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Decoded:
    """One run of a variant, token by token."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of attention in all layers, up to each token
    copied_bytes: list[int] = field(default_factory=list)  # up to each token
    logits: list[Tensor] = field(default_factory=list)  # `[vocab_size]` each, where they were asked for


class SmallModel:
    """A model in this process, with pages for one sequence."""

    def __init__(self, folder: Path, longest: int, page_size: int):
        """With room for `longest` tokens."""
        config = RankConfig(
            folder=folder, model=ModelConfig.load(folder), load_format="auto", seed=0, dtype="float32",
            kv_cache_dtype="auto", device="cpu", page_size=page_size, max_num_seqs=1, max_num_batched_tokens=longest,
            gpu_memory_utilization=0.9, num_threads=None, batch_invariant=None, digest_weights=False,
            staging_pages=max(NUM_BUFFERS, NUM_BUFFERS * PREFILL_SPLIT // page_size),
        )  # fmt: skip
        self._rank = Rank(config, Communicators())
        self._rank.allocate(PoolSizes(device=pages_for(longest, page_size)))
        self._pages = np.arange(pages_for(longest, page_size))

    @property
    def num_layers(self) -> int:
        return self._rank.config.model.num_hidden_layers

    @property
    def is_exact(self) -> bool:
        """Whether a token's bits are the same alone and among others, which is true of the native kernels."""
        return isinstance(self._rank.backend, NativeBackend)

    @torch.inference_mode()
    def decode(self, variant: str, first: int, count: int, keeps_logits: bool = False) -> Decoded:
        """Makes `count` tokens after the token `first`, greedily. The token at position n is made of n tokens."""
        run = self._stepper(variant, work := Work())
        decoded, tokens = Decoded(), [first]
        for position in range(count):
            start = time.perf_counter()
            [logits] = run(tokens, position)
            tokens.append(int(logits.argmax()))
            decoded.seconds.append(time.perf_counter() - start)
            decoded.rows.append(work.rows)
            decoded.copied_bytes.append(work.copied_bytes)
            if keeps_logits:
                decoded.logits.append(logits.clone())
        decoded.tokens.extend(tokens[1:])
        return decoded

    def close(self) -> None:
        """Frees the pages."""
        self._rank.close()

    def _stepper(self, variant: str, work: Work) -> Callable[[list[int], int], Tensor]:
        """What gives the logits `[1, vocab_size]` after the tokens, of which the last is at `position`."""
        model, pools, backend = self._rank.model, self._rank.pools, self._rank.backend
        assert isinstance(backend, CpuBackend)
        plan, pages = backend.attention(model, pools), self._pages
        if variant == CONCATENATED:
            kept, one_page = Concatenated(self.num_layers, work), np.zeros_like(pages)
            plan, pages = lambda steps: kept, one_page  # which every token is written to, and nobody reads
        runner = CpuRunner(model, pools, lambda steps: Counted(plan(steps), work))
        size = self._rank.page_spec.page_size

        def run(tokens: list[int], position: int) -> Tensor:
            new, start = (tokens, 0) if variant == NO_CACHE else (tokens[position:], position)
            step = SequenceStep(new, start, pages[: pages_for(len(tokens), size)], len(tokens), 1)
            logits = model.logits(runner.run([step], None))
            assert logits is not None
            return logits

        return run
