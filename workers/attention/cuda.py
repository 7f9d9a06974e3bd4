"""Attention of a step on CUDA: kernels that read pages through tables, with no copy of a page on the device.

Dims: T tokens of the step, H query heads, K KV heads, G = H / K, S page_size, D head_dim; within a decode group,
B sequences of C tokens each.
"""

from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat
from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.cuda.decode import decode_splits
from distkv.kernels.cuda.merge import STATES, carry_like, merge_splits
from distkv.kernels.cuda.prefill import BLOCK_M, SEGMENT_TOKENS, prefill_walk
from distkv.kernels.cuda.prefill_splits import prefill_splits
from distkv.kernels.cuda.softmax import States
from distkv.storage.moving.staging_ring import Load, Stream
from distkv.workers.attention.cuda_share import HostStates, Left, LeftArrays, leave_to_host
from distkv.workers.attention.decode_plan import DecodePlan, DecodeRound, plan_decode, split_pages_for
from distkv.workers.attention.host_share import shared_pages
from distkv.workers.attention.prefill_plan import PrefillPlan, plan_prefill
from distkv.workers.attention.step_loads import Member, plan_loads
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS
from distkv.workers.runners.host_copies import Array
from distkv.workers.sizes import STATE_BYTES

Walk = Generator[int, Tensor | None, None]
"""Goes over the pages of some sequences: yields the number of the load that it needs next, and is sent its buffer."""


