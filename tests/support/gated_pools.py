"""Pools whose copies wait until a test lets them go on."""

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.pools.open_pages import OpenPages, Parts

WAIT = 30  # seconds until a thread that hangs fails its test


class GatedDevice(DevicePool):
    """Copies wait while `gate` is closed; at first it is open."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()

    def load(self, slot: int, page: Tensor) -> None:
        assert self.gate.wait(WAIT)
        super().load(slot, page)

    def store(self, slot: int, page: Tensor) -> None:
        assert self.gate.wait(WAIT)
        super().store(slot, page)


class GatedDisk(DiskPool):
    """Writes, and reads of layers, wait while `gate` is closed; at first it is open. Writes to the slots in `refused`
    fail."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()
        self.refused: set[int] = set()
        self.begun = threading.Semaphore(0)  # has one for each read

    def store(self, slot: int, page: Tensor) -> None:
        assert self.gate.wait(WAIT)
        if slot in self.refused:
            raise StoreError(f"no room for slot {slot}")
        super().store(slot, page)

    def open(self, slots: Sequence[int]) -> OpenPages:
        return GatedPages(self, slots)


class GatedPages(OpenPages):
    def __init__(self, pool: GatedDisk, slots: Sequence[int]):
        super().__init__(pool, slots)
        self.pool = pool

    def read(self, index: int, layer: int, parts: Parts) -> None:
        self.pool.begun.release()
        assert self.pool.gate.wait(WAIT)
        super().read(index, layer, parts)
