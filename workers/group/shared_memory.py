"""Memory that the CPU ranks of one machine share, for collectives of a few microseconds: those of a decode step over
sockets take several times as long as what the ranks compute between them."""

import ctypes
import logging
import mmap
import os
import secrets
import socket
from typing import Self

import torch
from torch import Tensor
from torch.distributed import Store

from distkv.kernels.native.library import DTYPES, Library, load_best

log = logging.getLogger(__name__)

CAPACITY = 256 << 10  # bytes that a rank can lay down at a time
_NAME = "distkv-ranks"
_PLACE = "shared memory"  # in the store
_SIZES_DIFFER = -2
_TOKEN_AT, _TOKEN_BYTES = 4096, 16  # where the memory says which it is; see `collectives.hpp` for the rest


class SharedMemory:
    """What the ranks of a group share. Each must make the same calls in the same order."""

    def __init__(self, library: Library, memory: mmap.mmap, rank: int, size: int):
        self._library = library
        self._start = ctypes.c_char.from_buffer(memory)  # which keeps the memory mapped
        self._address = ctypes.addressof(self._start)
        self._rank, self._size = rank, size

    @classmethod
    def join(cls, store: Store, rank: int, size: int) -> Self | None:
        """Meets the other ranks in the store; None, on all of them, where they do not lie on one machine.

        The memory has no name in a file system: it ends with the last rank, however that ends. On one machine a rank
        that cannot see it is warned of.
        """
        descriptor, memory, library, trouble = -1, None, None, ""
        try:
            library = load_best()
            num_bytes = library.shared_size(CAPACITY, size)
            if not num_bytes:
                raise ValueError(f"{size} ranks are too many")
            if rank == 0:
                descriptor = os.memfd_create(_NAME)  # stays open until the others have found it
                memory = _create(store, descriptor, num_bytes)
            else:
                memory = _attach(store, num_bytes)
        except Exception as error:  # whatever it is, the others wait for an answer
            trouble = str(error) or type(error).__name__
            if rank == 0:
                store.set(_PLACE, "")
        try:
            store.set(f"{_PLACE} of {rank}", f"{socket.gethostname()}\n{trouble}")
            reason, is_expected = _verdict([_answer(store, other) for other in range(size)])
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if reason:
            log.log(logging.INFO if is_expected else logging.WARNING, "%s", reason)
            return None
        assert library is not None and memory is not None
        return cls(library, memory, rank, size)

    def all_reduce(self, x: Tensor) -> None:
        """The sum of x over the ranks, in place, in fp32 and in the order of the ranks; x is contiguous. Raises
        RuntimeError, as `gather` does, when a rank is gone or has given another number of bytes."""
        assert x.is_contiguous()
        end = self._library.all_reduce(
            DTYPES[x.dtype], self._address, CAPACITY, self._rank, self._size, x.data_ptr(), x.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
        _check(end)

    def gather(self, x: Tensor, wanted: bool) -> Tensor | None:
        """What each rank has given as x, `[ranks, *x.shape]`, where it is wanted; shapes and dtypes are alike."""
        x = x.contiguous()
        parts = x.new_empty(self._size, *x.shape) if wanted else None
        self._read(x, 0, x.nbytes if wanted else 0, parts)
        return parts

    def exchange(self, x: Tensor, sizes: list[int], out: Tensor) -> None:
        """Gives each rank its own part of x, which has so many elements for each, one part after the other, and writes
        what each rank has for this one into `out [ranks, sizes[rank]]`; both are contiguous, and dtypes are alike."""
        assert x.is_contiguous() and out.is_contiguous() and len(x) == sum(sizes) and out.dtype == x.dtype
        first = sum(sizes[: self._rank]) * x.itemsize
        self._read(x, first, first + sizes[self._rank] * x.itemsize, out)

    def _read(self, x: Tensor, first: int, last: int, out: Tensor | None) -> None:
        """Lays x down, and reads bytes `first` to `last` of what each rank has."""
        end = self._library.gather(
            self._address, CAPACITY, self._rank, self._size, x.data_ptr(), x.nbytes, first, last,
            None if out is None else out.data_ptr(),
        )  # fmt: skip
        _check(end)


def _check(end: int) -> None:
    """Raises RuntimeError for what a function of `collectives.hpp` tells."""
    if end >= 0:
        raise RuntimeError(f"the process of rank {end} is gone")
    if end == _SIZES_DIFFER:
        raise RuntimeError("ranks gave different numbers of bytes to one collective")


def _create(store: Store, descriptor: int, num_bytes: int) -> mmap.mmap:
    """On rank 0: new memory, and where it is found."""
    os.ftruncate(descriptor, num_bytes)
    memory = mmap.mmap(descriptor, num_bytes)
    token = secrets.token_bytes(_TOKEN_BYTES)
    memory[_TOKEN_AT : _TOKEN_AT + _TOKEN_BYTES] = token
    store.set(_PLACE, f"/proc/{os.getpid()}/fd/{descriptor} {token.hex()}")
    return memory


def _attach(store: Store, num_bytes: int) -> mmap.mmap:
    """On the others: that of rank 0. Raises OSError or ValueError where it is not to be seen."""
    path, _, token = store.get(_PLACE).decode().partition(" ")
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise ValueError(f"{path} is another file")
    descriptor = os.open(path, os.O_RDWR)
    try:
        memory = mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    if memory[_TOKEN_AT : _TOKEN_AT + _TOKEN_BYTES].hex() != token:
        raise ValueError(f"{path} is another group's")
    return memory


def _answer(store: Store, rank: int) -> tuple[str, str]:
    """A rank's host, and its trouble with the memory if it has any."""
    host, _, trouble = store.get(f"{_PLACE} of {rank}").decode().partition("\n")
    return host, trouble


def _verdict(answers: list[tuple[str, str]]) -> tuple[str, bool]:
    """Why ranks cannot share memory, and whether that is to be expected; an empty text where they can."""
    hosts = dict.fromkeys(host for host, _ in answers)
    troubles = [trouble for _, trouble in answers if trouble]
    if not troubles:
        return "", True
    if len(hosts) > 1:
        return f"the ranks exchange over sockets: they lie on {', '.join(hosts)}", True
    return f"the ranks of this machine exchange over sockets, which is slow: {troubles[0]}", False
