"""Engines of any shape, small enough that everything moves, and what befalls them."""

from dataclasses import dataclass
from random import Random

import msgspec
from simulation.disk import Disk
from simulation.rank import SimulatedRank
from simulation.world import Process, World

from distkv.engine.protocol import EngineInfo
from distkv.speculative_config import SpeculativeConfig
from distkv.storage.paging import pages_for
from distkv.workers.attention.policies.registry import FULL

VOCAB = 40


@dataclass(frozen=True)
class Faults:
    """How often something goes wrong, in a chance at each opportunity."""

    kills: float = 0.0  # a process, per step of the driver
    damage: float = 0.0  # to a file of the disk, per step
    disk: float = 0.0  # the disk becomes full, slow or unreliable, or well again, per step
    catalogue: float = 0.0  # it is locked, or free again, per step
    broken_catalogue: float = 0.0  # it is damaged while nobody has it open, per restart
    steps: float = 0.0  # an exception in a step
    device: float = 0.0  # the device fails
    hangs: float = 0.0  # a rank does not go on any more, per step
    drains: float = 0.0  # Ray says that a node goes, per step
    room: float = 0.0  # the cluster has no room for an engine, or has some again


CALM = Faults()


def any_faults(rng: Random) -> Faults:
    """A third of all worlds is calm, and most others have some of the faults only, so that these do not hide each
    other."""
    if rng.random() < 1 / 3:
        return CALM
    rates = {
        "kills": 0.02, "damage": 0.02, "disk": 0.02, "catalogue": 0.02, "broken_catalogue": 0.3, "steps": 0.02,
        "device": 0.002, "hangs": 0.002, "room": 0.01,
        "drains": 0.005,
    }  # fmt: skip
    return Faults(**{name: rate * rng.choice([0.3, 1, 3]) for name, rate in rates.items() if rng.random() < 0.4})


def any_info(rng: Random, folder: str) -> EngineInfo:
    """The options of an engine, with which `pool_sizes` would let it start."""
    page_size = rng.choice([2, 3, 4, 4, 8])
    max_num_seqs = rng.choice([1, 2, 3, 5, 8])
    max_model_len = rng.choice([20, 40, 60, 90])
    budget = max(max_num_seqs, rng.choice([1, 3, 8, 13, 24, 40]))
    least = pages_for(min(budget, max_model_len), page_size) + 1
    whole = pages_for(max_model_len, page_size)
    device = rng.choice([least, least, least + 1, least + 3, least + whole, max(least, whole), 3 * whole + least])
    host = rng.choice([0, 1, 2, 3, 5, 10, whole, 3 * whole])
    disk = rng.choice([0, 1, 3, 10, 30, 2 * whole, 5 * whole]) if host else 0
    caching = rng.random() < 0.8
    num_observed = rng.choice([0, 0, 1, 7, 30])
    return EngineInfo(
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, page_size=page_size,
        num_pages=device, num_host_pages=host, num_disk_pages=disk, page_bytes=10, pool_bytes=1, kv_bytes_per_token=1,
        vocab_size=VOCAB, eos_token_ids=(2,), seed=0, cache_dir=folder if disk else None,
        fingerprint="simulated" if caching and disk else "", enable_prefix_caching=caching,
        write_through=rng.random() < 0.6, max_cold_bytes_per_step=rng.choice([0, 0, 20, 50, 200]),
        disk_cost=rng.choice([1.0, 3.0]), save_timeout=rng.choice([None, None, 0.5]),
        num_observed=num_observed, attention_policy="decay(share=0.1)" if num_observed else FULL,
        kv_cache_dtype="int8",
    )  # fmt: skip


def with_drafts(info: EngineInfo, rng: Random) -> EngineInfo:
    """The same with drafts, where it may have them, and with codes or not."""
    if info.max_num_seqs < 2 or info.num_observed:
        return info
    most = rng.randint(1, info.max_num_seqs - 1)
    is_adaptive, dtype = rng.random() < 0.3, rng.choice(["auto", "int8"])
    drafts = SpeculativeConfig(method=rng.choice(["ngram", "self"]), num_speculative_tokens=most, adaptive=is_adaptive)
    return msgspec.structs.replace(info, speculation=drafts, kv_cache_dtype=dtype)


def without_tiers(info: EngineInfo) -> EngineInfo:
    """The same with no room but on the device, of which requests have to give some up where they are longer than is
    guessed."""
    return msgspec.structs.replace(info, num_host_pages=0, num_disk_pages=0, cache_dir=None, fingerprint="")


def make_ranks(
    world: World, process: Process, info: EngineInfo, disk: Disk, num_heads: int, num_ranks: int
) -> list[SimulatedRank]:
    """The ranks of a group. With more ranks than heads, neighbours share one."""
    ranks = []
    for number in range(num_ranks):
        if num_ranks <= num_heads:
            heads = range(num_heads * number // num_ranks, num_heads * (number + 1) // num_ranks)
        else:
            head = number * num_heads // num_ranks
            heads = range(head, head + 1)
        is_first = not any(heads == one.heads for one in ranks)
        ranks.append(SimulatedRank(world, process, info, disk, heads, num_heads, is_first, is_first))
    return ranks
