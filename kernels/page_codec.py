"""Pages as codes by torch's operators on any device: the definition of each `CodecFormat`, bit for bit that of all
kernels.

Dims: S page_size, D head_dim, R `CodecFormat.row_bytes`, g `group_size`.
"""

import torch
from torch import Tensor

from distkv.kernels.codec_format import CodecFormat, group_size


def encode(pages: Tensor, codec: CodecFormat) -> Tensor:
    """Codes and scales of pages `[..., 2, K, S, D]`, K first: uint8 `[..., 2, K, S, R]`.

    Numbers are encoded from their values in fp32. A group with a number that is not finite decodes as NaN. What was
    decoded once keeps its value: `decode(encode(decode(x))) == decode(x)`.
    """
    keys, values = pages.unbind(-4)
    keys_coded, key_scales = _encode_groups(keys, codec)
    values_coded, value_scales = _encode_groups(values.mT, codec)
    parts = []
    for codes, scales in ((keys_coded, key_scales), (values_coded.mT, value_scales)):
        stored = _packed(codes.contiguous(), codec).flatten(-2)
        parts.append(torch.cat([stored, scales.flatten(-3).contiguous().view(torch.uint8)], dim=-1))
    return torch.stack(parts, dim=-3).unflatten(-1, (pages.shape[-2], -1))


def decode(blocks: Tensor, codec: CodecFormat, dtype: torch.dtype, head_dim: int) -> Tensor:
    """What `encode` gave for pages of `head_dim` channels, as numbers of `dtype`: `[..., 2, K, S, D]`."""
    page_size = blocks.shape[-2]
    group = group_size(page_size, head_dim)
    codes, scales = blocks.flatten(-2).tensor_split([page_size * head_dim * codec.bits // 8], dim=-1)
    numbers = _unpacked(codes.unflatten(-1, (page_size, -1)), codec)
    scales = scales.contiguous().view(dtype).float()
    key_scales = scales.select(-3, 0).unflatten(-1, (page_size // group, codec.num_scales, head_dim))
    value_scales = scales.select(-3, 1).unflatten(-1, (head_dim // group, codec.num_scales, page_size))
    keys = _decode_groups(numbers.select(-4, 0), key_scales, codec)
    values = _decode_groups(numbers.select(-4, 1).mT, value_scales, codec).mT
    return torch.stack([keys, values], dim=-4).to(dtype)


def _encode_groups(x: Tensor, codec: CodecFormat) -> tuple[Tensor, Tensor]:
    """Numbers `[..., n, m]`, of which g neighbours along n make a group: codes, fp32 of the same shape, and scales
    `[..., n / g, num_scales, m]` in the dtype of x."""
    grouped = x.float().unflatten(-2, (-1, group_size(*x.shape[-2:])))
    poison = (grouped * 0).sum(-2)  # NaN where a number is not finite
    if codec.num_scales == 1:
        scales = grouped.abs().amax(-2)[..., None, :] + poison[..., None, :]
    else:
        scales = torch.stack([grouped.amin(-2), grouped.amax(-2)], dim=-2) + poison[..., None, :]
    lowest, step = _steps(scales, codec)
    codes = torch.where(step == 0, 0, (grouped - lowest) / step).nan_to_num(0)
    least = 0 if codec.num_scales == 2 else -codec.levels
    codes = codes.clamp(least, codec.levels)
    codes = codes.to(torch.float8_e4m3fn).float() if codec.name == "fp8_e4m3" else codes.round()
    return codes.flatten(-3, -2), scales.to(x.dtype)


def _decode_groups(codes: Tensor, scales: Tensor, codec: CodecFormat) -> Tensor:
    """fp32 numbers `[..., n, m]`, not yet rounded to the pages' dtype."""
    grouped = codes.unflatten(-2, (scales.shape[-3], -1))
    lowest, step = _steps(scales, codec)
    numbers = lowest + grouped * step
    highest = scales[..., -1:, :]
    numbers = torch.where(grouped == codec.levels, highest, numbers)
    if codec.num_scales == 1:
        numbers = torch.where(grouped == -codec.levels, -highest, numbers)
    return numbers.flatten(-3, -2)


def _steps(scales: Tensor, codec: CodecFormat) -> tuple[Tensor, Tensor]:
    """Of fp32 scales `[..., num_scales, m]`: what code 0 stands for, and a step of 1, each `[..., 1, m]`."""
    share = torch.tensor(1 / codec.levels, dtype=torch.float32, device=scales.device)
    if codec.num_scales == 1:
        return torch.zeros_like(scales), scales.float() * share
    lowest, highest = scales.float().split(1, dim=-2)
    return lowest, (highest - lowest) * share


def _packed(codes: Tensor, codec: CodecFormat) -> Tensor:
    """fp32 codes `[..., D]` as bytes `[..., D * bits / 8]`."""
    if codec.name == "fp8_e4m3":
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)
    if codec.name == "int8":
        return codes.to(torch.int8).view(torch.uint8)
    whole = codes.to(torch.uint8)
    return whole[..., ::2] | whole[..., 1::2] << 4


def _unpacked(stored: Tensor, codec: CodecFormat) -> Tensor:
    """The inverse of `_packed`."""
    if codec.name == "fp8_e4m3":
        return stored.view(torch.float8_e4m3fn).float()
    if codec.name == "int8":
        return stored.view(torch.int8).float()
    return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).float()
