"""Steps on a CPU, by torch's operators."""

from distkv.kernels.cpu_kernels import CPU_KERNELS
from distkv.storage.device import CpuDevice, Device
from distkv.storage.tier import Tier
from distkv.workers.backend import Backend, Demand, Room
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.runners.cpu_runner import CpuRunner
from distkv.workers.runners.runner import Runner


class CpuBackend:
    """A `Backend`."""

    kernels = CPU_KERNELS

    def __init__(self) -> None:
        self.device: Device = CpuDevice()

    def make_runner(self, model: LlamaModel, pools: KVPools, max_num_seqs: int) -> Runner:
        return CpuRunner(model, pools)

    def room(self, model: LlamaModel, demand: Demand) -> Room:
        return Room(
            demand.host_bytes - demand.staging_bytes,
            demand.spec.page_bytes_in(Tier.DEVICE),
            "free some memory or set device_kv_bytes",
        )

    def tune(self, pools: KVPools) -> None:
        pass


def make_backend() -> Backend:
    """See `backend.make_backend`."""
    return CpuBackend()
