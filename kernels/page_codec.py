"""Pages as codes by torch's operators on any device: the definition of each `CodecFormat`, bit for bit that of all
kernels.

Dims: S page_size, D head_dim, R `CodecFormat.row_bytes`, g `group_size`.
"""

from math import gcd

import torch
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat, group_size


def encode(pages: Tensor, codec: CodecFormat) -> Tensor:
    """Codes and scales of pages `[..., 2, K, S, D]`, K first: uint8 `[..., 2, K, S, R]`.

    Numbers are encoded from their values in fp32. A group with a number that is not finite decodes as NaN. What was
    decoded once keeps its value: `decode(encode(decode(x))) == decode(x)`.
    """
    keys, values = pages.unbind(-4)
    blocks = torch.stack([_encode_rows(keys.mT, codec), _encode_rows(values, codec)], dim=-3)
    return blocks.unflatten(-1, (pages.shape[-2], -1))


def decode(blocks: Tensor, codec: CodecFormat, dtype: torch.dtype, head_dim: int) -> Tensor:
    """What `encode` gave for pages of `head_dim` channels, as numbers of `dtype`: `[..., 2, K, S, D]`."""
    page_size = blocks.shape[-2]
    keys, values = blocks.flatten(-2).unbind(-3)
    keys = _decode_rows(keys, head_dim, page_size, codec, dtype).mT
    return torch.stack([keys, _decode_rows(values, page_size, head_dim, codec, dtype)], dim=-4)


def _encode_rows(x: Tensor, codec: CodecFormat) -> Tensor:
    """Rows `[..., r, n]` -> the bytes of a block `[..., bytes]`."""
    grouped = x.float().unflatten(-1, (-1, group_size(*x.shape[-2:])))  # [..., r, n / g, g]
    poison = (grouped * 0).sum(-1)  # NaN where a number is not finite
    if codec.num_scales == 1:
        scales = (grouped.abs().amax(-1) + poison)[..., None]
    else:
        scales = torch.stack([grouped.amin(-1) + poison, grouped.amax(-1) + poison], dim=-1)
    lowest, step = _steps(scales, codec)
    codes = torch.where(step == 0, 0, (grouped - lowest) / step).nan_to_num(0)
    codes = codes.clamp(0 if codec.num_scales == 2 else -codec.levels, codec.levels)
    stored = _packed(codes, codec).flatten(-3)
    by_group = scales.to(x.dtype).movedim(-3, -1).contiguous()  # [..., n / g, num_scales, r]
    return torch.cat([stored, by_group.flatten(-3).view(torch.uint8)], dim=-1)


def _decode_rows(block: Tensor, rows: int, count: int, codec: CodecFormat, dtype: torch.dtype) -> Tensor:
    """The inverse of `_encode_rows`: `[..., rows, count]` in `dtype`."""
    stored, scales = block.tensor_split([rows * count * codec.bits // 8], dim=-1)
    group = group_size(rows, count)
    grouped = _unpacked(stored.unflatten(-1, (rows, count // group, -1)), codec)
    shape = count // group, codec.num_scales, rows
    by_row = scales.contiguous().view(dtype).float().unflatten(-1, shape).movedim(-1, -3)
    lowest, step = _steps(by_row, codec)
    highest = by_row[..., -1:]
    numbers = grouped * step if codec.num_scales == 1 else lowest + grouped * step
    numbers = torch.where(grouped == codec.levels, highest, numbers)
    if codec.num_scales == 1:
        numbers = torch.where(grouped == -codec.levels, -highest, numbers)
    return numbers.flatten(-2).to(dtype)


def _steps(scales: Tensor, codec: CodecFormat) -> tuple[Tensor, Tensor]:
    """Of fp32 scales `[..., num_scales]`: what code 0 stands for, and a step of 1, each `[..., 1]`."""
    share = torch.tensor(1 / codec.levels, dtype=torch.float32, device=scales.device)
    if codec.num_scales == 1:
        return torch.zeros_like(scales), scales * share
    lowest, highest = scales.split(1, dim=-1)
    return lowest, (highest - lowest) * share


def _packed(codes: Tensor, codec: CodecFormat) -> Tensor:
    """Codes of groups `[..., g]` in fp32, rounded here, as bytes `[..., g * bits / 8]`."""
    if codec.name == "fp8_e4m3":
        return (codes.to(torch.float8_e4m3fn).float() + 0).to(torch.float8_e4m3fn).view(torch.uint8)  # no -0
    if codec.name == "int8":
        return codes.round().to(torch.int8).view(torch.uint8)
    low, high = codes.round().to(torch.uint8).unflatten(-1, (-1, 2, gcd(32, codes.shape[-1]) // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def _unpacked(stored: Tensor, codec: CodecFormat) -> Tensor:
    """The inverse of `_packed`."""
    if codec.name == "fp8_e4m3":
        return stored.view(torch.float8_e4m3fn).float()
    if codec.name == "int8":
        return stored.view(torch.int8).float()
    both = stored.unflatten(-1, (-1, gcd(32, 2 * stored.shape[-1]) // 2))
    return torch.stack([both & 15, both >> 4], dim=-2).flatten(-3).float()
