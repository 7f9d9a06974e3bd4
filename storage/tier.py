"""The tiers of the cache, places in them, and the copies between them: words that leader and ranks share."""

from enum import IntEnum

import msgspec


class Tier(IntEnum):
    """Where a copy of a page can lie, fastest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Transfer(msgspec.Struct, array_like=True, frozen=True):
    """The copy of a whole page from one tier to a neighbouring one. Ids rise with time."""

    id: int
    source: Tier
    source_slot: int
    target: Tier
    target_slot: int


_DISK = 1 << 40  # more than any tier has slots


def location(tier: Tier, slot: int) -> int:
    """A place as one integer: a device slot is itself; cold places are negative, those on disk below those on the
    host, and neighbouring slots are neighbouring integers."""
    return slot if tier is Tier.DEVICE else -1 - slot - (_DISK if tier is Tier.DISK else 0)


def cold_place(place: int) -> tuple[Tier, int]:
    """The tier and slot of a negative `location`."""
    on_disk, slot = divmod(-1 - place, _DISK)
    return (Tier.DISK if on_disk else Tier.HOST), slot
