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

from distkv.kernels.native.build import BuildError
from distkv.kernels.native.library import DTYPES, Library, load_best

log = logging.getLogger(__name__)

CAPACITY = 256 << 10  # bytes that a rank can lay down at a time
_NAME = "distkv-ranks"
_TOKEN_AT, _TOKEN_BYTES = 4096, 16  # where the memory says which it is; see `collectives.hpp` for the rest


class SharedMemory:
    """What the ranks of a group share. Each must make the same calls in the same order."""

    def __init__(self, library: Library, memory: mmap.mmap, rank: int, size: int):
        self._library = library
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))  # keeps the memory mapped
        self._memory = memory
        self._rank, self._size = rank, size

    @classmethod
    def join(cls, store: Store, rank: int, size: int) -> Self | None:
        """Meets the other ranks in the store; None, on all of them, where they do not lie on one machine.

        The memory has no name in a file system: it ends with the last rank, however that ends. On one machine a rank
        that cannot see it is warned of.
        """
        mine, memory, library = "", None, None
        try:
            library = load_best()
            memory = _create(store, library, size) if rank == 0 else _attach(store, library, size)
        except (BuildError, OSError, ValueError) as error:
            mine = str(error) or type(error).__name__
            if rank == 0:
                store.set("shared memory", "")
        store.set(f"shared memory of {rank}", f"{socket.gethostname()}\n{mine}")
        host, _, trouble = _answer(store, 0)
        for other in range(1, size):
            its_host, _, its_trouble = _answer(store, other)
            if its_host == host:
                trouble = trouble or its_trouble
            elif not trouble:
                trouble = f"rank {other} is on {its_host}, rank 0 on {host}"
                log.info("the ranks exchange over sockets: %s", trouble)
                return None
        if trouble:
            log.warning("the ranks of this machine exchange over sockets, which is slow: %s", trouble)
            return None
        assert library is not None and memory is not None
        return cls(library, memory, rank, size)

    def all_reduce(self, x: Tensor) -> None:
        """The sum of x over the ranks, in place, in fp32 and in the order of the ranks; x is contiguous."""
        assert x.is_contiguous()
        self._library.all_reduce(
            DTYPES[x.dtype], self._address, CAPACITY, self._rank, self._size, x.data_ptr(), x.numel(),
            torch.get_num_threads(),
        )  # fmt: skip

    def gather(self, x: Tensor, wanted: bool) -> Tensor | None:
        """What each rank has given as x, `[ranks, *x.shape]`, where it is wanted; shapes and dtypes are alike."""
        x = x.contiguous()
        parts = x.new_empty(self._size, *x.shape) if wanted else None
        self._library.gather(
            self._address, CAPACITY, self._rank, self._size, x.data_ptr(), x.nbytes,
            None if parts is None else parts.data_ptr(),
        )  # fmt: skip
        return parts


def _create(store: Store, library: Library, size: int) -> mmap.mmap:
    """On rank 0: new memory, and where it is found."""
    descriptor = os.memfd_create(_NAME)  # stays open, for the others to find
    os.ftruncate(descriptor, _size_of(library, size))
    memory = mmap.mmap(descriptor, 0)
    token = secrets.token_bytes(_TOKEN_BYTES)
    memory[_TOKEN_AT : _TOKEN_AT + _TOKEN_BYTES] = token
    store.set("shared memory", f"/proc/{os.getpid()}/fd/{descriptor} {token.hex()}")
    return memory


def _attach(store: Store, library: Library, size: int) -> mmap.mmap:
    """On the others: that of rank 0. Raises OSError or ValueError where it is not to be seen."""
    path, _, token = store.get("shared memory").decode().partition(" ")
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise ValueError(f"{path} is another file")
    descriptor = os.open(path, os.O_RDWR)
    try:
        memory = mmap.mmap(descriptor, _size_of(library, size))
    finally:
        os.close(descriptor)
    if memory[_TOKEN_AT : _TOKEN_AT + _TOKEN_BYTES].hex() != token:
        raise ValueError(f"{path} is another group's")
    return memory


def _size_of(library: Library, size: int) -> int:
    if total := library.shared_size(CAPACITY, size):
        return total
    raise ValueError(f"{size} ranks are too many")


def _answer(store: Store, rank: int) -> tuple[str, str, str]:
    return store.get(f"shared memory of {rank}").decode().partition("\n")
