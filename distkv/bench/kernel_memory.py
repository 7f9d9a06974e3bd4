"""Rows of `distkv bench kernels` about what memory bounds: the small kernels, and pages between host and device."""

import math
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distkv.bench.device import LinkCeiling, MemoryCeiling, Turns, Work
from distkv.bench.kernel_attention import random_pool
from distkv.bench.kernel_work import AttentionShape, norm_bytes, rope_bytes, swiglu_bytes
from distkv.errors import DistKVError
from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.norm import rms_norm
from distkv.kernels.cuda.page_copy import copy_pages
from distkv.kernels.cuda.rope import rope_and_write_kv
from distkv.storage.device import device_of
from distkv.storage.moving.page_copies import COPY_PROGRAMS, copy_runs
from distkv.storage.paging import pages_for
from distkv.storage.pools.host_memory import HostBuffer


def elementwise_rows(
    turns: Turns, memory: MemoryCeiling, shape: AttentionShape, num_tokens: int, hidden: int, intermediate: int
) -> Iterator[dict[str, Any]]:
    """The kernels between the matrix products, on `num_tokens` tokens."""
    dtype, device = shape.dtype, turns.device

    def random(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_()

    x, delta, weight = random(num_tokens, hidden), random(num_tokens, hidden), random(hidden)
    gate_up = random(num_tokens, 2 * intermediate)
    qkv = random(num_tokens, shape.query_heads + 2 * shape.kv_heads, shape.head_dim)
    angles = torch.rand(num_tokens, 1, shape.head_dim // 2, device=device) * 2 * math.pi
    cos, sin = angles.cos(), angles.sin()
    pool, table = random_pool(shape, pages_for(num_tokens, shape.page_size), device)
    position = torch.arange(num_tokens, device=device)
    page, offset = table[position // shape.page_size], position % shape.page_size
    size = dtype.itemsize
    for name, num_bytes, work in (
        ("rms_norm", norm_bytes(num_tokens, hidden, size, False), lambda: rms_norm(x, weight, 1e-5)),
        ("rms_norm, residual", norm_bytes(num_tokens, hidden, size, True), lambda: rms_norm(x, weight, 1e-5, delta)),
        ("swiglu", swiglu_bytes(num_tokens, intermediate, size), lambda: swiglu(gate_up)),
        (
            "rope + KV write",
            rope_bytes(num_tokens, shape),
            lambda: rope_and_write_kv(qkv, cos, sin, pool, page, offset),
        ),
    ):
        seconds = turns.seconds({"kernel": work, "copy": memory.copy})
        rate, ceiling = num_bytes / seconds["kernel"].median, memory.copy_bytes / seconds["copy"].median
        yield {
            "part": "elementwise",
            "kernel": name,
            "tokens": num_tokens,
            "bytes": num_bytes,
            "ms": seconds["kernel"].scaled(1e3),
            "bytes_per_s": rate,
            "copy_bytes_per_s": ceiling,
            "share": rate / ceiling,
        }


def page_rows(turns: Turns, link: LinkCeiling, slice_bytes: int, num_bytes: int) -> Iterator[dict[str, Any]]:
    """`num_bytes` in slices of one layer of a page, between the host pool and the device: by the kernel, and by the
    copy engine with a copy for each piece. Raises DistKVError when the kernel copies wrongly.

    To the device they go into the staging buffer, where a slice is one piece; from it they come out of the device pool,
    where keys and values lie apart.
    """
    count, half = num_bytes // slice_bytes, slice_bytes // 2
    with closing(HostBuffer((count, 2, half), torch.uint8, pinned=device_of(turns.device).pinned)) as buffer:
        host = buffer.data
        host.random_(256)
        staging = torch.zeros(count, 2, half, dtype=torch.uint8, device=turns.device)
        pool = torch.randint(256, (2, count, half), dtype=torch.uint8, device=turns.device)
        order = torch.randperm(count)
        rows = [(a, b, 1) for a, b in enumerate(order.tolist())]
        pairs = torch.stack([torch.arange(count), order], dim=1).to(turns.device)

        apart = pool.transpose(0, 1)
        ways: tuple[tuple[str, Tensor, Tensor], ...] = (
            ("host to device", host.flatten(1)[:, None], staging.flatten(1)[:, None]),
            ("device to host", apart, host),
        )
        for direction, source, target in ways:
            works: dict[str, Work] = {
                "kernel": partial(copy_pages, source, target, pairs, COPY_PROGRAMS),
                "engine": partial(copy_runs, source, target, rows),
                "link": link.to_device if direction == "host to device" else link.to_host,
            }
            turns.meter.seconds(works["kernel"])
            if not torch.equal(target.cpu()[order], source.cpu()):
                raise DistKVError(f"slices of {slice_bytes} bytes from {direction} are not what they were; report it")
            seconds = turns.seconds(works)
            rates = {name: count * slice_bytes / seconds[name].median for name in ("kernel", "engine")}
            ceiling = link.num_bytes / seconds["link"].median
            yield {
                "part": "pages",
                "direction": direction,
                "slice_bytes": slice_bytes,
                "bytes": count * slice_bytes,
                "kernel_bytes_per_s": rates["kernel"],
                "engine_bytes_per_s": rates["engine"],
                "link_bytes_per_s": ceiling,
                "kernel_share": rates["kernel"] / ceiling,
                "engine_share": rates["engine"] / ceiling,
                "faster": max(rates, key=lambda name: rates[name]),
            }
