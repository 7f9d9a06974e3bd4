"""A name for all that the bits of a KV page depend on: pages of one fingerprint may be used by any engine that has it.

The digest of the weights is cached in the model's folder, in DIGESTS, until a file's size or time of change differs.
"""

import json
import logging
from dataclasses import asdict
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch

from distkv.errors import ConfigError
from distkv.storage.disk.cache_folder import FORMAT, replace_file
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.weights import tensor_files

log = logging.getLogger(__name__)

DIGESTS = ".distkv-fingerprint.json"
FOLDER_DIGITS = 16  # of a fingerprint, that name a folder
# fields of ModelConfig that change no page; the dtype of pages is the engine's
OTHER_FIELDS = ("dtype", "eos_token_ids", "max_position_embeddings", "tie_word_embeddings")


def make_fingerprint(weights: str, model: ModelConfig, dtype: torch.dtype, page_size: int) -> str:
    """64 hex digits of the weights' digest, the model's shape, the dtype and the layout of pages. The number of ranks
    has no part in it, since pages on disk do not depend on it."""
    shape = {name: value for name, value in asdict(model).items() if name not in OTHER_FIELDS}
    parts = {"weights": weights, "model": shape, "dtype": str(dtype), "page_size": page_size, "format": FORMAT}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def dummy_digest(seed: int, device: str) -> str:
    """Stands for the content of random weights, which are other ones on another kind of device."""
    return f"dummy {seed} {device}"


def weights_digest(folder: Path) -> str:
    """64 hex digits of the content of the checkpoint's files. Raises ConfigError when one cannot be read."""
    names = sorted(set(tensor_files(folder).values()))
    known = _read_digests(folder / DIGESTS)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            status = (folder / name).stat()
            # a file that is put in another's place may keep its size and time, but is another file or was changed now
            key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
            before = known.get(name, {})
            if {field: before.get(field) for field in key} == key and isinstance(before.get("sha256"), str):
                found[name] = before
                continue
            log.info("reading %s once, to name the cache of its pages", folder / name)
            with open(folder / name, "rb") as file:
                found[name] = key | {"sha256": file_digest(file, "sha256").hexdigest()}
        except OSError as error:
            raise ConfigError(
                f"{str(folder / name)!r} cannot be read ({error.strerror}); it is missing or damaged: fetch it again"
            ) from error
    if found != known:
        try:
            replace_file(folder / DIGESTS, json.dumps(found, indent=1).encode())
        except OSError as error:
            log.warning(
                "%s cannot be written (%s), so the weights are read once more at each start", folder / DIGESTS,
                error.strerror,
            )  # fmt: skip
    return sha256("".join(one["sha256"] for one in found.values()).encode()).hexdigest()


def _read_digests(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier start found, by file; nothing when that cannot be read."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict) or not all(isinstance(one, dict) for one in known.values()):
        return {}
    return known
