"""Ranks of any layout over one cache folder, each with its disk tier."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace as replaced
from support.disks import description
from support.pages import bits, random_page, same
from torch import Tensor

from distkv.storage.disk.cache_folder import Description
from distkv.storage.disk.page_arrays import DiskShare
from distkv.storage.disk.reopen import join, reopen
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.disk_slices import DiskSlices
from distkv.workers.disk_shares import join_checksums

SPEC = PageSpec(num_layers=6, num_kv_heads=3, page_size=16, head_dim=4, dtype="float32")
NUM_PAGES = 8


def cut(total: int, count: int) -> list[tuple[int, int]]:
    """Ranges over `total` things, larger ones first."""
    ends = [-(-total * number // count) for number in range(count + 1)]
    return list(pairwise(ends))


@dataclass
class Ranks:
    """Those of a layout that lie on one disk."""

    folder: Path
    pools: list[DiskPool]
    shares: list[DiskShare]
    num_parts: int
    spec: PageSpec

    def write(self, slot: int, page: Tensor) -> bytes:
        """Stores a page `[part * layer, 2, kv_head, ...]`; returns what the catalogue has of it."""
        for pool, share in zip(self.pools, self.shares, strict=True):
            pool.store(slot, self.own(page, share))
        return join_checksums(self.shares, [pool.checksums(slot) for pool in self.pools])

    def read(self, slot: int, page: Tensor) -> None:
        """Makes sure that all ranks read a page back, by whole pages and by slices."""
        for pool, share in zip(self.pools, self.shares, strict=True):
            wanted, found = self.own(page, share), torch.empty_like(self.own(page, share))
            pool.load(slot, found)
            assert same(found, wanted)
            with pool.open([slot, slot]) as pages:
                for layer in range(len(wanted)):
                    found = torch.empty_like(wanted[layer])
                    pages.read(1, layer, pool.parts(found))
                    assert same(found, wanted[layer])
            with closing(DiskSlices(pool)) as slices:
                for layer in (len(wanted) - 1, 0):
                    one = wanted[layer, :, -1].contiguous()
                    memory = np.zeros(one.nbytes, np.uint8)
                    slices.expect(layer, [(slot, wanted.shape[2] - 1)])
                    slices.read(layer, slot, wanted.shape[2] - 1, memory.data)
                    assert memory.tobytes() == bits(one).tobytes()

    def adopt(self, entries: dict[int, bytes]) -> set[int]:
        """Returns the slots that all ranks have found."""
        missing = {slot for pool in self.pools for slot in pool.adopt(entries)}
        return entries.keys() - missing

    def own(self, page: Tensor, share: DiskShare) -> Tensor:
        """A rank's part of a page."""
        parts = page.reshape(self.num_parts, self.spec.num_layers, *page.shape[1:])
        return parts[share.part, slice(*share.layers)][:, :, slice(*share.heads)].contiguous()

    def close(self) -> None:
        """Closes all pools."""
        for pool in self.pools:
            pool.close()


def pages_of(spec: PageSpec, num_parts: int = 1) -> Description:
    """What the folder says of them."""
    known = description(spec)
    page_bytes = known.page_bytes * num_parts
    return replaced(
        known, decode_context_parallel_size=num_parts, page_bytes=page_bytes, kv_cache_dtype=spec.kv_cache_dtype
    )


def shares(spec: PageSpec, stages: int, ranks: int, num_parts: int = 1) -> list[DiskShare]:
    """Those of all ranks of a layout."""
    return [
        DiskShare(heads, spec.num_kv_heads, layers, spec.num_layers, part, num_parts, is_first=False)
        for layers in cut(spec.num_layers, stages)
        for heads in cut(spec.num_kv_heads, ranks)
        for part in range(num_parts)
    ]


def start(folder: Path, having: Sequence[DiskShare], spec: PageSpec = SPEC, num_pages: int = NUM_PAGES) -> Ranks:
    """Opens the folder for some ranks, as `KVPools` does."""
    folder.mkdir(parents=True, exist_ok=True)
    num_parts = having[0].num_parts
    pools = []
    for number, share in enumerate(having):
        own = replace(spec, num_layers=share.layers[1] - share.layers[0])
        if number == 0:
            reopen(folder, own, num_pages, pages_of(spec, num_parts), share.array)
        elif share.array not in [one.array for one in having[:number]]:
            join(folder, own, num_pages, share.array)
        own = replace(own, num_kv_heads=share.heads[1] - share.heads[0])
        pools.append(DiskPool(own, folder, num_pages, replace(share, is_first=not number)))
    return Ranks(folder, pools, list(having), num_parts, spec)


def page_of(spec: PageSpec, seed: int, num_parts: int = 1) -> Tensor:
    """A page of random bits over all parts of its tokens: `[part * layer, 2, kv_head, ...]`."""
    spec = replace(spec, num_layers=spec.num_layers * num_parts)
    if spec.format is None:
        return random_page(spec, seed)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, spec.page_shape, np.uint8))
