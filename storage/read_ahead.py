"""Reads layer slices from disk ahead of need, in threads, into a ring of host memory."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from torch import Tensor

from distkv.errors import StoreError
from distkv.storage.host_memory import HostBuffer
from distkv.storage.page_spec import PageSpec

if TYPE_CHECKING:
    from distkv.storage.disk_pool import DiskPool, OpenPages

READ_THREADS = 4
READ_BYTES = 2**21  # of the slices that one task reads: fewer tasks leave the interpreter to those who compute


class ReadAhead:
    """Memory for `num_slices` layer slices `[2, kv_head, page_size, head_dim]`, and the threads that fill it."""

    def __init__(self, spec: PageSpec, num_slices: int, disk: "DiskPool", pinned: bool):
        self.spec = spec
        self.buffer = HostBuffer((num_slices, *spec.slice_shape), spec.dtype, pinned)
        self.parts = [disk.parts(layer_slice) for layer_slice in self.buffer.data]
        self.threads = ThreadPoolExecutor(READ_THREADS, "kv-read")

    def begin(self, pages: "OpenPages", num_pages: int, longest: int) -> "Reads":
        """Starts reading the slices of layer 0 of all pages in order, then those of layer 1, and so on.

        Args:
            longest: slices that are held at a time before any is freed.
        """
        return Reads(self, pages, num_pages, longest)

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.parts = []
        self.buffer.close()


class Reads:
    """The slices of one step, numbered in the order of reading: number n is of layer `n // num_pages`."""

    def __init__(self, memory: ReadAhead, pages: "OpenPages", num_pages: int, longest: int):
        self._memory = memory
        self._pages, self._num_pages = pages, num_pages
        self._size = len(memory.buffer.data)
        assert longest <= self._size
        wanted = max(1, READ_BYTES // memory.spec.layer_slice_bytes)
        self._group = max(1, min(wanted, self._size // 4, self._size - longest + 1))  # slices of one task
        self._total = memory.spec.num_layers * num_pages
        self._freed = 0
        self._tasks: dict[int, Future[dict[int, StoreError]]] = {}  # by first number
        self._next = 0
        self._start()

    def is_started(self, number: int) -> bool:
        """Whether a slice has its memory; else others must be freed first."""
        return number < self._next

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
        return self._memory.buffer.data[number % self._size]

    def free(self, before: int) -> None:
        """Gives up the memory of all slices with lower numbers, and reads on."""
        for first in [first for first in self._tasks if first + self._group <= before]:
            del self._tasks[first]
        self._freed = before
        self._start()

    def close(self) -> None:
        """Waits for reads on their way, which a step that failed leaves behind."""
        for task in self._tasks.values():
            task.cancel()
        wait([task for task in self._tasks.values() if not task.cancelled()])

    def _start(self) -> None:
        while self._next < self._total and self._next + self._group <= self._freed + self._size:
            last = min(self._next + self._group, self._total)
            self._tasks[self._next] = self._memory.threads.submit(self._read, range(self._next, last))
            self._next = last

    def _read(self, numbers: range) -> dict[int, StoreError]:
        """Reads slices; returns those that cannot be read back, with the reason."""
        errors = {}
        for number in numbers:
            layer, index = divmod(number, self._num_pages)
            try:
                self._pages.read(index, layer, self._memory.parts[number % self._size])
            except StoreError as error:
                errors[number] = error
        return errors
