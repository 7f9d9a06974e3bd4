"""A name for what a KV page is of: pages of one fingerprint may be used by any engine that has it.

The kernels are part of it, with their instruction set, since each kind rounds in an order of its own. With native
kernels the bits of a page depend on nothing else but its tokens, those before it and the number of ranks; see
`docs/invariance.md`.

The weights' part is a digest of what the ranks have loaded, see `weight_files.py`.
"""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import FORMAT
from distkv.workers.model.model_config import ModelConfig

FOLDER_DIGITS = 16  # of a fingerprint, that name a folder
# fields of ModelConfig that change no page; the dtype of pages is the engine's
OTHER_FIELDS = ("dtype", "eos_token_ids", "max_position_embeddings", "tie_word_embeddings")


def make_fingerprint(
    weights: str, kernels: str, model: ModelConfig, dtype: str, page_size: int, kv_cache_dtype: str = "auto",
    disk_codec: str = "none", context_size: int = 1,
) -> str:  # fmt: skip
    """64 hex digits of the weights' digest, the kernels' name, the model's shape, the dtype, the codecs and the layout
    of pages. The number of ranks has no part in it, since the layout of pages on disk does not depend on it, but for
    those that share out a page."""
    shape = {name: value for name, value in asdict(model).items() if name not in OTHER_FIELDS}
    parts = {
        "weights": weights,
        "kernels": kernels,
        "model": shape,
        "dtype": f"torch.{dtype}",  # as in the names of folders that are there already
        "page_size": page_size,
        "format": FORMAT,
    }
    # names of folders that are there already have nothing of these in them
    if kv_cache_dtype != "auto":
        parts["kv_cache_dtype"] = kv_cache_dtype
    if disk_codec != "none":
        parts["disk_codec"] = disk_codec
    if context_size != 1:
        parts["decode_context_parallel_size"] = context_size
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def common_kernels(names: list[str], num_kv_heads: int, num_stages: int = 1) -> str:
    """The name of the kernels of all ranks; all names in order where they differ, since each rank computes its own
    heads. Raises ConfigError where they differ and several ranks hold one head, whose pages must agree in every bit."""
    if len(set(names)) > 1 and len(names) > num_kv_heads * num_stages:
        raise ConfigError(
            f"the ranks have different kernels ({', '.join(names)}), and some hold the same KV head; use nodes of one "
            f"kind, or tensor_parallel_size {num_kv_heads} at most"
        )
    return names[0] if len(set(names)) == 1 else ", ".join(names)


def common_digest(digests: list[str], folder: Path) -> str:
    """What all ranks have loaded. Raises ConfigError when it is not the same, since their parts make no model."""
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ConfigError(
            f"the ranks have loaded different weights from {str(folder)!r}: rank {', '.join(map(str, others))} not "
            "those of rank 0. The folder was changed meanwhile, or is not the same on all nodes; make it so, and start "
            "again"
        )
    return digests[0]
