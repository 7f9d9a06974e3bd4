"""The system's page cache, as tests see it and bend it."""

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


def forget(file: Path) -> None:
    """Has the system write a file and drop it from its memory."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def is_held(file: Path, offset: int) -> bool:
    """Whether the system has the page around a byte of a file in its memory."""
    content = np.memmap(file, mode="c")  # private, so that its address is to be had
    found = ctypes.c_ubyte()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(content.ctypes.data + offset), ctypes.c_size_t(1), ctypes.byref(found)) == 0
    return bool(found.value & 1)


def tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As file systems that know nothing of RWF_NOWAIT."""
    preadv = os.preadv

    def refuse(descriptor: int, buffers: Sequence[bytearray], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", refuse)


def refuse_fadvise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels without it, and some sandboxes."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "posix_fadvise", refuse)
