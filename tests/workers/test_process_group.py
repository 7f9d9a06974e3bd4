"""Where the ranks of a group find each other."""

import socket

import pytest
from support.processes import read_line, start_python

from distkv.workers.group.process_group import open_store


def test_a_store_keeps_the_port_that_it_has_told() -> None:
    """Else another process may take it before the ranks come. No other address of the machine leads to it."""
    store = open_store("127.0.0.1")
    with pytest.raises(ConnectionRefusedError), socket.socket() as elsewhere:
        elsewhere.connect(("127.0.0.2", store.port))
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("0.0.0.0", store.port))
    joined = open_store("127.0.0.1", store.port)
    store.set("key", "value")
    assert joined.get("key") == b"value"


JOIN = """
import sys
import torch
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.process_group import open_store
from distkv.workers.group.shared_memory import SharedMemory
from distkv.workers.model.layout import Layout

SharedMemory.join = classmethod(lambda *_: None)  # as where ranks lie on several machines
rank = len(sys.argv) - 1
store = open_store("127.0.0.1", int(sys.argv[1]) if rank else None)
print(store.port, flush=True)
context = Communicators.join(Layout(2, decode_context_parallel_size=2), rank, store).context
out = torch.zeros(2, (3, 2)[rank], dtype=torch.bfloat16)
context.exchange(torch.arange(5, dtype=torch.bfloat16) + 100 * rank, [3, 2], out)
print(out.int().tolist(), [part.tolist() for part in context.all_gather(torch.tensor([rank]))], flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_ranks_of_several_machines_exchange_parts() -> None:
    """Over sockets; parts have sizes of their own."""
    first = start_python(JOIN)
    second = start_python(JOIN, port := read_line(first))
    assert read_line(second) == port
    assert read_line(first) == "[[0, 1, 2], [100, 101, 102]] [[0], [1]]"
    assert read_line(second) == "[[3, 4], [103, 104]] [[0], [1]]"
    for process in first, second:
        process.communicate("\n")


STAGES = """
import sys
import torch
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.process_group import open_store
from distkv.workers.model.layout import Layout

rank = len(sys.argv) - 1
store = open_store("127.0.0.1", int(sys.argv[1]) if rank else None)
print(store.port, flush=True)
link = Communicators.join(Layout(pipeline_parallel_size=2), rank, store).link
shape, device, total = (1000, 100), torch.device("cpu"), 0.0
for step in range(6):
    link.settle()
    for batch in range(3):
        given = torch.full(shape, float(batch)) if not rank else link.receive(shape, torch.float32, device)
        link.send(given + step)
    if not rank:
        total += sum(link.receive(shape, torch.float32, device)[0, 0].item() for _ in range(3))
print(total, len(link._sending), flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_stages_keep_nothing_that_has_been_received() -> None:
    """A micro-batch that was sent is freed a step later."""
    first = start_python(STAGES)
    second = start_python(STAGES, port := read_line(first))
    assert read_line(second) == port
    assert (read_line(first), read_line(second)) == (f"{6 * 3 + 15 * 6:.1f} 3", "0.0 3")
    for process in first, second:
        process.communicate("\n")
