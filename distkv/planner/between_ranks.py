"""What ranks send each other in a step, and how long that takes at least: between GPUs of a node over their links, and
between nodes over the network, which the GPUs of a node share.

A rank sends and receives at a time, so bytes of one direction count. Messages within a node are taken to cost nothing
but their bytes, those between nodes `Node.latency` more each.
"""

import math
from dataclasses import dataclass

from distkv.planner.request import PlanRequest
from distkv.workers.model.shard import Shard

STATE_NUMBERS = 2  # of a partial state beside a head's output: the highest score and the sum
STATE_BYTES = 4  # of each number, fp32


@dataclass(frozen=True)
class Sent:
    """Seconds that sending takes."""

    peers: float = 0.0  # over the links of a node
    network: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.peers + other.peers, self.network + other.network)

    def __mul__(self, times: float) -> "Sent":
        return Sent(self.peers * times, self.network * times)

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.peers + self.network


def sums(request: PlanRequest, shard: Shard, tokens: float, times: int = 1) -> Sent:
    """Two sums of `tokens` hidden states over the ranks of a stage in each of its layers, and one of the embeddings, in
    `times` pieces.

    On a node by a ring: each of n ranks sends 2 (n - 1) / n of the bytes. Over N nodes each GPU has summed up its part
    of them halfway, and the parts of a node, all bytes together, go round a ring of the nodes. That is the least of
    bytes; log2(N) messages, one after the other, are the least for all nodes to hear of each other.
    """
    count = 2 * shard.num_layers + (shard.stage == 0)
    num_bytes = count * tokens * request.model.config.hidden_size * request.item_bytes
    nodes = request.nodes_per_stage
    here = request.tensor_parallel_size // nodes
    network = 0.0
    if nodes > 1:
        network = 2 * (nodes - 1) / nodes * num_bytes / request.node.network
        network += times * count * math.ceil(math.log2(nodes)) * request.node.latency
    return Sent(2 * (here - 1) / here * num_bytes / request.hardware.peer_link, network)


def state_bytes(request: PlanRequest, shard: Shard, pages: float) -> float:
    """Of partial states of a rank's query heads, one for each layer of its stage and each of so many pages."""
    numbers = request.model.config.head_dim + STATE_NUMBERS
    return shard.num_layers * shard.num_query_heads * pages * numbers * STATE_BYTES


def decode_exchange(request: PlanRequest, shard: Shard, rows: float, pages: float) -> Sent:
    """Within a context group in each layer: the queries of `rows` tokens go to all its ranks, and the partial states of
    `pages` pages, of all rows together, come back to the ranks whose query heads they are of. Pages of a rank are not
    merged before they are sent, since answers have the same bits wherever pages lie: states are merged in their order.
    """
    head_bytes = request.model.config.head_dim * request.item_bytes
    queries = shard.num_layers * shard.num_query_heads * rows * head_bytes
    group = request.decode_context_parallel_size
    return _within_group(request, shard, queries + state_bytes(request, shard, pages / group), 2)


def prefill_exchange(request: PlanRequest, shard: Shard, num_bytes: float, times: int) -> Sent:
    """Within a context group, where a step has many rows: keys and values of all tokens before them, `num_bytes` over
    all `times` steps, of which each rank keeps an equal part and sends that to the others. Each attends with its own
    query heads."""
    return _within_group(request, shard, num_bytes / request.decode_context_parallel_size, times)


def hidden_states(request: PlanRequest, rows: float) -> list[Sent]:
    """Of `rows` tokens from each stage to the next and from the last to the first: every rank sends those of all
    columns to the one in its place there."""
    size, per_node = request.tensor_parallel_size, request.ranks_per_node
    num_bytes, stages = rows * request.model.config.hidden_size * request.item_bytes, request.pipeline_parallel_size
    found = []
    for stage in range(stages if stages > 1 else 0):
        here, there = (one * size // per_node for one in (stage, (stage + 1) % stages))
        together = min(size, per_node)  # ranks of a node that send at a time
        on_network = num_bytes * together / request.node.network + request.node.latency
        found.append(Sent(num_bytes / request.hardware.peer_link) if here == there else Sent(network=on_network))
    return found


def _within_group(request: PlanRequest, shard: Shard, num_bytes: float, times: int) -> Sent:
    """Each rank of a context group sends so many bytes to each other one, in `times` turns in each layer."""
    group = request.decode_context_parallel_size
    ranks_here = request.tensor_parallel_size // request.nodes_per_stage
    here = math.gcd(group, ranks_here)
    away = group - here
    network = ranks_here * away * num_bytes / request.node.network
    network += shard.num_layers * times * request.node.latency if away else 0
    return Sent((here - 1) * num_bytes / request.hardware.peer_link, network)
