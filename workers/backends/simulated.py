"""Steps on a CPU that stands for a device behind a link: what a slow link does, where there is no GPU.

It is honest of one thing alone: how long pages take to cross, beside which the device computes. That takes the time
that the native kernels of this CPU take, on the same cores as all else.
"""

from distkv.kernels.native.build import BuildError
from distkv.kernels.native.library import Library, load_best
from distkv.storage.device import SimulatedDevice
from distkv.storage.moving.link import Link
from distkv.workers.attention.host_share import HostShare
from distkv.workers.attention.policies.policy import PagePolicy
from distkv.workers.attention.shared_native import plan_shared_attention
from distkv.workers.backend import Backend, refused_policy
from distkv.workers.backends.cpu import NativeBackend
from distkv.workers.bandwidth import host_attention_rate
from distkv.workers.errors import ConfigError
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.batch import Attention
from distkv.workers.runners.cpu_runner import PlanAttention


class SimulatedBackend(NativeBackend):
    """A `Backend` by the native kernels, over a `SimulatedDevice`."""

    def __init__(self, library: Library, link: Link) -> None:
        super().__init__(library)
        self.device = SimulatedDevice(link)
        self._shares = False

    def share_attention(self) -> None:
        self._shares = True

    def host_attention_rate(self, model: LlamaModel, pools: KVPools) -> float:
        return host_attention_rate(self._library, pools, model.shard.num_query_heads)

    def attention(self, model: LlamaModel, pools: KVPools) -> PlanAttention:
        alone = super().attention(model, pools)
        if not self._shares or not pools.host.num_pages:
            return alone
        host, codec = HostShare(self._library, pools), self.make_codec(pools.spec)

        def plan(steps: list[SequenceStep]) -> Attention:
            page_size, buffer_pages = pools.spec.page_size, pools.ring.buffer_pages
            return plan_shared_attention(self._library, host, steps, page_size, buffer_pages, codec) or alone(steps)

        return plan

    def use_policy(self, policy: PagePolicy, audit: int | None) -> None:
        raise refused_policy(policy, "a simulated device")


def make_backend(batch_invariant: bool | None, link: Link) -> Backend:
    """See `backend.make_backend`."""
    if batch_invariant is False:
        raise ConfigError("batch_invariant is False and a simulated device has the kernels of a CPU; leave it out")
    try:
        return SimulatedBackend(load_best(), link)
    except BuildError as error:
        raise ConfigError(
            f"device is simulated and the native CPU kernels cannot be used: {error}; mend that, or use device='cpu'"
        ) from error
