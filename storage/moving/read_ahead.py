"""Reads layer slices from disk ahead of need, in threads, into a ring of pinned host memory that copies go out of.

The memory is one ring over all steps: a slice takes the memory of one that was copied before, and the thread that reads
it waits until that copy has ended. Whoever takes slices in order never waits for the device, only for the disk.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from torch import Tensor

from distkv.storage.dtypes import torch_dtype
from distkv.storage.errors import StoreError
from distkv.storage.moving.streams import Event
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.host_memory import HostBuffer
from distkv.storage.tier import Tier

if TYPE_CHECKING:
    from distkv.storage.pools.disk_pool import DiskPool
    from distkv.storage.pools.open_pages import OpenPages

READ_THREADS = 4
READ_BYTES = 2**21  # of the slices that one task reads: fewer tasks leave the interpreter to those who compute


class ReadAhead:
    """Memory for `num_slices` layer slices `[2, kv_head, page_size, head_dim]`, and the threads that fill it.

    Slices are numbered over all steps; number n lies at index `n % num_slices`.
    """

    def __init__(self, spec: PageSpec, num_slices: int, disk: "DiskPool", pinned: bool):
        self.spec, self.num_slices = spec, num_slices
        self.buffer = HostBuffer((num_slices, *spec.stored_slice_shape), torch_dtype(spec.stored_dtype), pinned)
        self.parts = [disk.parts(layer_slice) for layer_slice in self.buffer.data]
        self.threads = ThreadPoolExecutor(READ_THREADS, "kv-read")
        self.freed = 0  # slices below may be overwritten once they are copied
        self._copied: deque[tuple[int, Event]] = deque()  # slices below the number are copied when the event happens
        self._covered = 0  # slices below need no event any more, or that of `_copied[0]`

    def begin(self, pages: "OpenPages", num_pages: int, longest: int) -> "Reads":
        """Starts reading the slices of layer 0 of all pages in order, then those of layer 1, and so on. What was begun
        before must be closed.

        Args:
            longest: slices that are held at a time before any is freed.
        """
        return Reads(self, pages, num_pages, longest)

    def free(self, before: int, copied: Event) -> None:
        """Gives up all slices of lower numbers, which have been copied when the event happens."""
        self.freed = before
        self._copied.append((before, copied))

    def copied(self, before: int) -> Event | None:
        """After which the memory may be overwritten of all slices of lower numbers, which are freed; `before` rises
        from call to call."""
        while self._copied and self._copied[0][0] < before:
            self._covered = self._copied.popleft()[0]  # copies end in order
        return self._copied[0][1] if before > self._covered else None

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.parts = []
        self.buffer.close()


class Reads:
    """The slices of one step, numbered in the order of reading: number n is of layer `n // num_pages`."""

    def __init__(self, memory: ReadAhead, pages: "OpenPages", num_pages: int, longest: int):
        self._memory = memory
        self._pages, self._num_pages = pages, num_pages
        self._first = memory.freed  # number of the first slice in the memory's own count
        size = memory.num_slices
        assert longest <= size
        wanted = max(1, READ_BYTES // memory.spec.slice_bytes_in(Tier.DISK))
        # slices of one task; few enough that `longest` of them are on their way when all before are freed
        self._group = max(1, min(wanted, size // 4, size - longest + 1))
        self._total = memory.spec.num_layers * num_pages
        self._tasks: dict[int, Future[dict[int, StoreError]]] = {}  # by first number
        self._next = 0
        self._start()

    def is_read(self, number: int) -> bool:
        """Whether `get` would not wait."""
        first = number // self._group * self._group
        return first in self._tasks and self._tasks[first].done()

    def get(self, number: int) -> Tensor:
        """A slice in memory, until `free`; raises StoreError when it cannot be read back."""
        first = number // self._group * self._group
        errors = self._tasks[first].result()
        if number in errors:
            raise errors[number]
        return self._memory.buffer.data[(self._first + number) % self._memory.num_slices]

    def free(self, before: int, copied: Event) -> None:
        """Gives up all slices with lower numbers, which have been copied when the event happens, and reads on."""
        for first in [first for first in self._tasks if first + self._group <= before]:
            del self._tasks[first]
        self._memory.free(self._first + before, copied)
        self._start()

    def close(self, copied: Event) -> None:
        """Ends the reads, also for a step that has failed: waits for those that run, and gives up all slices, of which
        none is copied from any more when the event happens."""
        for task in self._tasks.values():
            task.cancel()
        wait([task for task in self._tasks.values() if not task.cancelled()])
        self._memory.free(self._first + self._next, copied)
        self._tasks.clear()

    def _start(self) -> None:
        memory = self._memory
        while self._next < self._total and self._first + self._next + self._group <= memory.freed + memory.num_slices:
            last = min(self._next + self._group, self._total)
            before = memory.copied(self._first + last - memory.num_slices)
            self._tasks[self._next] = memory.threads.submit(self._read, range(self._next, last), before)
            self._next = last

    def _read(self, numbers: range, before: Event | None) -> dict[int, StoreError]:
        """Reads slices; returns those that cannot be read back, with the reason."""
        if before is not None:
            before.synchronize()
        errors = {}
        for number in numbers:
            layer, index = divmod(number, self._num_pages)
            try:
                self._pages.read(index, layer, self._memory.parts[(self._first + number) % self._memory.num_slices])
            except StoreError as error:
                errors[number] = error
        return errors
