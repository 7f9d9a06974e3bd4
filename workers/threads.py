"""The threads that torch computes with on a CPU."""

import ctypes
import os
from contextlib import suppress

import torch

from distkv.storage.process_limits import usable_cores
from distkv.workers.errors import ConfigError


def use_threads(num_threads: int | None) -> None:
    """Sets their number in this process: with None torch's own, as far as there are cores for them.

    Raises ConfigError for more than this process may run on cores: they would only wait for each other, and of too many
    the system refuses some.
    """
    cores = len(os.sched_getaffinity(0))
    if num_threads is None:
        num_threads = min(torch.get_num_threads(), usable_cores())
    elif num_threads > cores:
        raise ConfigError(f"num_threads is {num_threads}, and this process may use {cores} cores; use at most {cores}")
    if num_threads != torch.get_num_threads():
        torch.set_num_threads(num_threads)


def release_threads() -> None:
    """Ends those that torch has begun for the calling thread, which goes on to compute nothing large.

    OpenMP keeps threads for each thread that has used any. When there are more of them than cores, they sleep after an
    operation instead of waiting for the next one awake, which nearly doubles the time of a decode step.
    """
    with suppress(AttributeError):  # another runtime than GNU's
        ctypes.CDLL(None).omp_pause_resource_all(_PAUSE_SOFT)


_PAUSE_SOFT = 1  # OpenMP 5.0, section 3.2.44: what is set stays as it is
