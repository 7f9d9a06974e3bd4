"""Runs the model by the kernels for CUDA: decode steps whose pages are all resident as captured graphs, all others
launch by launch.

A step of single tokens is padded to one of a few sizes, whether its graph or its single launches run: cuBLAS may sum
products of other sizes in another order, and an answer must not depend on where its pages lie.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.native.library import Library
from distkv.storage.dtypes import torch_dtype
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import DECODE_SPLIT, pages_for
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.attention.cuda import AttentionArrays, CudaAttention, CudaPlan, CudaShape, plan_cuda_attention
from distkv.workers.attention.cuda_context import (
    EXCHANGE_BYTES,
    ContextArrays,
    ContextShape,
    CudaContextAttention,
    CudaContextPlan,
    context_shape,
    plan_cuda_context,
)
from distkv.workers.attention.cuda_share import HostStates
from distkv.workers.attention.host_share import HostShare
from distkv.workers.errors import ConfigError
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS, Batch, Tokens, step_tokens
from distkv.workers.runners.compile_ahead import CompileAhead, compile_decode
from distkv.workers.runners.host_copies import Array, map_arrays, send
from distkv.workers.runners.runner import Receive
from distkv.workers.runners.step_graphs import StepGraphs
from distkv.workers.sampling.placeholders import resolve_placeholders
from distkv.workers.sampling.trial_sampling import sample_in_all_ways

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows that steps of single tokens are padded to; larger ones run as they are."""

WARM_UP_TOKENS = 64  # of a prompt

PROGRAMS = 3
"""Programs of the decode kernel for each multiprocessor: as many as run there at a time with head_dim 128 and 16 rows.
Each takes its share of the splits, so one more would begin when all others have ended."""


@dataclass(frozen=True)
class StepArrays(Generic[Array]):
    """What a step reads on the device."""

    tokens: Tokens[Array]  # with padding
    attention: AttentionArrays[Array] | ContextArrays[Array]
    wanted: Array  # int64: the rows that the next stage or the head is to have, of those that the model returns


@dataclass(frozen=True)
class CudaStep:
    """A step, planned on the host."""

    arrays: StepArrays[np.ndarray]
    plan: CudaPlan | CudaContextPlan
    size: int | None  # rows with padding; None where there is none, and the model returns what is wanted alone


def plan_step(
    steps: list[SequenceStep], shape: CudaShape, sizes: list[int], is_last_stage: bool = True,
    context: ContextShape | None = None,
) -> CudaStep:  # fmt: skip
    """Lays a step out; one of single tokens is padded to the next of `sizes`. Stages before the last one pass all
    tokens on. With `context` ranks share out the pages."""
    group = None if context is None else context.context.group
    tokens = step_tokens(steps, shape.page_size, *((group.rank, group.size) if group is not None else ()))
    wanted = tokens.logit_rows if is_last_stage else np.arange(len(tokens.token_ids))
    size, padding = None, 0
    if all(len(step.token_ids) == 1 for step in steps):
        size = next((size for size in sizes if size >= len(steps)), None)
    if size is not None:
        padding = size - len(steps)
        tokens = map_arrays(tokens, lambda array: np.pad(array, (0, padding)))
        tokens.page[len(steps) :] = -1
        tokens = replace(tokens, logit_rows=np.arange(size))
    if context is not None:
        shared = plan_cuda_context(steps, context, padding)
        return CudaStep(StepArrays(tokens, shared.arrays, wanted), shared, size)
    plan = plan_cuda_attention(steps, shape, padding)
    return CudaStep(StepArrays(tokens, plan.arrays, wanted), plan, size)


