"""One rank: its part of the model and of the KV cache, and the execution of step plans on them."""

from collections.abc import Callable

import msgspec
import torch
from torch import Tensor
from tqdm import tqdm

from distkv.storage.disk.cache_folder import Description
from distkv.storage.dtypes import torch_dtype
from distkv.storage.meter import Meter, now
from distkv.storage.moving.streams import Lane
from distkv.storage.process_limits import available_bytes
from distkv.storage.synthetic_pages import synthetic_slice
from distkv.storage.tier import Tier
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.attention.policies.registry import parse_policy
from distkv.workers.backend import Demand, make_backend
from distkv.workers.bandwidth import measure_bandwidth
from distkv.workers.cache_place import CachePlace
from distkv.workers.disk_shares import disk_shares
from distkv.workers.drafting.draft_model import DraftModel
from distkv.workers.drafting.draft_request import DraftRequest
from distkv.workers.errors import CapacityError
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.kv_pools import DiskTier, KVPools
from distkv.workers.model.llama import LlamaModel, is_elsewhere, load_llama
from distkv.workers.model.shard import Shard
from distkv.workers.model.weights import CheckedSource, weight_source
from distkv.workers.page_directory import PageDirectory, SequenceStep
from distkv.workers.plan_check import PlanCheck
from distkv.workers.rank_config import RankConfig, model_page_spec, rank_page_spec
from distkv.workers.sampling.prompt_scores import PromptScores, score_prompts
from distkv.workers.sizes import Bandwidth, Capacity, PoolSizes, host_kv_bytes, ring_bytes
from distkv.workers.stage_pipeline import StagePipeline
from distkv.workers.threads import release_threads, use_threads

# Rows of logits that are made at a time to score the tokens of prompts: enough for a product at full speed.
SCORED_ROWS = 64
TIMED_TOKENS = 128  # of a prompt at least in a step that says how fast tokens are computed; fewer take longer each


class Loaded(msgspec.Struct, array_like=True, frozen=True):
    """What a rank will run."""

    digest: str  # of what was read of the weights, see `SafetensorsSource.digest`
    kernels: str  # their name, see `TokenKernels`


