"""The links between stages."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.thread_group import communicators

from distkv.workers.model.layout import Layout


@pytest.mark.parametrize("num_stages", [2, 3])
def test_links_are_tried_out_once_around(num_stages: int) -> None:
    """And nothing of that is left for the first step to receive."""
    device = torch.device("cpu")

    def work(rank: int) -> float:
        link = peers[rank].link
        assert link is not None
        link.try_out(device, rank == 0)
        if rank == 0:
            link.send(torch.full((2,), 7.0))
        x = link.receive((2,), torch.float32, device)
        if rank:
            link.send(x + 1)
        return float(x.sum())

    peers = communicators(Layout(1, num_stages))
    with ThreadPoolExecutor(num_stages) as threads:
        found = list(threads.map(work, range(num_stages)))
    assert found == [2 * (7 + num_stages - 1), *(2 * (7 + stage) for stage in range(num_stages - 1))]
