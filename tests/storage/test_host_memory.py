"""Memory of the host, with a stand-in for the driver that pins it."""

import mmap
import os
from types import SimpleNamespace

import pytest
import torch
from support.processes import run_python

from distkv.errors import CapacityError
from distkv.storage.pools import host_memory
from distkv.storage.pools.host_memory import HostBuffer


class Driver:
    """Takes down what is pinned, and whether it was mapped then; refuses the piece of a number."""

    def __init__(self, refuses: int = -1):
        self.pinned: dict[int, int] = {}
        self.num_calls, self.refuses = 0, refuses

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.num_calls += 1
        if self.num_calls - 1 == self.refuses:
            return 2
        assert flags == host_memory.MAPPED and address % mmap.PAGESIZE == 0
        assert mapped_bytes(address, size) == size, "the driver maps page by page what threads have not"
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        del self.pinned[address]


def mapped_bytes(address: int, size: int) -> int:
    """Of a span of this process's memory."""
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(address // mmap.PAGESIZE * 8)
        entries = pages.read(-(-size // mmap.PAGESIZE) * 8)
    present = sum(entries[index + 7] >> 7 for index in range(0, len(entries), 8))
    return min(present * mmap.PAGESIZE, size)


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> list[int]:
    """Puts the stand-in in the driver's place; what comes back counts how often its error was taken away."""
    forgotten: list[int] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(host_memory, "_forget_error", lambda: forgotten.append(1))
    monkeypatch.setattr(host_memory, "PIN_CHUNK", 2**20)
    monkeypatch.setattr(host_memory, "TOUCH_BYTES", 3 * 2**17)  # pieces begin within and between them
    return forgotten


@pytest.mark.parametrize("row, rows", [(2**18, 21), (3 * 2**12, 700), (2**20 + 2**12, 5), (24, 2**17)])
def test_memory_is_mapped_by_threads_and_pinned_in_pieces_of_whole_rows(
    monkeypatch: pytest.MonkeyPatch, row: int, rows: int
) -> None:
    driver = Driver()
    assert not use(monkeypatch, driver)
    buffer = HostBuffer((rows, row), torch.uint8, pinned=True)
    start, end = buffer.data.data_ptr(), buffer.data.data_ptr() + rows * row
    assert sum(driver.pinned.values()) == rows * row
    assert list(driver.pinned) == list(range(start, end, buffer.piece_rows * row))
    assert (buffer.piece_rows * row) % mmap.PAGESIZE == 0
    assert not buffer.data.any()
    buffer.close()
    buffer.close()
    assert not driver.pinned and buffer.data.untyped_storage().nbytes() == 0


def test_a_refused_pin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor an error that the next launch of a kernel would be blamed for."""
    driver = Driver(refuses=2)
    forgotten = use(monkeypatch, driver)
    with pytest.raises(CapacityError, match=r"4194304 bytes .* cannot be pinned \(CUDA error 2\); lower host_kv_bytes"):
        HostBuffer((16, 2**18), torch.uint8, pinned=True)
    assert not driver.pinned and driver.num_calls == 3 and forgotten == [1]


def test_the_next_launch_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def ones(size: int, device: str) -> None:
        launched.append(device)
        raise RuntimeError("the error of before")

    monkeypatch.setattr(host_memory, "torch", SimpleNamespace(ones=ones))
    host_memory._forget_error()
    assert launched == ["cuda"]


def test_a_forked_process_does_not_hold_what_is_written_later() -> None:
    """Else the system would copy a page that the parent writes to, and a GPU would go on with the old one."""
    assert os.name == "posix"
    run_python(
        "import os, torch\n"
        "from distkv.storage.pools.host_memory import HostBuffer\n"
        "data = HostBuffer((2, 2**20), torch.uint8, pinned=False).data.numpy()\n"  # torch's threads do not live on
        "data[:] = 7\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(1 if data.any() else 0)\n"
        "assert os.waitpid(child, 0)[1] == 0, 'it sees the pages'\n"
        "assert data.min() == 7\n"
    )
