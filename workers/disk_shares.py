"""Which part of the model's pages each rank has on disk."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from distkv.storage.disk.page_arrays import DiskShare
from distkv.workers.model.shard import Shard
from distkv.workers.rank_config import RankConfig


def disk_shares(config: RankConfig) -> list[DiskShare]:
    """Those of all ranks, in their order."""
    model, taken, shares = config.model, set(), []
    for rank in range(config.layout.size):
        shard = Shard.of(model, config.layout, rank)
        share = DiskShare(
            heads=shard.kv_heads,
            num_heads=model.num_key_value_heads,
            layers=shard.layers,
            num_layers=model.num_hidden_layers,
            part=shard.context_rank,
            num_parts=shard.context_size,
        )
        shares.append(replace(share, reports=share.place not in taken))
        taken.add(share.place)
    return shares


def join_checksums(shares: Sequence[DiskShare], parts: list[bytes]) -> bytes:
    """Those of a page of the whole model, uint32 `[part, kv_head, layer]`, of what each rank reports."""
    whole = shares[0].empty_checksums()
    for share, part in zip(shares, parts, strict=True):
        if share.reports:
            own = share.own(whole)
            own[:] = np.frombuffer(part, np.uint32).reshape(own.shape)
    return whole.tobytes()
