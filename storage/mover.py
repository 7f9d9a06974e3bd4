"""Copies whole pages between the tiers of one rank, beside its steps."""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from distkv.errors import StoreError
from distkv.storage.device_pool import DevicePool
from distkv.storage.host_pool import HostPool
from distkv.storage.page_pool import PagePool
from distkv.storage.tier import Tier, Transfer

if TYPE_CHECKING:
    from distkv.storage.disk_pool import DiskPool

DISK_THREADS = 2


@dataclass(frozen=True)
class Moved:
    """What ended since the last report."""

    done: list[int] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)  # id and reason
    checksums: dict[int, bytes] = field(default_factory=dict)  # of pages written to disk, by id


class _Job(Protocol):
    def done(self) -> bool: ...
    def result(self) -> object: ...


class _CudaJob:
    """A copy on a CUDA stream, done when the event behind it has fired."""

    def __init__(self, stream: torch.cuda.Stream):
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def done(self) -> bool:
        return self._event.query()

    def result(self) -> None:
        self._event.synchronize()


class Mover:
    """Runs transfers asynchronously: on CUDA, copies between host and device on a stream of their own; on a CPU, in a
    thread; to and from disk in threads.

    Copies between device and host are done in the order of their ids, and cannot fail. A device page that is copied
    must not change until its copy is done.
    """

    def __init__(self, device: DevicePool, host: HostPool, disk: "DiskPool | None"):
        self._device, self._host, self._disk = device, host, disk
        self._jobs: dict[int, tuple[Transfer, _Job]] = {}
        self._later: deque[Transfer] = deque()  # those of the disk, until awaited copies have ended
        self._last_id = -1
        self._copier = ThreadPoolExecutor(1, "kv-copy")
        self._disk_threads = ThreadPoolExecutor(DISK_THREADS, "kv-disk")
        self._stream = torch.cuda.Stream(device.data.device) if device.data.is_cuda else None
        self.bytes: Counter[tuple[Tier, Tier]] = Counter()

    def start(self, transfers: list[Transfer], await_ids: list[int]) -> None:
        """Starts transfers and waits for those of `await_ids`.

        Disk reads and writes start after awaited copies have ended, one of which may fill the host page that is
        written. Transfers that were started before are passed over, so that a plan may be sent again.
        """
        for transfer in transfers:
            if transfer.id <= self._last_id:
                continue
            if Tier.DISK in (transfer.source, transfer.target):
                self._later.append(transfer)
            elif self._stream is None:
                self._submit(transfer, self._copier)
            else:
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    self._copy(transfer)()
                self._jobs[transfer.id] = transfer, _CudaJob(self._stream)
            self._last_id = transfer.id
        self._await(await_ids)
        while self._later:  # those of an interrupted call too
            self._submit(self._later[0], self._disk_threads)
            self._later.popleft()
        self._await(await_ids)

    def report(self) -> Moved:
        """What has ended since the last call."""
        moved = Moved()
        for id, (transfer, job) in list(self._jobs.items()):
            if not job.done():
                continue
            del self._jobs[id]
            try:
                job.result()
            except Exception as error:
                if Tier.DISK not in (transfer.source, transfer.target):
                    raise
                reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
                moved.failed.append((id, reason))
                continue
            moved.done.append(id)
            self.bytes[transfer.source, transfer.target] += self._device.spec.page_bytes
            if transfer.target is Tier.DISK:
                assert self._disk is not None
                moved.checksums[id] = self._disk.checksums(transfer.target_slot)
        return moved

    def close(self) -> None:
        """Waits for what is on its way."""
        self._copier.shutdown(cancel_futures=True)
        self._disk_threads.shutdown(cancel_futures=True)
        for _, job in self._jobs.values():
            if isinstance(job, _CudaJob):
                job.result()
        self._jobs.clear()

    def _await(self, ids: list[int]) -> None:
        """Waits for those of the transfers that were started."""
        for id in ids:
            if id in self._jobs:
                _, job = self._jobs[id]
                if isinstance(job, Future):
                    wait([job])
                else:
                    job.result()

    def _submit(self, transfer: Transfer, threads: ThreadPoolExecutor) -> None:
        self._jobs[transfer.id] = transfer, threads.submit(self._copy(transfer))

    def _copy(self, transfer: Transfer) -> Callable[[], None]:
        """The host is one end of every transfer; the other pool does the copying."""
        reads_host = transfer.source is Tier.HOST
        other = transfer.target if reads_host else transfer.source
        pool: PagePool | None = self._device if other is Tier.DEVICE else self._disk
        assert pool is not None
        if reads_host:
            return partial(pool.store, transfer.target_slot, self._host.page(transfer.source_slot))
        return partial(pool.load, transfer.source_slot, self._host.page(transfer.target_slot))
