"""Whose pages those of a model would be on this machine, without an engine: for pages that come from elsewhere."""

from contextlib import suppress
from pathlib import Path

import torch
from msgspec.structs import replace

from distkv.errors import ConfigError
from distkv.launch.fingerprint import make_fingerprint
from distkv.storage.disk.cache_folder import Description
from distkv.storage.tier import Tier
from distkv.workers.backend import make_backend
from distkv.workers.kinds import KINDS
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.weights import SafetensorsSource
from distkv.workers.rank_config import model_page_spec


def own_pages(folder: Path, like: Description) -> Description:
    """What an engine of this machine would say of the pages of a model, with the options of other pages, and their
    kernels where it has these. The weights are read, unless an earlier start has kept their digest.

    Raises ConfigError when the model cannot be used, or cannot have these options.
    """
    model = ModelConfig.load(folder)
    dtype = model.run_dtype(like.dtype)
    spec = model_page_spec(model, like.page_size, dtype, like.kv_cache_dtype, like.disk_codec)
    with SafetensorsSource(folder) as weights:
        digest = weights.digest(whole=True)
    kernels = _kernels(like.kernels)
    return replace(
        like,
        fingerprint=make_fingerprint(
            digest, kernels, model, dtype, like.page_size, like.kv_cache_dtype, like.disk_codec
        ),
        kernels=kernels,
        model=str(folder),
        dtype=dtype,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_bytes=spec.page_bytes_in(Tier.DISK) * like.decode_context_parallel_size,
    )


def _kernels(wanted: str) -> str:
    """The name of the kernels that an engine of this machine may have, those wanted if they are among them."""
    kinds = [kind for kind, one in reversed(KINDS.items()) if not one.is_simulated]
    kinds = [kind for kind in kinds if kind != "cuda" or torch.cuda.is_available()]
    names = []
    for kind in kinds:
        for batch_invariant in (None, True):
            with suppress(ConfigError):
                names.append(make_backend(kind, batch_invariant).kernels.name)
    return wanted if wanted in names else names[0]