@dataclass(frozen=True)
class CudaShape:
    """What of a rank decides how attention is cut up and launched."""

    num_heads: int  # query heads of the rank
    num_kv_heads: int
    head_dim: int
    page_size: int
    buffer_pages: int  # of the staging ring
    dtype: torch.dtype
    num_programs: int  # of the decode kernel for each KV head: enough to fill the GPU
    batch_invariant: bool = False  # whether prefill and decode agree in every bit
    codec: CudaCodec | None = None  # of full pages
    leaves_to_host: bool = False  # whether states come up from the host, see `cuda_share.py`
    exchange_bytes: int = 0  # of device memory that exchanges with other ranks take

    @property
    def format(self) -> CodecFormat | None:
        """That of full pages, None where they hold plain numbers."""
        return None if self.codec is None else self.codec.format

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def state_bytes(self) -> int:
        """Bytes of one split's state for one token, see `States`."""
        return self.num_heads * (self.head_dim + 2) * 4

    @property
    def split_tokens(self) -> int:
        """Tokens of a split."""
        return split_pages_for(self.page_size) * self.page_size

    def streaming_bytes(self, num_tokens: int) -> int:
        """Device memory that attention takes beside its result, in a step of `num_tokens` that streams."""
        decode = max(STATE_BYTES, STATES * sum(range(1, MAX_DECODE_TOKENS + 1)) * self.state_bytes)
        # what comes up, and is brought into the order of the device's own
        from_host = 2 * STATE_BYTES if self.leaves_to_host else 0
        return decode + from_host + num_tokens * self.state_bytes + self.exchange_bytes

    def exact_bytes(self, num_seqs: int) -> int:
        """What is kept of pages that a step fills, at most, beyond those that its tokens fill alone."""
        if self.codec is None:
            return 0
        return num_seqs * 2 * self.num_kv_heads * self.page_size * self.head_dim * self.dtype.itemsize

    def max_states(self, num_tokens: int, num_groups: int = 1) -> int:
        """States of a round of sequences with `num_tokens` new tokens each, one of so many groups at a time."""
        return max(STATES, STATE_BYTES // (self.state_bytes * num_tokens * num_groups))


@dataclass(frozen=True)
class RoundArrays(Generic[Array]):
    """What decode reads in a round, see `DecodeRound`."""

    sequences: Array
    items: Array
    num_items: Array  # [launches, 2]; the second column keeps each launch's number aligned


@dataclass(frozen=True)
class DecodeArrays(Generic[Array]):
    """What decode reads of sequences with the same number of new tokens, see `DecodePlan`."""

    table: Array
    rounds: list[RoundArrays[Array]]


@dataclass(frozen=True)
class PrefillArrays(Generic[Array]):
    """What prefill reads, see `PrefillPlan`."""

    table: Array
    chunks: Array
    blocks: Array
    filled: Array


@dataclass(frozen=True)
class AttentionArrays(Generic[Array]):
    """What the kernels of a step read; all int64."""

    decode: list[DecodeArrays[Array]]
    prefill: PrefillArrays[Array] | None
    filled: Array  # with a codec: slots of the pages that decode fills, or -1
    left: LeftArrays[Array] | None = None  # to the host


@dataclass(frozen=True)
class CudaPlan:
    """The attention of a step, planned on the host."""

    decode: list[DecodePlan]
    prefill: PrefillPlan | None
    filled: np.ndarray  # with a codec: slots of the pages that decode fills
    loads: list[Load]  # each for all sequences, of any group, that need it
    left: Left | None = None  # what the host has of it

    @property
    def arrays(self) -> AttentionArrays[np.ndarray]:
        """What the kernels read."""
        decode = [DecodeArrays(group.table, [round_arrays(one) for one in group.rounds]) for group in self.decode]
        prefill, left = self.prefill, None if self.left is None else self.left.arrays
        if prefill is None:
            return AttentionArrays(decode, None, self.filled, left)
        arrays = PrefillArrays(prefill.table, prefill.chunks, prefill.blocks, prefill.filled)
        return AttentionArrays(decode, arrays, self.filled, left)


def plan_cuda_attention(steps: list[SequenceStep], shape: CudaShape, num_padding: int = 0) -> CudaPlan:
    """Plans the attention of a step; behind its rows come `num_padding` that stand for nobody, which only a step of
    one new token for each sequence may have."""
    decode: dict[int, list[Member]] = defaultdict(list)
    prefill: list[Member] = []
    filled = []
    rows: dict[int, SequenceStep] = {}  # by first row
    shared: dict[int, np.ndarray] = {}  # the same, which pages are the host's
    first = 0
    for given in steps:
        step, count, decodes = given, len(given.token_ids), is_decoded(given, shape)
        if decodes and shape.leaves_to_host:
            rows[first], shared[first] = step, shared_pages(step, shape.page_size)
            if shared[first].any():  # as what the device has, so that no load brings it
                step = replace(step, pages=np.where(shared[first], 0, step.pages))
        (decode[count] if decodes else prefill).append((first, step))
        if shape.codec is not None and decodes and (step.start + count) % shape.page_size == 0:
            filled.append(step.pages[step.start // shape.page_size])
        first += count
    most = {count: shape.max_states(count, len(decode)) for count in decode}
    members = [member for group in decode.values() for member in group] + prefill
    together = [(count, most[count] // STATES) for count, group in decode.items() for _ in group]
    together += [(0, len(members))] * len(prefill)  # chunks hold no states of splits
    cell_pages = max(split_pages_for(shape.page_size), SEGMENT_TOKENS // shape.page_size)
    brought = plan_loads(members, together, shape.page_size, cell_pages, shape.buffer_pages)
    groups, number = [], 0
    for count, group in decode.items():
        groups.append(plan_decode(count, group, number, brought, shape.page_size, most[count], STATES, num_padding))
        number += len(group)
    chunks = None
    if prefill:
        has_codec = shape.codec is not None
        chunks = plan_prefill(prefill, number, brought, shape.page_size, shape.group_size, BLOCK_M, has_codec)
    left = None
    if any(pages.any() for pages in shared.values()):
        groups, left = leave_to_host(groups, shared, rows)
    return CudaPlan(groups, chunks, np.array(filled, dtype=np.int64), brought.loads, left)


def is_decoded(step: SequenceStep, shape: CudaShape) -> bool:
    """Whether a sequence takes the path of decode. With a codec its new tokens are of one page then, which is rounded
    once they have met it as it is."""
    count = len(step.token_ids)
    crosses = shape.codec is not None and step.start % shape.page_size + count > shape.page_size
    return count <= MAX_DECODE_TOKENS and not crosses


@dataclass(frozen=True)
class CudaAttention:
    """An `Attention`, see `batch.py`: a plan and its arrays on the device."""

    plan: CudaPlan
    shape: CudaShape
    arrays: AttentionArrays[Tensor]
    host: HostStates | None = None  # of what the plan leaves to it

    @property
    def loads(self) -> list[Load]:
        """See `Attention`."""
        return self.plan.loads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_pool: Tensor, stream: Stream | None) -> Tensor:
        """See `Attention`; keys and values are read from their pages. With a codec those that the step fills get the
        values of their codes: behind decode, and before prefill, for which what they held is kept. Each buffer serves
        all that need it before the next one is taken."""
        out, codec = q.new_empty(q.shape), self.shape.codec
        if self.host is not None:
            self.host.begin(q, layer_pool)
        walks: list[Walk] = [
            self._decode(number, plan, arrays, q, layer_pool, out)
            for number, (plan, arrays) in enumerate(zip(self.plan.decode, self.arrays.decode, strict=True))
        ]
        if self.plan.prefill is not None and self.arrays.prefill is not None:
            walks.append(self._prefill(self.plan.prefill, self.arrays.prefill, q, layer_pool, out))
        go_through(walks, len(self.loads), stream)
        if codec is not None:
            codec.round(layer_pool, self.arrays.filled)
        return out.flatten(1)

    def _decode(
        self, number: int, plan: DecodePlan, arrays: DecodeArrays[Tensor], q: Tensor, layer_pool: Tensor, out: Tensor
    ) -> Walk:
        shape, count = self.shape, plan.num_tokens
        carry = carry_like(out) if len(plan.rounds) > 1 else None
        for index, (one, read) in enumerate(zip(plan.rounds, arrays.rounds, strict=True)):
            rows = one.num_states, shape.num_kv_heads, count * shape.group_size
            states = new_states(q, rows, shape.head_dim)
            yield from meet_splits(shape, q, layer_pool, arrays.table, one, read, count, states)
            if self.host is not None:
                self.host.put(number, index, states)
            merge_splits(states, read.sequences, out, carry, num_tokens=count, split_tokens=shape.split_tokens)

    def _prefill(
        self, plan: PrefillPlan, arrays: PrefillArrays[Tensor], q: Tensor, layer_pool: Tensor, out: Tensor
    ) -> Walk:
        shape, exact = self.shape, None
        if shape.codec is not None:
            exact = layer_pool.new_empty(len(arrays.filled), *layer_pool[:, 0].shape)
            shape.codec.round(layer_pool, arrays.filled, exact)
        state = new_states(q, (plan.num_saved, shape.num_heads), shape.head_dim) if plan.num_saved else None
        first = 0
        for launch, size in enumerate(plan.num_blocks):
            buffer = (yield plan.loads[launch - 1]) if launch else None
            meet_blocks(shape, q, layer_pool, buffer, arrays, slice(first, first + size), state, out, exact)
            first += size


def new_states(q: Tensor, rows: tuple[int, ...], head_dim: int) -> States:
    """Room for the states of some rows, on the device of q."""
    # each a tensor of its own: kernels are compiled for pointers that are multiples of 16 bytes
    return States(*(q.new_empty(shape, dtype=torch.float32) for shape in ((*rows, head_dim), rows, rows)))


def meet_splits(
    shape: CudaShape, q: Tensor, layer_pool: Tensor, table: Tensor, one: DecodeRound, read: RoundArrays[Tensor],
    num_tokens: int, states: States,
) -> Walk:  # fmt: skip
    """Writes the states of a round's splits: of those on the device, then of those of each load."""
    first = 0
    for launch, size in enumerate(one.num_items):
        buffer = (yield one.loads[launch - 1]) if launch else None
        if size:
            decode_splits(
                q, layer_pool, buffer, table, read.sequences, read.items[first : first + size], read.num_items[launch],
                states, num_tokens=num_tokens, split_pages=split_pages_for(shape.page_size),
                num_programs=min(size, shape.num_programs), batch_invariant=shape.batch_invariant, codec=shape.format,
            )  # fmt: skip
        first += size


def meet_blocks(
    shape: CudaShape, q: Tensor, layer_pool: Tensor, buffer: Tensor | None, arrays: PrefillArrays[Tensor],
    blocks: slice, state: States | None, out: Tensor, exact: Tensor | None,
) -> None:  # fmt: skip
    """Walks some blocks of prompts over a segment of their keys."""
    read = q, layer_pool, buffer, arrays.table, arrays.chunks, arrays.blocks[blocks]
    if shape.batch_invariant:
        prefill_splits(*read, state, out, split_tokens=shape.split_tokens, codec=shape.format, exact=exact)
    else:
        prefill_walk(*read, state, out, codec=shape.format, exact=exact)


def go_through(walks: list[Walk], num_loads: int, stream: Stream | None) -> None:
    """Brings all walks to their ends, side by side: each buffer serves all that need it before the next is taken."""
    wanted = [next(walk, None) for walk in walks]
    for number in range(num_loads):
        assert stream is not None
        buffer = stream.take()
        for index, walk in enumerate(walks):
            while wanted[index] == number:
                wanted[index] = _go_on(walk, buffer)
    assert not any(number is not None for number in wanted), "loads are met in order"


def _go_on(walk: Walk, buffer: Tensor) -> int | None:
    """The load that a walk needs next, None at its end."""
    try:
        return walk.send(buffer)
    except StopIteration:
        return None


def round_arrays(one: DecodeRound) -> RoundArrays[np.ndarray]:
    """What the kernels read of a round."""
    num_items = np.zeros((len(one.num_items), 2), dtype=np.int64)
    num_items[:, 0] = one.num_items
    return RoundArrays(one.sequences, one.items, num_items)
