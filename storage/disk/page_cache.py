"""The system's memory of files, its page cache: whether it holds a part of one, and what it is asked to bring there.

What is asked is a matter of speed alone: where the system refuses, it reads as it does by itself.
"""

import ctypes
import errno
import mmap
import os
from contextlib import suppress

# The system drops what a request has beyond the disk's own read-ahead, or the largest read that the disk takes. Few
# disks have less of both; and a disk takes little longer for so many bytes than for a part.
REQUEST_BYTES = 2**17

_libc = ctypes.CDLL(None, use_errno=True)


def is_held(descriptor: int, offset: int) -> bool:
    """Whether it holds the page around a byte of an open file; what lies behind the end counts as held. A page that it
    does not hold may be read by being asked about, and is told as held if it came at once. Raises OSError where the
    system does not tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # as tmpfs and overlayfs have it
            raise
        return _is_resident(descriptor, offset)
    return True


def bring(descriptor: int, offset: int, size: int) -> None:
    """Has the system read a part of a file into its memory, without waiting for it. It may reach over the end."""
    with suppress(OSError):
        end = min(offset + size, os.fstat(descriptor).st_size)  # a damaged index tells of any size
        for start in range(_page_of(offset), end, REQUEST_BYTES):
            os.posix_fadvise(descriptor, start, min(REQUEST_BYTES, end - start), os.POSIX_FADV_WILLNEED)


def read_nothing_ahead(descriptor: int) -> None:
    """Has the system read what is asked for in a file, and nothing beyond it."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _is_resident(descriptor: int, offset: int) -> bool:
    """See `is_held`. By mincore(2), which takes longer."""
    try:
        # private and open to writes, since ctypes tells no address of memory that is not
        memory = mmap.mmap(descriptor, 1, mmap.MAP_PRIVATE, offset=_page_of(offset))
    except ValueError:  # behind the end
        return True
    found = ctypes.c_ubyte()
    with memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), ctypes.byref(found)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    return bool(found.value & 1)


def _page_of(offset: int) -> int:
    """Where the system's page around a byte begins."""
    return offset // mmap.PAGESIZE * mmap.PAGESIZE
