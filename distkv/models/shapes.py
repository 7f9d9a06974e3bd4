"""Shapes of models that need no checkpoint: a `config.json` for random weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distkv.errors import ConfigError
from distkv.models.published import PUBLISHED

SHAPES: dict[str, dict[str, Any]] = {
    # 512 bytes of KV per token, so that a million tokens fit anywhere
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512,
    },
    # 4 KiB of KV per token
    "small": {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
    },
    # 32, 128 and 320 KiB of KV per token
    **{name: PUBLISHED[name] for name in ("llama-3.2-1b", "llama-3-8b", "llama-3-70b")},
}  # fmt: skip


@contextmanager
def shape_folder(name: str, **changes: Any) -> Iterator[Path]:
    """A temporary model folder with the `config.json` of a shape, in bfloat16, for load_format "dummy". `changes` are
    fields that shall be others.

    Raises ConfigError when there is no such shape.
    """
    if name not in SHAPES:
        raise ConfigError(f"shape {name!r} is not known; use one of {', '.join(SHAPES)}")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **SHAPES[name],
        **changes,
    }
    with TemporaryDirectory(prefix="distkv-shape-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        yield path.parent
