"""Runs the model on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from distkv.storage.moving.staging_ring import Load, Stream
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import Attention, Batch, Tokens, step_tokens
from distkv.workers.runners.host_copies import send
from distkv.workers.runners.runner import Receive
from distkv.workers.sampling.placeholders import resolve_placeholders

PlanAttention = Callable[[list[SequenceStep]], Attention]
OpenStream = Callable[[list[Load]], AbstractContextManager[Stream | None]]


class CpuRunner:
    """A `Runner`, see `runner.py`."""

    num_parts = 0

    def __init__(self, model: LlamaModel, pools: KVPools, plan: PlanAttention, stream: OpenStream | None = None):
        """
        Args:
            plan: plans the attention of a step over the pools.
            stream: opens the stream of its loads; that of the pools unless it is given.
        """
        self._model, self._pools, self._plan = model, pools, plan
        self._stream: OpenStream = stream or pools.stream

    def run(self, steps: list[SequenceStep], sampled: Tensor | None, receive: Receive | None = None) -> Tensor:
        """See `Runner`."""
        pool = self._pools.device
        attention = self._plan(steps)
        shard = self._model.shard
        found = step_tokens(steps, pool.spec.page_size, shard.context_rank, shard.context_size)
        tokens: Tokens[Tensor] = send(found, pool.device)
        if receive is None:  # else they have been embedded
            tokens = replace(tokens, token_ids=resolve_placeholders(tokens.token_ids, sampled))
        with self._stream(attention.loads) as stream:
            x_TE = None if receive is None else receive()
            return self._model.forward(Batch(tokens, attention), pool, stream, x_TE)

    def warm_up(self) -> Iterator[None]:
        """See `Runner`."""
        yield from ()

    def compile_rest(self) -> None:
        """See `Runner`."""

    def close(self) -> None:
        """See `Runner`."""
