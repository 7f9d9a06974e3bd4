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
    on_cpu_from_disk: float  # of these, what comes from the disk first

    def __mul__(self, times: float) -> "Reading":
        return Reading(*(times * value for value in astuple(self)))

    @property
    def streamed(self) -> float:
        """Over the links."""
        return self.host + self.disk

    @property
    def from_host(self) -> float:
        """Read in host memory where they lie, for the links or by the CPU."""
        return self.host + self.on_cpu - self.on_cpu_from_disk

    @property
    def from_disk(self) -> float:
        """Read from disk."""
        return self.disk + self.on_cpu_from_disk


def decode_reading(request: PlanRequest, fit: Fit) -> Reading:
    """Of a step with one token for each running request.

    Whole pages lie below the devices, and the rest where pages are filled. A policy of attention is taken to choose
    from all tiers alike, as the engine expects. The CPU's pages are those on the host first, so that what remains of
    its share is on the devices only where less than the share lies below them; of the device's pages it takes none off
    the link, and they are read by the CPU all the same.
    """
    tokens = float(fit.running * request.context)
    host, disk = (min(tier.used_pages * request.page_tokens, tokens) for tier in fit.tiers[1:])
    read = request.share_read
    resident, host, disk = read * max(0.0, tokens - host - disk), read * host, read * disk
    on_cpu = cpu_share(request, fit) * read * tokens
    from_host = min(on_cpu, host)
    from_disk = min(on_cpu - from_host, disk)
    from_device = min(on_cpu - from_host - from_disk, resident)
    resident += request.summary_tokens * fit.running - from_device
    return Reading(resident, host - from_host, disk - from_disk, on_cpu, from_disk)


def cpu_share(request: PlanRequest, fit: Fit) -> float:
    """The part of a request's pages that the CPU attends to.

    "auto" is the share s of the cold bytes with which CPU and links end together. The memory of a node brings B bytes
    per second to both, the links of its n GPUs n * L at most; so links and memory are both busy all the time where
    1 - s = n * L / B, and where B is no more than n * L the links alone take all that there is: s = 0.
    """
    if request.hardware.is_cpu or request.cpu_attention == "off":
        return 0.0
    if request.cpu_attention != "auto":
        return float(request.cpu_attention)
    tokens = fit.running * request.context
    cold = sum(tier.used_pages for tier in fit.tiers[1:]) * request.page_tokens
    links = request.ranks_per_node * request.hardware.host_link
    return max(0.0, 1 - links / request.node.memory_bandwidth) * min(1.0, cold / tokens) if tokens else 0.0
