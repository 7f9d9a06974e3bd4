"""JSON as the server writes it."""

import json
from typing import Any

import msgspec

encode = msgspec.json.Encoder().encode
"""The bytes of an object whose texts are Unicode; numbers that JSON has not become null."""


def encode_ascii(value: Any) -> bytes:
    """The same for what repeats a client's words, which may have lone surrogates in them."""
    return json.dumps(value, ensure_ascii=True).encode("ascii")
