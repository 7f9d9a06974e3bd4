"""Has the system bring layers of pages from disk into its memory before they are read, in the order of the reads."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait

from distkv.storage.disk.page_cache import REQUEST_BYTES
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier

AHEAD_BYTES = 2**28  # of the system's memory that is filled ahead of the reads at most, about
LEAST_BYTES = 2**23  # of it that is filled for few pages too: a disk takes longer than the compute of their layer
TASK_BYTES = 2**21  # of the slices that a task looks at


class DiskPrefetch:
    """Of pages whose first layer is read page by page, then the second one, and so on: slice n is of layer `n //
    num_pages`. So the disk has many requests at a time, and works while others compute. It begins with the first slice
    that is found to be on disk alone, and costs next to nothing before. Any thread may call `reach`.

    By itself the system reads ahead in each file, as if all of it came next. Here what comes next is the same layer of
    another page; where memory does not hold all files, what was read ahead is gone when its turn comes, and is read
    again for each layer. So these files must be open with POSIX_FADV_RANDOM, which ends that.
    """

    def __init__(
        self, thread: Executor, is_held: Callable[[int, int], bool], tell: Callable[[int, int, int], None],
        num_pages: int, spec: PageSpec,
    ):  # fmt: skip
        """
        Args:
            thread: one, so that requests stay in order.
            is_held: whether the system has a slice in its memory: `(page, layer)`.
            tell: has the system bring the layers from a first one to before a last one of a page: `(page, first,
                last)`. It runs on the thread.
        """
        slice_bytes = spec.slice_bytes_in(Tier.DISK)
        self._thread, self._is_held, self._tell = thread, is_held, tell
        self._num_pages, self._num_layers = num_pages, spec.num_layers
        # slices behind the one that is read: a layer of them, within the limits
        self._distance = max(1, min(max(num_pages, LEAST_BYTES // slice_bytes), AHEAD_BYTES // slice_bytes))
        self._task = max(1, min(num_pages // 2, self._distance // 2, TASK_BYTES // slice_bytes))
        # layers of a request: as many as a window has, where memory has room for that many of each page
        wanted, room = REQUEST_BYTES * spec.num_kv_heads // slice_bytes, AHEAD_BYTES // (num_pages * slice_bytes)
        self._window = max(1, min(wanted, room, spec.num_layers))
        self._asked = 0  # slices that were asked for, since it has begun
        self._due = 0  # the next slice that `reach` does something at
        self._begun: int | None = None  # with this slice
        self._lock = threading.Lock()
        self._tasks: list[Future[None]] = []
        self._has_ended = False

    def reach(self, number: int) -> None:
        """To be called before a slice is read: those behind it are asked for, as far as memory may be filled."""
        if number < self._due:
            return
        with self._lock:
            if number < self._due:
                return
            layer, page = divmod(number, self._num_pages)
            if self._begun is None:
                if self._is_held(page, layer):
                    self._due = number + self._task
                    return
                self._begun = self._asked = number
            total = self._num_pages * self._num_layers
            end = min(number + 1 + self._distance, total)
            self._tasks.append(self._thread.submit(self._look, range(self._asked, end), self._begun))
            self._asked = end
            self._due = min(end + self._task, total) - 1 - self._distance if end < total else total

    def close(self) -> None:
        """Ends it: the files may be closed then. Raises what `tell` has raised."""
        self._has_ended = True
        waited = [task for task in self._tasks if not task.cancel()]
        wait(waited)
        for task in waited:
            task.result()

    def _look(self, numbers: range, begun: int) -> None:
        for number in numbers:
            if self._has_ended:  # the first task asks for a layer, for which a disk may take long
                return
            layer, page = divmod(number, self._num_pages)
            # windows of different pages begin in different layers, so that each layer brings about as much as any
            phase = (layer + page) % self._window
            if phase == 0 or number < begun + self._num_pages:
                self._tell(page, layer, min(layer + self._window - phase, self._num_layers))
