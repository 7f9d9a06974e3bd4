"""The mean keys of full pages, by which policies of attention choose among them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from distkv.storage.device import Device
from distkv.storage.dtypes import torch_dtype
from distkv.storage.page_spec import MEAN_TOKENS, PageSpec


class PageSummaries:
    """By layer, `[id, block, kv_head, head_dim]` in the dtype of the pages: a key for each MEAN_TOKENS tokens,
    `PageSpec.summary_bytes` a page. Pages are known by their ids, as `PageDirectory` has them.

    A page is known once `complete` was called for it, and until `forget` is, when its id is given to another one.
    """

    def __init__(self, spec: PageSpec, device: Device, num_pages: int):
        """With room for `num_pages` ids, and more as they come: lost pages have some beside those in the tiers. What is
        not used yet takes no memory on a CPU."""
        shape = (num_pages, spec.page_size // MEAN_TOKENS, spec.num_kv_heads, spec.head_dim)
        self._layers = [device.zeros(shape, torch_dtype(spec.dtype)) for _ in range(spec.num_layers)]
        self._known = np.zeros(num_pages, dtype=bool)

    def layer(self, index: int) -> Tensor:
        """All summaries of a layer; those that are not known hold anything finite or nothing but what was put."""
        return self._layers[index]

    def unknown(self, ids: np.ndarray) -> np.ndarray:
        """Which of the pages are not known, as a mask."""
        self._grow(ids)
        return ~self._known[ids]

    def put(self, layer: int, ids: np.ndarray, keys: Tensor) -> None:
        """Takes in keys `[pages, kv_head, page_size, head_dim]` of one layer of whole pages."""
        self._grow(ids)
        self._layers[layer][torch.from_numpy(ids)] = mean_keys(keys).to(keys.dtype)

    def add(self, id: int, keys: Tensor) -> None:
        """Takes in a whole page's keys `[layer, kv_head, page_size, head_dim]`."""
        ids = np.array([id])
        for layer, own in enumerate(keys):
            self.put(layer, ids, own[None])
        self.complete(ids)

    def complete(self, ids: np.ndarray) -> None:
        """Takes note that all layers of the pages were put."""
        self._grow(ids)
        self._known[ids] = True

    def forget(self, ids: Iterable[int]) -> None:
        """Takes note that ids name other pages now."""
        renewed = np.fromiter(ids, dtype=np.int64)
        self._known[renewed[renewed < len(self._known)]] = False

    def _grow(self, ids: np.ndarray) -> None:
        size, needed = len(self._known), int(ids.max(initial=-1)) + 1
        if needed <= size:
            return
        size = max(needed, 2 * size)
        self._known = np.concatenate([self._known, np.zeros(size - len(self._known), dtype=bool)])
        for index, old in enumerate(self._layers):
            new = self._layers[index] = old.new_zeros(size, *old.shape[1:])
            new[: len(old)] = old


def mean_keys(keys: Tensor) -> Tensor:
    """The means `[pages, block, kv_head, head_dim]` of keys `[pages, kv_head, page_size, head_dim]`, fp32. Halves of a
    block are added onto each other until one key is left: in one order, whatever number of pages is given."""
    total = keys.transpose(1, 2).unflatten(1, (-1, MEAN_TOKENS)).float()
    while (count := total.shape[2]) > 1:
        total = total[:, :, : count // 2] + total[:, :, count // 2 :]
    return total[:, :, 0] / MEAN_TOKENS
