"""Which tokens' KV a decode step reads on the device, on the host and on disk, and what of it a CPU attends to."""

from dataclasses import astuple, dataclass

from distkv.planner.fit import Fit
from distkv.planner.request import PlanRequest


@dataclass(frozen=True)
class Reading:
    """Tokens of all running requests, each counted once whatever ranks share it."""

    resident: float  # read on the device
    host: float  # streamed from the host
    disk: float  # streamed from the disk, by way of the host
    on_cpu: float  # attended to by the CPU, in host memory

    def __mul__(self, times: float) -> "Reading":
        return Reading(*(times * value for value in astuple(self)))

    @property
    def streamed(self) -> float:
        """Over the links."""
        return self.host + self.disk


def decode_reading(request: PlanRequest, fit: Fit) -> Reading:
    """Of a step with one token for each running request.

    Whole pages lie below the devices, and the rest where pages are filled. A policy of attention is taken to choose
    from all tiers alike, as the engine expects. The CPU's pages leave the devices first, so that it attends to its
    share of all pages as far as the host holds so many; what is on disk alone is streamed.
    """
    tokens = float(fit.running * request.context)
    host, disk = (min(tier.used_pages * request.page_tokens, tokens) for tier in fit.tiers[1:])
    read = request.share_read
    on_cpu = read * min(cpu_share(request) * tokens, host)
    resident = read * max(0.0, tokens - host - disk) + request.summary_tokens * fit.running
    return Reading(resident, read * host - on_cpu, read * disk, on_cpu)


def cpu_share(request: PlanRequest) -> float:
    """The part of a request's pages that the CPU attends to.

    "auto" is what the CPU's rate is to that of CPU and links, as the engine measures it: a node's memory brings B bytes
    per second to both, of which the links of its n GPUs take n * L. So it is (B - n L) / B, and none where the links
    alone take all that there is.
    """
    if request.hardware.is_cpu or request.cpu_attention == "off":
        return 0.0
    if request.cpu_attention != "auto":
        return float(request.cpu_attention)
    links = request.ranks_per_node * request.hardware.host_link
    return max(0.0, 1 - links / request.node.memory_bandwidth)
