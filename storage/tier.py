"""The tiers of the cache, locations in them, and the copies between them: words that leader and ranks share."""

from enum import IntEnum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np


class Tier(IntEnum):
    """Where a copy of a page can lie, fastest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2


ALL_TIERS = DEVICE, HOST, DISK = tuple(Tier)


class Transfer(msgspec.Struct, array_like=True, frozen=True):
    """The copy of a whole page from one tier to a neighbouring one. Ids rise with time."""

    id: int
    source: Tier
    source_slot: int
    target: Tier
    target_slot: int

    @property
    def route(self) -> str:
        """See `route_name`."""
        return route_name(self.source, self.target)


def route_name(source: Tier, target: Tier) -> str:
    """The way of whole pages from one tier to another."""
    return f"{source.name}_to_{target.name}".lower()


_DISK_OFFSET = 1 << 40  # more than any tier has slots


def encode_location(tier: Tier, slot: int) -> int:
    """A slot of a tier as one integer, the location: that of a device slot is the slot; cold ones are negative, those
    on disk below those on the host, and neighbouring slots have neighbouring locations."""
    return slot if tier is DEVICE else -1 - slot - (_DISK_OFFSET if tier is DISK else 0)


def decode_location(location: int) -> tuple[Tier, int]:
    """The tier and slot of a location."""
    if location >= 0:
        return DEVICE, location
    on_disk, slot = divmod(-1 - location, _DISK_OFFSET)
    return (DISK if on_disk else HOST), slot


def decode_locations(cold: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """The same of many that are below the device: whether each is on disk, and its slot."""
    numbers = -1 - cold
    on_disk = numbers >= _DISK_OFFSET
    return on_disk, numbers - _DISK_OFFSET * on_disk
