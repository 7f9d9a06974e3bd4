"""Shapes of models that need no checkpoint: a `config.json` for random weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distkv.errors import ConfigError

LLAMA_3 = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "vocab_size": 128256, "max_position_embeddings": 8192}

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
    # 32 KiB of KV per token
    "llama-3.2-1b": {
        **LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    # 128 KiB of KV per token
    "llama-3-8b": {
        **LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    # 320 KiB of KV per token
    "llama-3-70b": {
        **LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
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
