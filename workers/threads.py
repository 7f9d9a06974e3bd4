"""The threads that torch computes with on a CPU."""

import os

import torch

from distkv.workers.errors import ConfigError


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def use_threads(num_threads: int) -> None:
    """Sets their number in this process; raises ConfigError for more than it may use cores, which would only wait for
    each other, and of which the system refuses the most."""
    cores = usable_cores()
    if num_threads > cores:
        raise ConfigError(f"num_threads is {num_threads}, and this process may use {cores} cores; use at most {cores}")
    torch.set_num_threads(num_threads)
