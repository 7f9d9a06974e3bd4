"""The threads that torch computes with on a CPU."""

import os

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
