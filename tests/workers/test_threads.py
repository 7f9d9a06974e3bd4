"""How many threads a rank may have."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.ranks import load_rank

from distkv import LLM, ConfigError
from distkv.workers.threads import use_threads


def test_more_threads_than_cores_are_refused(
    tiny_model: Path, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the cores that this process may use, not those of the machine; so many that the system refuses them end
    nothing."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    before = torch.get_num_threads()
    for count in (2, 100_000):
        with pytest.raises(
            ConfigError, match=f"num_threads is {count}, and this process may use 1 cores; use at most 1"
        ):
            LLM(tiny_model, num_threads=count)
    assert torch.get_num_threads() == before
    load_rank(tiny_model, num_threads=1)
    assert torch.get_num_threads() == 1


def test_as_many_threads_as_cores(set_threads: Callable[[int], None]) -> None:
    use_threads(len(os.sched_getaffinity(0)))
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
