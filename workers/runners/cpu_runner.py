"""Runs the model on a CPU."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from distkv.workers.attention.cpu import plan_cpu_attention
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import Batch, Tokens, step_tokens
from distkv.workers.runners.host_copies import send
from distkv.workers.sampling.placeholders import resolve_placeholders


class CpuRunner:
    """A `Runner`, see `runner.py`."""

    num_parts = 0

    def __init__(self, model: LlamaModel, pools: KVPools):
        self._model, self._pools = model, pools
        self._group_size = model.shard.num_query_heads // model.shard.num_kv_heads

    def run(self, steps: list[SequenceStep], sampled: Tensor | None) -> Tensor:
        """See `Runner`."""
        pool, ring = self._pools.device, self._pools.ring
        spec = pool.spec
        attention = plan_cpu_attention(steps, spec.page_size, self._group_size, ring.buffer_pages, spec.dtype)
        tokens: Tokens[Tensor] = send(step_tokens(steps, spec.page_size), pool.device)
        tokens = replace(tokens, token_ids=resolve_placeholders(tokens.token_ids, sampled))
        with self._pools.stream(attention.loads) as stream:
            return self._model.forward(Batch(tokens, attention), pool, stream)

    def warm_up(self) -> Iterator[None]:
        """See `Runner`."""
        yield from ()