class Rank:
    """Loads its part of the model at once; `allocate` must come before `execute`."""

    def __init__(self, config: RankConfig, peers: Communicators, check: Callable[[], None] = lambda: None):
        """
        Args:
            peers: of the size that `RankConfig.layout` says.
            check: called before each tensor is read; what it raises ends the loading.
        """
        self.config = config
        self.peers = peers
        self.shard = Shard.of(config.model, config.layout, peers.rank)
        policy = parse_policy(config.attention_policy)
        self.backend = make_backend(
            config.device, config.batch_invariant, policy, config.attention_audit, config.link_bytes_per_second
        )
        if self.shard.context_size > 1:
            self.backend.use_context_group(ContextGroup.of(config.model, config.layout, peers.rank, peers.context))
        if config.cpu_attention:
            self.backend.share_attention()
        self.page_spec = rank_page_spec(config, self.shard)
        use_threads(config.num_threads)
        self.model, digest = self._load(check)
        self.loaded = Loaded(digest, self.backend.kernels.name)
        drafts = config.draft is not None and not peers.rank
        self._draft_model = DraftModel(config, self.backend, check) if drafts else None
        self._codec = self.backend.make_codec(self.page_spec)
        self.pools = KVPools(self.page_spec, PoolSizes(), self.backend.device, codec=self._codec)
        self._use_pools()
        self._directory = PageDirectory(config.plan_page_size)
        # a device has been tried with the logits of max_num_seqs rows
        self._scored_rows = min(SCORED_ROWS, config.max_num_seqs) if self.backend.device.runs_behind else SCORED_ROWS
        self._scores: PromptScores | None = None

    def _use_pools(self) -> None:
        """Has steps run over the pools."""
        self._runner = self.backend.make_runner(self.model, self.pools, self.config.max_num_seqs)
        self._pipeline = None
        if self.peers.link is not None:
            self._pipeline = StagePipeline(
                self._runner, self.model, self.peers.link, self.config.plan_page_size, torch_dtype(self.config.dtype),
                self.backend.device.torch_device, self.pools.meter,
            )  # fmt: skip

    def _load(self, check: Callable[[], None]) -> tuple[LlamaModel, str]:
        """The model, and what was read, see `SafetensorsSource.digest`."""
        config, backend, device = self.config, self.backend, self.backend.device.torch_device
        dtype = torch_dtype(config.dtype)
        source = weight_source(config.folder, config.load_format, config.seed, dtype, device, self.peers.rank == 0)
        with source as weights, torch.inference_mode():
            model = load_llama(
                CheckedSource(weights, check), config.model, self.shard, self.peers.stage, dtype, device,
                backend.kernels,
            )  # fmt: skip
            weights.check_all_read(lambda name: is_elsewhere(name, config.model, self.shard))
            return model, weights.digest(config.digest_weights)

    def page_capacity(self, ranks_on_node: int, of_device: bool) -> Capacity:
        """Room for KV pages beside the weights, the workspace and the staging ring; that on the device only if it is
        asked for, else 0. Raises CapacityError when not even one fits there."""
        config, spec = self.config, self.page_spec
        host_room = host_kv_bytes(available_bytes(), self.backend.device.pinned, ranks_on_node)
        host_pages = host_room // spec.page_bytes_in(Tier.HOST)
        if not of_device:
            return Capacity(0, host_pages)
        num_buffers = self.backend.device.num_buffers
        demand = Demand(
            spec=spec,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            staging_bytes=ring_bytes(spec, config.staging_pages, num_buffers),
            gpu_memory_utilization=config.gpu_memory_utilization,
            host_bytes=host_room,
        )
        room = self.backend.room(self.model, demand)
        pages = room.num_bytes // room.page_bytes
        if pages < 1:
            raise CapacityError(
                f"rank {self.peers.rank} has {max(room.num_bytes, 0)} bytes left for KV pages of "
                f"{spec.page_bytes_in(Tier.DEVICE)} bytes; {room.cure}"
            )
        return Capacity(pages, host_pages, room.budget)

    def allocate(self, sizes: PoolSizes, place: CachePlace | None = None) -> tuple[int, int, int]:
        """Makes the pools of all tiers, dropping the old ones; returns the bytes of each.

        Raises CapacityError, ConfigError or StoreError when one cannot be had. One rank must have returned before the
        next starts: the first one on a disk makes the array there.

        Args:
            place: of the disk tier; needed where that has pages.
        """
        self.pools.close()
        config, disk = self.config, None
        if place is not None:
            kept = self._description(place) if place.fingerprint else None
            share = disk_shares(config)[self.peers.rank]
            disk = DiskTier(place, share, self.peers.rank, kept, is_alone=config.layout.size == 1)
        meter = Meter(self.peers.rank, config.traces)
        self.pools = KVPools(self.page_spec, sizes, self.backend.device, disk, meter, self._codec)
        self._use_pools()
        self.backend.tune(self.pools)
        self.plan_check = PlanCheck(sizes, config.model.vocab_size, config.plan_page_size, config.max_num_seqs)
        release_threads()  # steps run on another one
        return self.pools.nbytes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Does what would delay the first steps, see `Runner`, with a progress bar on a terminal. On the thread that
        will run the steps, all ranks at a time; follows `allocate`."""
        self.backend.device.enter_thread()  # pools and weights were made by another one
        parts, count = self._runner.warm_up(), self._runner.num_parts
        hidden = None if count and self.peers.rank == 0 else True  # None: unless there is no terminal
        for _ in tqdm(parts, "warming up", count, disable=hidden, leave=False):
            pass
        self._runner.compile_rest()

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sampled: Tensor | None = None) -> Tensor | None:
        """Runs a step; on rank 0 returns the wanted logits, fp32 `[rows, vocab_size]`, in the plan's order, and None
        when nothing runs. `take_scores` and `take_report` must follow.

        Args:
            sampled: on rank 0, what the step before sampled, int64 on the device; needed where the plan refers to it.
        """
        pools = self.pools
        self._scores = None  # of a step that raised
        steps = self._directory.update(plan)
        if self._draft_model is not None:
            self._draft_model.forget(plan.ended)
        if pools.summaries is not None:
            pools.summaries.forget(plan.new_pages)
        sampled = self._share_sampled(plan.num_sampled, sampled)
        if plan.adopt is not None:
            pools.adopt(plan.adopt)
        if plan.added:
            pools.take_in(plan.added)
        pools.mover.start(plan.transfers, plan.await_ids)
        for source, target in plan.copies:
            pools.device.copy(source, target)
        pools.device.clear(plan.clear)
        if plan.synthetic_pages:
            ids = {location: id for id, location in plan.relocated}
            for slot, seed in plan.synthetic_pages:
                self._fill_synthetic(slot, seed)
                if pools.summaries is not None:
                    pools.summaries.add(ids[slot], pools.device.data[:, 0, slot])
        if not steps:
            pools.mover.wait(plan.await_ids)  # such a plan is sent to learn of their end
            return None
        return self._compute(plan, steps, sampled)

    def _compute(self, plan: StepPlan, steps: list[SequenceStep], sampled: Tensor | None) -> Tensor | None:
        """Runs the model; a trace shows it on the host and, where that runs behind, on the device."""
        meter, times, start = self.pools.meter, self.pools.times, now()
        begun = times.begin(Lane.COMPUTE) if meter.traces and times is not None else None
        run = self._runner.run if self._pipeline is None else self._pipeline.run
        hidden, logits = run(steps, sampled), None
        if self.shard.is_first_stage:
            if any(one.scored for one in plan.sequences):
                self._scores, hidden = score_prompts(plan.sequences, hidden, self.model.logits, self._scored_rows)
            logits = self.model.logits(hidden)
        num_tokens = sum(len(one.token_ids) for one in steps)
        if begun is not None:
            assert times is not None
            times.end(Lane.COMPUTE, begun, "compute", tokens=num_tokens, sequences=len(steps))
        note = meter.add if self._tells_speed(steps) else meter.trace
        note("compute" if begun is None else "launch", start, tokens=num_tokens, sequences=len(steps))
        return logits

    def _tells_speed(self, steps: list[SequenceStep]) -> bool:
        """Whether the time of a step is that of computing prompts alone, which the leader weighs against loading pages
        that can be computed again bit for bit."""
        if not self.backend.keeps_bits or self.backend.device.runs_behind:
            return False
        is_long = max(len(one.token_ids) for one in steps) >= TIMED_TOKENS
        return is_long and all(one.pages.min() >= 0 for one in steps)

    def take_scores(self) -> PromptScores | None:
        """On rank 0, the log-probabilities that the last step's plan wanted of prompts; None where it wanted none."""
        scores, self._scores = self._scores, None
        return scores

    def draft(self, requests: list[DraftRequest]) -> list[list[int]]:
        """On rank 0, see `DraftModel.draft`; needs `RankConfig.draft`."""
        assert self._draft_model is not None
        return self._draft_model.draft(requests)

    def _share_sampled(self, count: int, sampled: Tensor | None) -> Tensor | None:
        """The `count` tokens that the step before sampled, on all ranks of the first stage, which embeds them; None on
        others, and when the plan refers to none."""
        if not count or not self.shard.is_first_stage:
            return None
        if sampled is None:
            assert self.peers.rank, "rank 0 samples"
            sampled = torch.empty(count, dtype=torch.int64, device=self.backend.device.torch_device)
        assert len(sampled) == count
        return self.peers.stage.broadcast(sampled)

    def bandwidth(self) -> Bandwidth:
        """How fast the tiers below the device give pages back."""
        found = measure_bandwidth(self.pools)
        if self.config.cpu_attention and self.pools.host.num_pages:
            found = Bandwidth(found.host, found.disk, self.backend.host_attention_rate(self.model, self.pools))
        release_threads()
        return found

    def take_report(self) -> Report:
        """What has ended since the last call; bytes by route are of this rank alone: `device_to_host` and so on for
        whole pages, `host_streamed` and `disk_streamed` for layer slices."""
        return self.pools.take_report()

    def close(self) -> None:
        """Ends transfers and gives back memory and files."""
        self.pools.close()
        self._runner.close()
        if self._draft_model is not None:
            self._draft_model.close()

    def close_after_error(self) -> None:
        """The same where no step can be under way any more: a device may still be at one that nobody waits for. The
        process ends soon."""
        if not self.backend.device.runs_behind:
            self.close()

    def _description(self, place: CachePlace) -> Description:
        config, model = self.config, self.config.model
        whole = model_page_spec(model, config.page_size, config.dtype, config.kv_cache_dtype, config.disk_codec)
        num_parts = config.layout.decode_context_parallel_size
        return Description(
            fingerprint=place.fingerprint,
            kernels=place.kernels,
            model=str(config.folder),
            dtype=config.dtype,
            kv_cache_dtype=config.kv_cache_dtype,
            page_size=config.page_size,
            num_layers=model.num_hidden_layers,
            num_kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            page_bytes=whole.page_bytes_in(Tier.DISK) * num_parts,
            disk_codec=config.disk_codec,
            decode_context_parallel_size=num_parts,
        )

    def _fill_synthetic(self, slot: int, seed: int) -> None:
        """See `synthetic_slice`."""
        spec, heads, device = self.page_spec, range(*self.shard.kv_heads), self.backend.device.torch_device
        first = self.shard.context_rank * spec.page_size
        for layer, number in enumerate(range(*self.shard.layers)):
            values = synthetic_slice(seed, number, heads, self.config.plan_page_size, spec.head_dim, device)
            pool = self.pools.device.layer(layer)
            pool[:, slot] = values[:, :, first : first + spec.page_size].to(torch_dtype(spec.dtype))
            if self._codec is not None:
                self._codec.round(pool, torch.tensor([slot], device=device))
