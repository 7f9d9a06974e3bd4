"""How a KV page lies in memory as codes: sizes and numbers, known without torch.

Keys are coded by channel over groups of neighbouring tokens, values by token over groups of neighbouring channels,
since outliers of keys keep to channels and those of values do not (KIVI, https://arxiv.org/abs/2402.02750).
"""

from dataclasses import dataclass
from math import gcd

MOST_IN_GROUP = 64  # numbers that share their scales
LANES = 16  # numbers that the kernels decode at a time, all of one group


@dataclass(frozen=True)
class CodecFormat:
    """What the numbers of a group are stored as.

    A layer's keys of one KV head in a page are one block of bytes, with a row for each channel of as many numbers as
    the page has tokens; likewise its values, with a row for each token. First come the codes
    `[rows, numbers * bits / 8]`, of int4 the numbers u b + j and u b + u / 2 + j of a row in the low and the high half
    of its byte u b / 2 + j, for j < u / 2, where u is 32, or the group if that is 16; then the scales in the
    model's dtype `[numbers / group, num_scales, rows]`.
    """

    name: str
    number: int  # in `codecs.hpp`
    bits: int
    levels: int  # the highest code
    num_scales: int  # 1: the largest absolute value; 2: the lowest and the highest value
    formula: str  # of a number x in the model's dtype from its code c

    def row_bytes(self, page_size: int, head_dim: int, item_bytes: int) -> int:
        """Bytes of a block by token: there are `page_size * row_bytes` in it."""
        scales = head_dim // group_size(page_size, head_dim) * self.num_scales
        return head_dim * self.bits // 8 + scales * item_bytes


def group_size(page_size: int, head_dim: int) -> int:
    """Neighbours in a row that share their scales: tokens of a channel, or channels of a token."""
    return gcd(MOST_IN_GROUP, page_size, head_dim)


_SYMMETRIC = "x = c * (m / {levels}), or m where c is {levels}, with the group's largest absolute value m"

FORMATS = {
    one.name: one
    for one in (
        CodecFormat("fp8_e4m3", 1, 8, 448, 1, _SYMMETRIC.format(levels=448)),
        CodecFormat("int8", 2, 8, 127, 1, _SYMMETRIC.format(levels=127)),
        CodecFormat("int4", 3, 4, 15, 2, "x = l + c * ((h - l) / 15), or h where c is 15, with the group's lowest and "
                    "highest values l and h"),
    )
}  # fmt: skip
"""By the names that `kv_cache_dtype` has for them."""
