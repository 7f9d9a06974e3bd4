"""The machines that the ranks of a plan lie on, and what the ranks of one share."""

from dataclasses import dataclass

from distkv.option_checks import check_whole, parse_bytes
from distkv.planner.pairs import split_pairs


@dataclass(frozen=True)
class Node:
    """One of machines that are alike. Rates are bytes per second in one direction, of all its GPUs together.

    What is left out is that of a DGX H100 by its data sheet: eight GPUs, two processors with eight channels of
    DDR5-4800 each, and for each GPU a port of 400 Gbit/s to the other nodes.
    """

    gpus: int = 8
    memory: int | None = None  # bytes for KV pages; None for as many as the options say
    memory_bandwidth: float = 16 * 38.4e9
    disk: int | None = None  # bytes for KV pages; None for as many as the options say
    network: float = 8 * 50e9
    latency: float = 1e-5  # seconds of a message between nodes beside its bytes; assumed, for no data sheet has it


DGX = Node()
BY_HAND = ("gpus", "memory", "bandwidth", "disk", "network", "latency_us")
"""What a node is told by."""


def parse_node(text: str) -> Node:
    """A node by hand, such as "gpus=4,memory=1TiB,bandwidth=500GB,disk=30TiB,network=100GB,latency_us=5"; what is left
    out is as `Node` has it. Raises ConfigError that names what is wrong."""
    given = dict(split_pairs("the node", text, BY_HAND))
    numbers = {key: given.pop(key) for key in ("gpus", "latency_us") if key in given}
    whole = {
        key: check_whole(f"{key} of the node", int(value) if value.isdecimal() and len(value) < 10 else value)
        for key, value in numbers.items()
    }
    sizes = {key: parse_bytes(f"{key} of the node", value) for key, value in given.items()}
    return Node(
        gpus=whole.get("gpus", Node.gpus),
        memory=sizes.get("memory"),
        memory_bandwidth=sizes.get("bandwidth", Node.memory_bandwidth),
        disk=sizes.get("disk"),
        network=sizes.get("network", Node.network),
        latency=whole["latency_us"] * 1e-6 if "latency_us" in whole else Node.latency,
    )
