"""The engines that are compared: each is the model's own options but for a few."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distkv.config import EngineConfig, EngineOptions
from distkv.errors import ConfigError

NAMES = ("dtype", "kv_cache_dtype", "attention_policy", "page_size")
"""Options that a row may set."""
DEFAULTS: dict[str, Any] = {name: getattr(EngineConfig, name) for name in NAMES}
ROWS = (
    "full",
    "kv_cache_dtype=fp8_e4m3",
    "kv_cache_dtype=int8",
    "kv_cache_dtype=int4",
    "page_size=64",
    "kv_cache_dtype=int4; page_size=64",
    "page_size=16",  # a policy chooses by page, so small ones choose better
    "attention_policy=sink_window(sinks=4, window=1024); page_size=16",
    "attention_policy=top_pages(share=0.25); page_size=16",
    "attention_policy=top_pages(share=0.1); page_size=16",
    "attention_policy=top_pages(share=0.25); kv_cache_dtype=int8; page_size=16",
    "attention_policy=decay(share=0.25); page_size=16",
    "attention_policy=decay(share=0.1); page_size=16",
)
QUICK_ROWS = (
    "full",
    "kv_cache_dtype=int8",
    "kv_cache_dtype=int4",
    "page_size=16",
    "attention_policy=top_pages(share=0.1); page_size=16",
)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    dtype: str
    kv_cache_dtype: str
    attention_policy: str
    page_size: int

    @property
    def name(self) -> str:
        """The options but for the page size that are not an engine's own; `full` where there are none."""
        changed = (getattr(self, name) for name in NAMES[:-1] if getattr(self, name) != DEFAULTS[name])
        return ", ".join(changed) or "full"

    @property
    def label(self) -> str:
        """What tells it from all others."""
        return f"{self.name}, pages of {self.page_size}"

    @property
    def options(self) -> EngineOptions:
        """As keyword arguments of `EngineConfig`."""
        return {
            "dtype": self.dtype, "kv_cache_dtype": self.kv_cache_dtype, "attention_policy": self.attention_policy,
            "page_size": self.page_size,
        }  # fmt: skip

    @property
    def reference(self) -> "Variant":
        """The whole and exact cache, with the same pages: what this one is compared with."""
        return Variant(**{**DEFAULTS, "page_size": self.page_size})


def parse_row(text: str) -> Variant:
    """The variant of a text such as `kv_cache_dtype=int4; page_size=64`; `full` sets nothing. Raises ConfigError."""
    values, given = dict(DEFAULTS), set()
    for part in [] if text.strip() == "full" else text.split(";"):
        name, equals, value = (one.strip() for one in part.partition("="))
        if name not in NAMES or not equals:
            known = ", ".join(NAMES)
            raise ConfigError(
                f"--row {text!r}: {part.strip()!r} sets none of {known}; use NAME=VALUE; NAME=VALUE, or full"
            )
        if name in given:
            raise ConfigError(f"--row {text!r} sets {name} twice; leave one of them out")
        given.add(name)
        values[name] = int(value) if name == "page_size" and value.isdecimal() else value
    config = EngineConfig("/", **values)  # which checks them, and writes a policy in one way
    return Variant(**{name: getattr(config, name) for name in NAMES})


def with_references(texts: Iterable[str]) -> list[Variant]:
    """The variants in their order, each after its reference, and none twice. Raises ConfigError as `parse_row`."""
    found: dict[Variant, None] = {}
    for variant in map(parse_row, texts):
        found |= {variant.reference: None, variant: None}
    return list(found)
