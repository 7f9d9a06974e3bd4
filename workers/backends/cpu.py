"""Steps on a CPU: by the native kernels, or by torch's operators where those cannot be had."""

import logging

from distkv.kernels.cpu_kernels import CPU_KERNELS
from distkv.kernels.native.build import BuildError
from distkv.kernels.native.codec_pages import NativeCodec
from distkv.kernels.native.library import Library, load_best
from distkv.kernels.native.token_kernels import native_token_kernels
from distkv.storage.device import CpuDevice, Device
from distkv.storage.dtypes import torch_dtype
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.page_pool import PageCodec
from distkv.storage.tier import Tier
from distkv.workers.attention.context_attention import ContextAttention, ContextGroup, plan_context_attention
from distkv.workers.attention.cpu import CpuAttention, plan_cpu_attention
from distkv.workers.attention.native import NativeAttention, plan_native_attention
from distkv.workers.attention.policies.policy import PagePolicy
from distkv.workers.attention.policy_attention import PolicyAttention, Tools, plan_policy_attention
from distkv.workers.backend import Backend, Demand, Room, refused_context_group, refused_policy
from distkv.workers.errors import ConfigError
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.cpu_runner import CpuRunner, PlanAttention
from distkv.workers.runners.runner import Runner

log = logging.getLogger(__name__)


class CpuBackend:
    """A `Backend`, by torch's operators."""

    kernels = CPU_KERNELS
    keeps_bits = False

    def __init__(self) -> None:
        self.device: Device = CpuDevice()

    def make_runner(self, model: LlamaModel, pools: KVPools, max_num_seqs: int) -> Runner:
        return CpuRunner(model, pools, self.attention(model, pools))

    def attention(self, model: LlamaModel, pools: KVPools) -> PlanAttention:
        """What plans the attention of steps over the pools."""
        group = model.shard.num_query_heads // model.shard.num_kv_heads

        def plan(steps: list[SequenceStep]) -> CpuAttention:
            spec = pools.device.spec
            return plan_cpu_attention(steps, spec.page_size, group, pools.ring.buffer_pages, torch_dtype(spec.dtype))

        return plan

    def use_policy(self, policy: PagePolicy, audit: int | None) -> None:
        raise refused_policy(policy, "torch's operators")

    def use_context_group(self, context: ContextGroup) -> None:
        raise refused_context_group("torch's operators")

    def share_attention(self) -> None:
        pass

    def host_attention_rate(self, model: LlamaModel, pools: KVPools) -> float:
        return 0.0

    def make_codec(self, spec: PageSpec) -> PageCodec | None:
        if spec.format is not None:
            raise ConfigError(
                f"kv_cache_dtype is {spec.kv_cache_dtype}, which only the native kernels of a CPU know, and those are "
                "not to be had here; see the warning above, or leave it out"
            )
        return None

    def room(self, model: LlamaModel, demand: Demand) -> Room:
        return Room(
            demand.host_bytes - demand.staging_bytes,
            demand.spec.page_bytes_in(Tier.DEVICE),
            "free some memory or set device_kv_bytes",
        )

    def tune(self, pools: KVPools) -> None:
        pass


class NativeBackend(CpuBackend):
    """A `Backend`, by the kernels of a library."""

    keeps_bits = True

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.kernels = native_token_kernels(library)
        self._library = library
        self._policy: PagePolicy | None = None
        self._audit: int | None = None
        self._context: ContextGroup | None = None

    def use_policy(self, policy: PagePolicy, audit: int | None) -> None:
        self._policy, self._audit = policy, audit

    def use_context_group(self, context: ContextGroup) -> None:
        self._context = context

    def make_runner(self, model: LlamaModel, pools: KVPools, max_num_seqs: int) -> Runner:
        if self._policy is None:
            return super().make_runner(model, pools, max_num_seqs)
        spec = pools.device.spec
        tools = Tools(
            self._library, self._policy, pools.summaries, spec.page_size, spec.num_kv_heads, spec.num_layers,
            pools.meter, self.make_codec(spec), self._audit,
        )  # fmt: skip

        def plan(steps: list[SequenceStep]) -> NativeAttention | PolicyAttention:
            return plan_policy_attention(tools, steps, pools.ring.buffer_pages)

        return CpuRunner(model, pools, plan, pools.stream_on_demand)

    def make_codec(self, spec: PageSpec) -> NativeCodec | None:
        return None if spec.format is None else NativeCodec(self._library, spec.format)

    def attention(self, model: LlamaModel, pools: KVPools) -> PlanAttention:
        library, codec = self._library, self.make_codec(pools.device.spec)
        # a model that drafts has its pages to itself
        context = self._context if model.shard.context_size > 1 else None

        def plan(steps: list[SequenceStep]) -> NativeAttention | ContextAttention:
            spec, buffer_pages = pools.device.spec, pools.ring.buffer_pages
            if context is not None:
                return plan_context_attention(library, steps, spec, context, buffer_pages, codec)
            return plan_native_attention(library, steps, spec.page_size, buffer_pages, codec)

        return plan


def make_backend(batch_invariant: bool | None) -> Backend:
    """See `backend.make_backend`."""
    if batch_invariant is False:
        raise ConfigError(
            "batch_invariant is False and this is a CPU, whose kernels always are, at no cost; leave it out"
        )
    try:
        library = load_best()
    except BuildError as error:
        if batch_invariant:
            raise ConfigError(
                "batch_invariant is True and the native CPU kernels, which alone are, cannot be used: "
                f"{error}; mend that, or have torch's operators: leave it out, and speculative_config, which sets it"
            ) from error
        log.warning(
            "the native CPU kernels cannot be used: %s. torch's operators run instead: slower, and last bits of an "
            "answer may depend on what runs beside it",
            error,
        )
        return CpuBackend()
    log.info("CPU kernels: native, for %s", library.instruction_set)
    return NativeBackend(library)