class CudaRunner:
    """A `Runner`, see `runner.py`."""

    def __init__(
        self, model: LlamaModel, pools: KVPools, max_num_seqs: int, num_programs: int, captures: bool,
        batch_invariant: bool = False, library: Library | None = None, context: ContextGroup | None = None,
    ):  # fmt: skip
        """
        Args:
            num_programs: see `CudaShape`.
            captures: whether steps are captured as graphs; those of ranks that share out pages are not.
            batch_invariant: whether prefill and decode agree in every bit.
            library: by which the host attends to what plans leave to it; None where they leave it nothing.
            context: the ranks that share out pages with this one, where the model is so cut.

        Raises ConfigError where the host's pages are not whole splits, or the kernels cannot share pages out.
        """
        self._model, self._pools, self._device = model, pools, pools.device.device
        spec = pools.device.spec
        if model.shard.context_size == 1:  # as of a model that drafts, which has its pages to itself
            context = None
        num_heads = model.shard.num_query_heads if context is None else context.num_query_heads
        self.shape = CudaShape(
            num_heads, spec.num_kv_heads, spec.head_dim, spec.page_size, pools.ring.buffer_pages,
            torch_dtype(spec.dtype), num_programs, batch_invariant, cuda_codec(spec),
            library is not None, 0 if context is None else EXCHANGE_BYTES,
        )  # fmt: skip
        self._context = None if context is None else context_shape(context, self.shape, spec)
        below = [size for size in SIZES if size < max_num_seqs]
        self.sizes = below + list(SIZES[len(below) : len(below) + 1])
        self._captures = captures and context is None
        self._host = None
        if library is not None:
            if spec.page_size < DECODE_SPLIT:
                raise ConfigError(
                    f"cpu_attention is set and page_size is {spec.page_size}, of which a split of decode on CUDA has "
                    f"several: use {DECODE_SPLIT} or more, or leave one of them out"
                )
            self._host = HostShare(library, pools)
        self._ahead: CompileAhead | None = None
        self._graphs: StepGraphs | None = None

    def run(self, steps: list[SequenceStep], sampled: Tensor | None, receive: Receive | None = None) -> Tensor:
        """See `Runner`."""
        step = plan_step(steps, self.shape, self.sizes, self._model.shard.is_last_stage, self._context)
        plan = step.plan
        if self._graphs is not None and isinstance(plan, CudaPlan) and self._graphs.fits(step.size, plan):
            assert step.size is not None and isinstance(step.arrays.attention, AttentionArrays)
            wanted: Tensor = send(step.arrays.wanted, self._device)
            x_TE = _received(receive, step.size)
            return self._graphs.run(step.size, step.arrays.tokens, step.arrays.attention, sampled, x_TE)[wanted]
        if self._ahead is not None:
            for group in plan.decode:
                self._ahead.claim(group.num_tokens)
        sent: StepArrays[Tensor] = send(step.arrays, self._device)
        tokens = sent.tokens
        if receive is None:  # else they have been embedded
            tokens = replace(tokens, token_ids=resolve_placeholders(tokens.token_ids, sampled))
        with ExitStack() as stack:
            attention = self._attention(plan, sent.attention, stack)
            stream = stack.enter_context(self._pools.stream(attention.loads))
            x_TE = _received(receive, step.size)
            hidden = self._model.forward(Batch(tokens, attention), self._pools.device, stream, x_TE)
        return hidden if step.size is None else hidden[sent.wanted]

    def _attention(
        self, plan: CudaPlan | CudaContextPlan, arrays: AttentionArrays[Tensor] | ContextArrays[Tensor],
        stack: ExitStack,
    ) -> CudaAttention | CudaContextAttention:  # fmt: skip
        """That of a step; what it does on the host ends with the stack."""
        if isinstance(plan, CudaContextPlan):
            assert self._context is not None and isinstance(arrays, ContextArrays)
            return CudaContextAttention(plan, self._context, arrays)
        assert isinstance(arrays, AttentionArrays)
        host = None
        if plan.left is not None:
            assert self._host is not None and arrays.left is not None
            host = HostStates(self._host, self._pools, plan.left, arrays.left, self.shape.group_size)
            stack.enter_context(self._pools.noting(host))
        return CudaAttention(plan, self.shape, arrays, host)

    def warm_up(self) -> Iterator[None]:
        """See `Runner`: compiles what steps launch, and captures the graphs."""
        size, pages = self.shape.page_size, self._pools.device.num_pages
        wanted = WARM_UP_TOKENS if self.shape.codec is None else max(WARM_UP_TOKENS, size)  # so that a page is filled
        tokens = min(wanted, pages * size)
        prompt = SequenceStep([0] * tokens, 0, np.arange(pages_for(tokens, size)), tokens, 1)
        hidden = self.run([prompt], None, self._model.blank_input(tokens))
        if self._model.ends is not None:
            logits = self._model.logits(hidden[-1:])
            if logits is not None:  # on rank 0
                sample_in_all_ways(logits)
        self.run([SequenceStep([0], 0, np.arange(1), 1, 1)], None, self._model.blank_input(1))
        yield
        if self._captures:
            self._graphs = StepGraphs(self._model, self._pools.device, self.shape, self.sizes[-1])
            for rows in reversed(self.sizes):  # the largest first, whose memory serves the others
                self._graphs.capture(rows)
                yield

    def compile_rest(self) -> None:
        """See `Runner`: decode of several new tokens. With a context group it is compiled when it comes."""
        # on a CPU an interpreter compiles nothing
        if self._device.runs_behind and self._context is None:
            stream = torch.cuda.Stream(self._device.torch_device)
            compile = partial(compile_decode, self.shape, self._pools.device, stream)
            self._ahead = CompileAhead(compile, range(2, MAX_DECODE_TOKENS + 1))

    def close(self) -> None:
        """See `Runner`: NCCL waits at its end until no graph has an operation of its own."""
        self._graphs = None

    @property
    def num_parts(self) -> int:
        """See `Runner`."""
        return 1 + self._captures * len(self.sizes)


def _received(receive: Receive | None, size: int | None) -> Tensor | None:
    """What the stage before has, with the padding of a step that is padded to so many rows."""
    if receive is None:
        return None
    x_TE = receive()
    return x_TE if size is None else torch.nn.functional.pad(x_TE, (0, 0, 0, size - len(x_TE)))


def cuda_codec(spec: PageSpec) -> CudaCodec | None:
    """What the kernels of a rank encode and decode its pages by."""
    if spec.format is None:
        return None
    return CudaCodec(spec.format, spec.num_kv_heads, spec.page_size, spec.head_dim)


def decode_programs(num_processors: int, num_kv_heads: int) -> int:
    """Programs of the decode kernel for each KV head on a GPU with so many multiprocessors."""
    return max(1, PROGRAMS * num_processors // num_kv_heads)
