"""What CUDA leaves to its host of a step's attention: splits that are pages of the host's share, whose states come from
the native kernels and go among the device's own.

The host has a page of its share wherever that lies, since its bits are not those of a GPU: in its pool; of a page on
the device alone a copy that comes down with the queries; of one on disk alone its file.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from distkv.kernels.cuda.softmax import States
from distkv.kernels.native.page_states import state_width
from distkv.kernels.native.paged_attention import CodedPages
from distkv.kernels.page_entries import buffer_entry
from distkv.storage.device import HostCopy
from distkv.storage.dtypes import torch_dtype
from distkv.storage.errors import StoreError
from distkv.storage.tier import DEVICE, DISK, HOST, Tier, decode_locations
from distkv.workers.attention.decode_plan import DecodePlan, DecodeRound
from distkv.workers.attention.host_share import HostShare, host_slots
from distkv.workers.kv_pools import KVPools
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import Array

READ_PAGES = 8  # that are read from disk before their states are computed


@dataclass(frozen=True)
class LeftArrays(Generic[Array]):
    """What the device must know of the host's part; all int64."""

    rows: Array  # of the step, whose queries go down
    slots: Array  # of pages that go down
    states: list[list[Array]]  # by group of sequences and round, which of the round's states are the host's


@dataclass(frozen=True)
class Left:
    """The host's part of a step. Items are those of rounds one after the other, and so are their rows of states."""

    items: np.ndarray  # int64 [N, 7], see `page_states`; rows are those of `LeftArrays.rows`, entries slots of a tier
    tiers: np.ndarray  # [N], in which; on the device the entry is an index into `LeftArrays.slots`
    num_tokens: list[int]  # by group, the rows of an item
    arrays: LeftArrays[np.ndarray]

    def on(self, tier: Tier) -> np.ndarray:
        """The items of pages in a tier."""
        return self.items[self.tiers == tier]


def leave_to_host(
    groups: list[DecodePlan], shared: Mapping[int, np.ndarray], steps: Mapping[int, SequenceStep]
) -> tuple[list[DecodePlan], Left]:
    """Takes the host's splits out of the plans of groups of sequences.

    Args:
        shared: by first row of the step, which of the pages of a sequence are the host's. The plans have these as
            resident ones, and a page for each split.
        steps: by first row the sequences.
    """
    first_page = dict(zip(steps, np.cumsum([0, *(len(step.pages) for step in steps.values())]).tolist(), strict=False))
    is_shared = np.concatenate([shared[row] for row in steps])
    tiers_of, slots_of = _places(list(steps.values()))
    plans, items, tiers = [], [], []
    states: list[list[np.ndarray]] = []
    for plan in groups:
        rounds: list[DecodeRound] = []
        states.append([])
        for one in plan.rounds:
            resident, others = np.split(one.items, [one.num_items[0]])
            # padding stands for nobody, and has no items
            bases = np.array([first_page.get(row, 0) for row in one.sequences[:, 0].tolist()])
            page = bases[resident[:, 0]] + resident[:, 1]
            is_left = is_shared[page]
            left, page = resident[is_left], page[is_left]
            states[-1].append(one.sequences[left[:, 0], 3] + left[:, 1])
            num_items = [one.num_items[0] - len(left), *one.num_items[1:]]
            rounds.append(replace(one, items=np.concatenate([resident[~is_left], others]), num_items=num_items))
            rows, tokens = one.sequences[left[:, 0], 0], np.full(len(left), plan.num_tokens)
            starts = one.sequences[left[:, 0], 1] - plan.num_tokens
            items.append(np.stack([rows, tokens, starts, left[:, 1], slots_of[page], 0 * tokens - 1, 0 * tokens], 1))
            tiers.append(tiers_of[page])
        plans.append(replace(plan, rounds=rounds))
    table, where = np.concatenate(items), np.concatenate(tiers)
    table[:, 6] = np.cumsum(table[:, 1]) - table[:, 1]
    slots = table[where == DEVICE, 4].copy()
    table[where == DEVICE, 4] = np.arange(len(slots))
    rows = np.repeat(table[:, 0] - table[:, 6], table[:, 1]) + np.arange(table[:, 1].sum())
    needed = np.unique(rows)
    table[:, 0] = np.searchsorted(needed, table[:, 0])
    return plans, Left(table, where, [plan.num_tokens for plan in groups], LeftArrays(needed, slots, states))


def _places(steps: list[SequenceStep]) -> tuple[np.ndarray, np.ndarray]:
    """Tier and slot in which the host finds each page, over all pages of all sequences."""
    pages = np.concatenate([step.pages for step in steps])
    on_host = np.concatenate([host_slots(step) for step in steps])
    _, on_disk = decode_locations(pages)
    tiers = np.where(on_host >= 0, HOST, np.where(pages >= 0, DEVICE, DISK))
    return tiers, np.where(on_host >= 0, on_host, np.where(pages >= 0, pages, on_disk))


