"""One tensor-parallel rank: its part of the model and of the KV cache, and the execution of step plans on them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distkv.errors import CapacityError
from distkv.storage.device_pool import DevicePool
from distkv.storage.page_spec import PageSpec
from distkv.workers.batch import build_batch
from distkv.workers.llama import LlamaModel, load_llama
from distkv.workers.model_config import ModelConfig
from distkv.workers.process_group import ProcessGroup
from distkv.workers.shard import Shard
from distkv.workers.step_plan import SequencePlan, StepPlan
from distkv.workers.weights import DummySource, SafetensorsSource

# Share of the memory free at start that the KV pool of a CPU rank may grow to, unless a size is given.
CPU_KV_SHARE = 0.25


@dataclass(frozen=True)
class RankConfig:
    """What every rank has to know; the same for all of them."""

    folder: Path
    model: ModelConfig
    load_format: str  # "auto" for safetensors, or "dummy"
    seed: int  # of dummy weights
    dtype: torch.dtype
    device: str  # "cpu" or "cuda"
    page_size: int  # tokens
    max_num_batched_tokens: int
    gpu_memory_utilization: float  # share of the GPU's memory that weights, workspace and KV may take together
    num_threads: int | None  # torch's CPU threads; None leaves them as they are


class Rank:
    """Loads its part of the model at once; `allocate` must come before `execute`."""

    def __init__(self, config: RankConfig, group: ProcessGroup):
        self.config = config
        self.group = group
        self.shard = Shard.of(config.model, group.rank, group.size)
        self.device = torch.device(config.device)
        self.page_spec = rank_page_spec(config, self.shard)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._model = self._load()
        self._pool = DevicePool(self.page_spec, 0, self.device)

    def _load(self) -> LlamaModel:
        config = self.config
        if config.load_format == "dummy":
            source: DummySource | SafetensorsSource = DummySource(config.seed, config.dtype, self.device)
        else:
            source = SafetensorsSource(config.folder)
        with source as weights, torch.inference_mode():
            return load_llama(weights, config.model, self.shard, self.group, config.dtype, self.device)

    def page_capacity(self, ranks_on_node: int) -> int:
        """Pages that fit into this rank's memory when nobody says how many bytes the KV cache may take.

        Raises CapacityError when not even one fits.
        """
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            used = total - free + self._workspace_bytes()
            room = int(total * self.config.gpu_memory_utilization) - used
            cure = "raise gpu_memory_utilization, or use more ranks or a smaller max_num_batched_tokens"
        else:
            room = int(_available_bytes() * CPU_KV_SHARE) // ranks_on_node
            cure = "free some memory or set device_kv_bytes"
        pages = room // self.page_spec.page_bytes
        if pages < 1:
            raise CapacityError(
                f"rank {self.shard.rank} has {max(room, 0)} bytes left for KV pages of {self.page_spec.page_bytes} "
                f"bytes; {cure}"
            )
        return pages

    def _workspace_bytes(self) -> int:
        """Peak device memory of activations, from a trial step of the largest size."""
        tokens = self.config.max_num_batched_tokens
        pages = self.page_spec.pages_for(tokens)
        self.allocate(pages)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        plan = SequencePlan([0] * tokens, 0, list(range(pages)), tokens, 1)
        self.execute(StepPlan([plan], [], []))
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        self.allocate(0)
        torch.cuda.empty_cache()
        return peak - before

    def allocate(self, num_pages: int) -> int:
        """Makes the device pool, dropping the old one; returns the bytes it takes."""
        self._pool = DevicePool(self.page_spec, 0, self.device)
        self._pool = DevicePool(self.page_spec, num_pages, self.device)
        return self._pool.data.nbytes

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Tensor | None:
        """Runs a step; on rank 0 returns the wanted logits, fp32 `[rows, vocab_size]`, in the plan's order."""
        for source, target in plan.copies:
            self._pool.copy(source, target)
        self._pool.clear(plan.clear)
        spec, shard = self.page_spec, self.shard
        group_size = shard.num_query_heads // shard.num_kv_heads
        batch = build_batch(plan, spec.page_size, group_size, spec.dtype, self.device)
        hidden = self._model.forward(batch, self._pool)
        return self._model.logits(hidden)


def rank_page_spec(config: RankConfig, shard: Shard) -> PageSpec:
    """The pages of one rank: all layers, that rank's KV heads."""
    model = config.model
    return PageSpec(model.num_hidden_layers, shard.num_kv_heads, config.page_size, model.head_dim, config.dtype)


def _available_bytes() -> int:
    """Memory that can be taken without swapping, within the limit of the container if there is one."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
