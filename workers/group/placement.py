"""The bundles of a Ray cluster that ranks run in: for how long they are waited for, and when fewer will do."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from distkv.workers.errors import CapacityError

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT = 60.0  # seconds to wait for resources that others hold
PLACEMENT_REMARK = 10.0  # after which it is said that they are waited for
CHECK_SECONDS = 1.0  # after which a wait looks whether it is still wanted
FEWER_AGAIN = 5.0  # seconds after which fewer bundles that have found no room either become fewer still


@dataclass(frozen=True)
class Fewer:
    """When a group may have fewer ranks than it was asked for."""

    sizes: tuple[int, ...]  # numbers of ranks that will do, in rising order
    after: float  # seconds for which the asked number has found no room


@dataclass(frozen=True)
class Placed:
    """A placement group that has its bundles."""

    group: Any
    size: int  # ranks
    ranks_per_bundle: int

    def bundle(self, rank: int) -> int:
        """The index of that of a rank."""
        return rank // self.ranks_per_bundle


def place(kind: str, size: int, fewer: Fewer | None, check: Callable[[], None], num_stages: int = 1) -> Placed:
    """Takes room on the cluster for `size` ranks, unless there may be fewer.

    Ranks of one stage lie on one node where one has the room, each in a bundle of its own. Of a pipeline each stage has
    a bundle, and so lies on one node, and stages are spread over nodes, as far as there are some; where no nodes have
    room for whole stages, ranks are packed on as few nodes as will do.

    Args:
        kind: the resource that a rank takes one of.
        num_stages: of `size` ranks in all.
        check: called every now and then; what it raises ends the wait, and nothing is taken.

    Raises CapacityError when the cluster has not so many, or others do not free them in time.
    """
    sizes, fewer_at = ((size,), math.inf) if fewer is None else (fewer.sizes, fewer.after)
    least = sizes[0]
    if num_offered(kind) < least:
        raise _lacks(kind, size, least, num_stages)
    count, group, together, is_told = size, None, 1, False
    start = time.monotonic()
    try:
        while True:
            if group is None and num_offered(kind) >= count:
                together = _ranks_per_bundle(kind, count, num_stages)
                strategy = "PACK" if together == 1 and num_stages < count else "SPREAD"
                group = placement_group([{kind: together}] * (count // together), strategy=strategy)
            if _is_placed(group):
                return Placed(group, count, together)
            check()
            waited = time.monotonic() - start
            if waited >= fewer_at:
                fewer_at += FEWER_AGAIN
                most = min(count - 1, _num_free(kind))
                fitting = [one for one in sizes if one <= most]
                if fitting:
                    _remove(group)
                    count, group = fitting[-1], None
            if waited >= PLACEMENT_TIMEOUT:
                each = f", {together} on a node for each stage," if together > 1 else ""
                raise CapacityError(
                    f"{size} {kind}s{each} were not free within {PLACEMENT_TIMEOUT:.0f} s, {_num_free(kind)} are now; "
                    "end what holds them or use fewer ranks"
                )
            if waited >= PLACEMENT_REMARK and not is_told:
                is_told = True
                log.warning(
                    "waiting for %d free %ss of the cluster, %d are free now; this gives up after %.0f s",
                    size, kind, _num_free(kind), PLACEMENT_TIMEOUT,
                )  # fmt: skip
    except BaseException:
        _remove(group)
        raise


def _ranks_per_bundle(kind: str, size: int, num_stages: int) -> int:
    """All ranks of a stage where nodes have room for each stage as a whole, else one."""
    of_stage = size // num_stages
    if num_stages > 1 and sum(offered // of_stage for offered in _offered(kind)) >= num_stages:
        return of_stage
    return 1


def num_offered(kind: str) -> int:
    """Bundles that the nodes of the cluster have, free or not."""
    return sum(_offered(kind))


def _offered(kind: str) -> list[int]:
    """The same by node."""
    return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]


def _num_free(kind: str) -> int:
    return int(ray.available_resources().get(kind, 0))


def _is_placed(group: Any) -> bool:
    """Whether there is one that has its bundles; waits a moment for that."""
    if group is None:
        time.sleep(CHECK_SECONDS)
        return False
    return bool(group.wait(CHECK_SECONDS))


def _remove(group: Any) -> None:
    if group is not None:
        remove_placement_group(group)


def _lacks(kind: str, size: int, least: int, num_stages: int) -> CapacityError:
    needed = size if least == size else f"{least} at least, of {size},"
    layout = f"tensor_parallel_size {size // num_stages}"
    if num_stages > 1:
        layout = f"pipeline_parallel_size {num_stages} times {layout}"
    return CapacityError(
        f"{layout} needs {needed} {kind}s and the cluster has {num_offered(kind)}; "
        f"use fewer ranks, or add nodes (`ray start --num-{kind.lower()}s=N` says how many a node offers)"
    )