class HostStates:
    """Computes the host's part of a step, layer after layer. Like a `Stream` it tells what could not be read."""

    def __init__(self, host: HostShare, pools: KVPools, left: Left, arrays: LeftArrays[Tensor], group_size: int):
        """
        Args:
            arrays: on the device.
            group_size: query heads per KV head.
        """
        self.bad_reads: dict[int, str] = {}
        self._host, self._pools, self._left, self._arrays, self._group_size = host, pools, left, arrays, group_size
        spec, on_host, on_disk = pools.spec, left.on(HOST), left.on(DISK)
        self._coded = None
        if spec.format is not None:
            self._coded = CodedPages(spec.format, torch.empty(0, *spec.slice_shape, dtype=torch_dtype(spec.dtype)))
        filling = pools.mover.filling()
        self._awaited = [filling[slot] for slot in set(on_host[:, 4].tolist()) & filling.keys()]
        on_host[:, 4] = buffer_entry(on_host[:, 4])
        self._at_hand = torch.from_numpy(np.concatenate([left.on(DEVICE), on_host]))
        self._disk_slots = on_disk[:, 4].tolist()
        on_disk[:, 4] = buffer_entry(np.arange(len(on_disk)) % READ_PAGES)
        self._read = torch.from_numpy(on_disk)
        self._pages = pools.ring.open(self._disk_slots)
        pages = READ_PAGES if self._disk_slots else 0
        self._buffer = torch.zeros(pages, *spec.stored_slice_shape, dtype=torch_dtype(spec.stored_dtype))
        self._layer = 0
        self._states: Tensor | None = None  # of one layer after the other
        self._under_way: Future[list[list[Tensor]]] | None = None

    def begin(self, q: Tensor, layer_pool: Tensor) -> None:
        """Has queries and pages of a layer come down behind what the device was given so far, and states computed as
        soon as they are there."""
        device = self._pools.device.device
        queries = device.bring(q[self._arrays.rows])
        pages = device.bring(layer_pool[:, self._arrays.slots])
        self._under_way = self._host.submit(self._compute, self._layer, queries, pages)
        self._layer += 1

    def put(self, group: int, number: int, states: States) -> None:
        """Puts the host's states of a round among the device's own; waits for them, and not for the device."""
        where = self._arrays.states[group][number]
        if not len(where):
            return
        assert self._under_way is not None
        block = self._under_way.result()[group][number].to(states.acc.device, non_blocking=True)
        sizes = [len(where) * part[0].numel() for part in states]
        for part, found in zip(states, block.split(sizes), strict=True):
            part[where] = found.view(len(where), *part.shape[1:])

    def close(self) -> None:
        """See `Stream`."""
        try:
            if self._under_way is not None:
                self._under_way.exception()
        finally:
            if self._pages is not None:
                self._pages.close()

    @torch.inference_mode()
    def _compute(self, layer: int, queries: HostCopy, pages: HostCopy) -> list[list[Tensor]]:
        """What `put` sends up, by group and round."""
        for event in self._awaited:
            event.synchronize()
        self._awaited = []
        q, pool = queries.tensor(), pages.tensor()
        _, heads, dim = q.shape
        if self._states is None:
            num_rows = int(self._left.items[:, 1].sum())
            self._states = torch.empty(num_rows, heads, state_width(dim), dtype=torch.float32)
        if len(self._at_hand):
            pages_there = self._host.everything(layer)
            self._host.attend(layer, q, pool, pages_there, self._at_hand, self._states, self._coded)
        for first in range(0, len(self._disk_slots), READ_PAGES):
            self._bring(first, layer)
            items = self._read[first : first + READ_PAGES]
            self._host.attend(layer, q, pool, self._buffer, items, self._states, self._coded)
        return self._blocks(self._states)

    def _bring(self, first: int, layer: int) -> None:
        """Reads the next pages of a layer from disk."""
        disk = self._pools.disk
        assert self._pages is not None and disk is not None
        for index, slot in enumerate(self._disk_slots[first : first + READ_PAGES]):
            try:
                self._pages.read(first + index, layer, disk.parts(self._buffer[index]))
            except StoreError as error:
                self.bad_reads[slot] = str(error)
                self._buffer[index].zero_()

    def _blocks(self, states: Tensor) -> list[list[Tensor]]:
        blocks: list[list[Tensor]] = []
        reached = 0
        for num_tokens, rounds in zip(self._left.num_tokens, self._arrays.states, strict=True):
            blocks.append([])
            for where in rounds:
                num_rows = len(where) * num_tokens
                part = states[reached : reached + num_rows].view(len(where), num_tokens, *states.shape[1:])
                blocks[-1].append(self._as_of_device(part))
                reached += num_rows
        return blocks

    def _as_of_device(self, states: Tensor) -> Tensor:
        """States `[N, C, H, width]` as `decode_splits` would write them, side by side in memory that may go up: sums of
        values `[N, K, C * G, D]`, highest scores and sums of weights. A highest score is whole there."""
        count, num_tokens, heads, _ = states.shape
        dim = self._pools.spec.head_dim
        grouped = states.view(count, num_tokens, heads // self._group_size, self._group_size, -1).transpose(1, 2)
        highest = grouped[..., -2].ceil()
        shrink = torch.exp2(grouped[..., -2] - highest)
        parts = grouped[..., :dim] * shrink[..., None], highest, grouped[..., -1] * shrink
        size = sum(part.numel() for part in parts)
        block = self._pools.device.device.host_block(-(-size // 2)).view(torch.float32)[:size]
        return torch.cat([part.flatten() for part in parts], out=block)
