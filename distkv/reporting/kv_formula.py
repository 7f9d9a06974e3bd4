"""The formula of KV bytes, written out for people."""

from distkv.storage.dtypes import ITEM_BYTES
from distkv.storage.page_spec import PageSpec


def kv_formula(spec: PageSpec, copies: str = "") -> str:
    """Of a token of a full page below the device, which is what a step streams for it; `copies` says what of the KV
    heads is to be known."""
    numbers = f"{spec.head_dim} head_dim * {ITEM_BYTES[spec.dtype]} bytes"
    if spec.format is not None:
        scales = spec.stored_slice_shape[-1] - spec.head_dim * spec.format.bits // 8
        numbers = f"({spec.head_dim} head_dim * {spec.format.bits / 8:g} bytes + {scales} of scales)"
    return f"2 * {spec.num_layers} layers * {spec.num_kv_heads} KV heads{copies} * {numbers}"
