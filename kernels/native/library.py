"""The native kernels as Python calls them: a library is loaded once, and its functions take addresses and sizes."""

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from distkv.kernels.native.build import BuildError, find_or_build
from distkv.kernels.native.instruction_sets import INSTRUCTION_SETS, InstructionSet

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Their numbers in `kernels.cpp`."""

_INT, _SIZE, _ADDRESS, _FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
# by function, its arguments as `kernels.cpp` declares them
_ARGUMENTS = {
    "start": [],
    "packed_size": [_INT, _SIZE, _SIZE, _INT],
    "pack_weight": [_INT, _ADDRESS, _SIZE, _SIZE, _INT, _ADDRESS, _INT],
    "linear": [_INT, _ADDRESS, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _SIZE, _SIZE, _INT, _ADDRESS, _INT],
    "rms_norm": [_INT, _ADDRESS, _ADDRESS, _ADDRESS, _FLOAT, _SIZE, _SIZE, _ADDRESS, _INT],
    "rope_and_write": [_INT, _ADDRESS, *[_SIZE] * 5, *[_ADDRESS] * 3, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _INT],
    "attention": [
        _INT, _ADDRESS, *[_SIZE] * 5, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _INT, _SIZE, *[_ADDRESS] * 3, _SIZE, _SIZE,
        _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _INT,
    ],
    "page_states": [
        _INT, _ADDRESS, *[_SIZE] * 5, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _INT, _SIZE, *[_ADDRESS] * 2, _SIZE, _ADDRESS,
        _INT,
    ],
    "merge_page_states": [_INT, _ADDRESS, _SIZE, _SIZE, *[_ADDRESS] * 3, _SIZE, _ADDRESS, _INT],
    "expected_weights": [
        _INT, _ADDRESS, *[_SIZE] * 4, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _FLOAT, _ADDRESS, _ADDRESS, _INT,
    ],
    "page_weights": [_ADDRESS, _ADDRESS, *[_SIZE] * 3, _ADDRESS, _INT],
    "encode_page": [_INT, _INT, _ADDRESS, *[_SIZE] * 6, _ADDRESS],
    "decode_page": [_INT, _INT, _ADDRESS, *[_SIZE] * 6, _ADDRESS],
    "round_pages": [_INT, _INT, _ADDRESS, *[_SIZE] * 5, _ADDRESS, _SIZE, _ADDRESS, _INT],
    "shared_size": [_SIZE, _INT],
    "all_reduce": [_INT, _ADDRESS, _SIZE, _INT, _INT, _ADDRESS, _SIZE, _INT],
    "gather": [_ADDRESS, _SIZE, _INT, _INT, _ADDRESS, *[_SIZE] * 3, _ADDRESS],
}  # fmt: skip

_TELLING = ("start", "all_reduce", "gather")  # which return how they have ended


@dataclass(frozen=True)
class Library:
    """The functions of `kernels.cpp` for one instruction set."""

    instruction_set: str
    packed_size: Callable[..., int]
    pack_weight: Callable[..., None]
    linear: Callable[..., None]
    rms_norm: Callable[..., None]
    rope_and_write: Callable[..., None]
    attention: Callable[..., None]
    page_states: Callable[..., None]
    merge_page_states: Callable[..., None]
    expected_weights: Callable[..., None]
    page_weights: Callable[..., None]
    encode_page: Callable[..., None]
    decode_page: Callable[..., None]
    round_pages: Callable[..., None]
    shared_size: Callable[..., int]
    all_reduce: Callable[..., int]
    gather: Callable[..., int]


@cache
def load(instruction_set: InstructionSet) -> Library:
    """Loads the library of an instruction set that this machine has. Raises BuildError when there is none and it cannot
    be built, or the system withholds what it needs."""
    path = find_or_build(instruction_set.name, instruction_set.flags)
    try:
        loaded = ctypes.CDLL(str(path))  # after torch, whose OpenMP runtime it finds in the process
    except OSError as error:
        raise BuildError(f"{error}; set XDG_CACHE_HOME to a folder whose files may be loaded") from error
    functions: dict[str, Any] = {}
    for name, arguments in _ARGUMENTS.items():
        function = functions[name] = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = _SIZE if name.endswith("_size") else _INT if name in _TELLING else None
    if functions.pop("start")():
        raise BuildError(f"the system does not let this process use {instruction_set.name}")
    return Library(instruction_set.name, **functions)


def load_best() -> Library:
    """The library for the best instruction set of this machine whose library can be had. Raises BuildError when there
    is none."""
    here = [one for one in INSTRUCTION_SETS if one.is_here]
    if not here:
        names = ", ".join(one.name for one in INSTRUCTION_SETS)
        raise BuildError(f"this processor has none of the instruction sets {names}")
    trouble: BuildError | None = None  # with the best one
    for one in here:
        try:
            library = load(one)
        except BuildError as error:
            trouble = trouble or error
            continue
        if trouble is not None:
            log.warning("the native CPU kernels for %s cannot be used: %s", here[0].name, trouble)
        return library
    assert trouble is not None
    raise trouble
