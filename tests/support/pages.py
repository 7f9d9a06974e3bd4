"""Pages of random bits, and how they are compared."""

import numpy as np
import torch
from torch import Tensor

from distkv.storage.dtypes import ITEM_BYTES, torch_dtype
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.pools.page_pool import PagePool

SPEC = PageSpec(num_layers=3, num_kv_heads=2, page_size=16, head_dim=4, dtype="float32")


def random_page(spec: PageSpec, seed: int) -> Tensor:
    """A page of random bits: every kind of number, NaNs with payloads and infinities among them."""
    generator = np.random.default_rng(seed)
    values = np.frombuffer(generator.bytes(spec.page_bytes), dtype=f"i{ITEM_BYTES[spec.dtype]}").copy()
    return torch.from_numpy(values).view(torch_dtype(spec.dtype)).view(spec.page_shape)


def bits(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy()


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit."""
    assert x.shape == y.shape and x.dtype == y.dtype
    return bool((bits(x) == bits(y)).all())


def store(pool: PagePool | HostPool, slot: int, page: Tensor) -> None:
    if isinstance(pool, HostPool):
        pool.page(slot).copy_(page)
    else:
        pool.store(slot, page)


def load(pool: PagePool | HostPool, slot: int, spec: PageSpec = SPEC) -> Tensor:
    if isinstance(pool, HostPool):
        return pool.page(slot).clone()
    page = torch.full(spec.page_shape, 7, dtype=torch_dtype(spec.dtype))
    pool.load(slot, page)
    return page
