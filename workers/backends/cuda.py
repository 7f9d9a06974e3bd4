"""Steps on a CUDA device, by Triton's kernels and captured graphs."""

from functools import partial

import torch

from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.cuda.cuda_kernels import BATCH_INVARIANT_KERNELS, CUDA_KERNELS
from distkv.kernels.cuda.page_copy import copy_pages
from distkv.kernels.native.build import BuildError
from distkv.kernels.native.library import Library, load_best
from distkv.storage.device import CudaDevice, Device
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.attention.policies.policy import PagePolicy
from distkv.workers.backend import Backend, Demand, Room, refused_policy
from distkv.workers.bandwidth import choose_copies, host_attention_rate
from distkv.workers.errors import ConfigError
from distkv.workers.gpu_memory import find_memory_in_use
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.runners.cuda_runner import CudaRunner, cuda_codec, decode_programs


class CudaBackend:
    """A `Backend`, on the device that is current in the thread that makes it."""

    captures = True  # graphs, where the group of ranks can be captured

    def __init__(self, batch_invariant: bool = False) -> None:
        self.kernels = BATCH_INVARIANT_KERNELS if batch_invariant else CUDA_KERNELS
        self.keeps_bits = self._batch_invariant = batch_invariant
        self.device: Device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
        self._library: Library | None = None  # by which the host attends to its share
        self._context: ContextGroup | None = None
        self._properties = torch.cuda.get_device_properties(self.device.torch_device)

    def make_runner(self, model: LlamaModel, pools: KVPools, max_num_seqs: int) -> CudaRunner:
        num_programs = decode_programs(self._properties.multi_processor_count, pools.device.spec.num_kv_heads)
        captures = self.captures and model.group.is_capturable
        return CudaRunner(
            model, pools, max_num_seqs, num_programs, captures, self._batch_invariant, self._library, self._context
        )

    def use_policy(self, policy: PagePolicy, audit: int | None) -> None:
        raise refused_policy(policy, "those of CUDA")

    def use_context_group(self, context: ContextGroup) -> None:
        self._context = context

    def share_attention(self) -> None:
        self._library = host_library(self._batch_invariant)

    def host_attention_rate(self, model: LlamaModel, pools: KVPools) -> float:
        assert self._library is not None
        return host_attention_rate(self._library, pools, model.shard.num_query_heads)

    def room(self, model: LlamaModel, demand: Demand) -> Room:
        spec, device = demand.spec, self.device.torch_device
        in_use = find_memory_in_use(
            model, partial(self.make_runner, model), spec, demand.max_num_seqs, demand.max_num_batched_tokens,
            self.device,
        )  # fmt: skip
        budget = [*in_use.budget, ("staging ring", demand.staging_bytes)]
        total = torch.cuda.mem_get_info(device)[1]
        left = int(total * demand.gpu_memory_utilization) - sum(size for _, size in budget)
        return Room(
            left,
            spec.page_bytes_in(Tier.DEVICE) + in_use.graph_bytes_per_page,
            "raise gpu_memory_utilization, or use more ranks or a smaller max_num_batched_tokens",
            [*budget, ("left for KV pages", max(left, 0))],
        )

    def make_codec(self, spec: PageSpec) -> CudaCodec | None:
        return cuda_codec(spec)

    def tune(self, pools: KVPools) -> None:
        choose_copies(pools, copy_pages)


def host_library(batch_invariant: bool) -> Library:
    """The kernels of a host that has a share of attention. Raises ConfigError where there are none, and where bits that
    it would change are promised."""
    if batch_invariant:
        raise ConfigError(
            "cpu_attention is set and batch_invariant is True, by which tokens of prompts and of answers have the same "
            "bits, while a page that the CPU attends to has bits of its own; leave one of them out (speculative_config "
            "turns batch_invariant on)"
        )
    try:
        return load_best()
    except BuildError as error:
        raise ConfigError(
            f"cpu_attention is set and the native CPU kernels cannot be used: {error}; mend that, or leave it out"
        ) from error


def make_backend(batch_invariant: bool | None) -> Backend:
    """See `backend.make_backend`; None is False as long as nobody has measured what it costs."""
    return CudaBackend(bool(batch_invariant))
