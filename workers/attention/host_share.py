"""Attention that a device leaves to its host: states of pages that lie in the host's pool, computed there by the native
kernels while the device is at its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from distkv.kernels.native.library import Library
from distkv.kernels.native.page_states import page_states
from distkv.kernels.native.paged_attention import CodedPages
from distkv.storage.meter import now
from distkv.storage.tier import Tier
from distkv.workers.kv_pools import KVPools
from distkv.workers.page_directory import NOT_SHARED, SequenceStep
from distkv.workers.runners.batch import MAX_DECODE_TOKENS

Result = TypeVar("Result")

ATTENDED = "host_attended"  # the route of layer slices that are read where they lie, see `meter.py`


class HostShare:
    """A thread of the host that computes states, one layer after the other; it ends with the pools."""

    def __init__(self, library: Library, pools: KVPools):
        self._library, self._pools = library, pools
        self._thread = ThreadPoolExecutor(1, "kv-attend")
        pools.end_with(self._thread.shutdown)

    def submit(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Has the thread do some work, behind what it was given before."""
        return self._thread.submit(work, *arguments)

    def attend(
        self, layer: int, q: Tensor, layer_pool: Tensor, buffer: Tensor, items: Tensor, states: Tensor,
        coded: CodedPages | None = None,
    ) -> None:  # fmt: skip
        """Writes the states of items, see `page_states`; to be called by the thread."""
        start, pools = now(), self._pools
        page_states(self._library, q, layer_pool, buffer, items, states, coded)
        pools.count(ATTENDED, len(items) * pools.spec.slice_bytes_in(Tier.HOST))
        pools.meter.add(ATTENDED, start, layer=layer, pages=len(items))

    def everything(self, layer: int) -> Tensor:
        """One layer of the host's pool, as a buffer of all its pages."""
        return self._pools.host.slices(0, self._pools.host.num_pages, layer)


def shared_pages(step: SequenceStep, page_size: int) -> np.ndarray:
    """Which of a sequence's pages are the host's to attend to in a step, bool `[pages]`: of those that are shared out
    the full ones, where few tokens meet them."""
    shared = np.zeros(len(step.pages), dtype=bool)
    if len(step.token_ids) <= MAX_DECODE_TOKENS:
        full = step.start // page_size
        shared[:full] = host_slots(step)[:full] != NOT_SHARED
    return shared


def host_slots(step: SequenceStep) -> np.ndarray:
    """Those of a sequence's pages, see `SequenceStep`; NOT_SHARED for all of them where the host has no share."""
    return step.host_slots if len(step.host_slots) else np.full(len(step.pages), NOT_SHARED)
