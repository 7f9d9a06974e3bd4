"""What a plan is asked for, checked."""

from dataclasses import dataclass, replace
from typing import Any

from distkv.config import EngineConfig
from distkv.errors import ConfigError
from distkv.kernels.codec_format import FORMATS
from distkv.option_checks import check_choice, check_share, check_share_or, check_whole, parse_bytes
from distkv.planner.hardware import Hardware
from distkv.planner.model_shape import ModelShape, find_shard
from distkv.planner.nodes import DGX, Node
from distkv.storage.dtypes import DTYPES, ITEM_BYTES
from distkv.storage.page_spec import MEAN_TOKENS
from distkv.storage.paging import check_context_page_size, check_page_size, pages_for
from distkv.workers.attention.policies.registry import FULL, parse_policy, policy_name
from distkv.workers.kinds import KINDS, Kind
from distkv.workers.model.layout import Layout

MOST_TOKENS = 2**40
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size")
WHOLE = (*PARALLEL, "nodes", "concurrency", "page_size", "max_num_batched_tokens")


@dataclass(frozen=True)
class PlanRequest:
    """A model, what it is to run on, and the work. Fields that `EngineConfig` has too mean the same here.

    Raises ConfigError for a value that cannot be planned for.

    Attributes:
        model: its shape.
        hardware: of each rank.
        tensor_parallel_size: ranks that share each layer, a GPU each.
        pipeline_parallel_size: stages, which share out the layers; each has so many ranks.
        decode_context_parallel_size: neighbouring ranks that share out the tokens of their KV heads.
        cpu_attention: the part of each request's pages that the CPU attends to while an answer is written: "off",
            "auto" for what keeps it and the links equally long, or a share.
        nodes: machines, to which the ranks are dealt evenly and in their order.
        node: one of them.
        dtype: of weights, activations and KV; auto is the checkpoint's.
        kv_cache_dtype: what KV lies and moves as below the device; auto is `dtype`.
        attention_policy: which part of a request's pages a token of the answer reads.
        context: tokens of a request, prompt and answer together.
        concurrency: requests that are to run at a time.
        device_kv_bytes: of all ranks together; None takes what is left beside the weights and the workspace.
        host_kv_bytes: of all ranks together; 0 for no such tier.
        disk_kv_bytes: of all ranks together; 0 for no such tier. It needs a host tier, by way of which pages come.
        page_size: tokens of a page.
        max_num_seqs: most answers at a time; None takes the engine's default, or `max_num_batched_tokens` if that is
            less, or `concurrency` if that is more.
        max_num_batched_tokens: most tokens of a step.
        gpu_memory_utilization: share of a GPU's memory that may be taken.
    """

    model: ModelShape
    hardware: Hardware
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    cpu_attention: str | float = "off"
    nodes: int = 1
    node: Node = DGX
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    attention_policy: str = FULL
    context: int = 4096
    concurrency: int = 1
    device_kv_bytes: int | None = None
    host_kv_bytes: int = 0
    disk_kv_bytes: int = 0
    page_size: int = EngineConfig.page_size
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens
    gpu_memory_utilization: float = EngineConfig.gpu_memory_utilization

    def __post_init__(self) -> None:
        for name in WHOLE:
            self._set(name, check_whole(name, getattr(self, name)))
        self._set("context", check_whole("context", self.context, most=MOST_TOKENS))
        if self.max_num_seqs is not None:
            self._set("max_num_seqs", check_whole("max_num_seqs", self.max_num_seqs))
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", *FORMATS))
        self._set("attention_policy", policy_name(self.attention_policy))
        check_page_size(self.page_size)
        self._set("gpu_memory_utilization", check_share("gpu_memory_utilization", self.gpu_memory_utilization))
        for name in ("host_kv_bytes", "disk_kv_bytes"):
            self._set(name, parse_bytes(name, getattr(self, name), least=0))
        if self.device_kv_bytes is not None:
            self._set("device_kv_bytes", parse_bytes("device_kv_bytes", self.device_kv_bytes))
        if self.disk_kv_bytes and not self.host_kv_bytes:
            raise ConfigError(
                "disk_kv_bytes is set and host_kv_bytes is 0: pages reach the disk by way of the host; raise it"
            )
        if self.max_num_batched_tokens < self.num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than the {self.num_seqs} answers that "
                "are to run at a time; raise it, or lower concurrency or max_num_seqs"
            )
        find_shard(self.model.config, self.layout, 0)  # refuses what the model cannot be cut into
        if not self.hardware.is_cpu:
            check_context_page_size(self.page_size, self.decode_context_parallel_size)
        self._check_nodes()
        self._set("cpu_attention", self._checked_cpu_attention())

    def _check_nodes(self) -> None:
        """Raises ConfigError unless the ranks fill the nodes evenly, with stages that lie whole on one each."""
        size, nodes = self.layout.size, self.nodes
        ranks = f"{self.tensor_parallel_size} x {self.pipeline_parallel_size} are {size} ranks"
        if size % nodes:
            raise ConfigError(
                f"tensor_parallel_size x pipeline_parallel_size, {ranks}, which {nodes} nodes cannot share evenly; "
                "change one of them, or nodes"
            )
        if nodes > 1 and self.ranks_per_node > self.node.gpus:
            raise ConfigError(
                f"tensor_parallel_size x pipeline_parallel_size, {ranks}, and {nodes} nodes of {self.node.gpus} GPUs "
                f"have {nodes * self.node.gpus}; lower one of them, or raise nodes"
            )
        if self.ranks_per_node % self.tensor_parallel_size and self.tensor_parallel_size % self.ranks_per_node:
            raise ConfigError(
                f"stages of {self.tensor_parallel_size} ranks would begin in the middle of nodes with "
                f"{self.ranks_per_node} each; let one of them divide the other"
            )

    def _checked_cpu_attention(self) -> str | float:
        """ "off", "auto" or the share as a number. Raises ConfigError."""
        value = check_share_or("cpu_attention", self.cpu_attention, ("off", "auto"))
        if value != "off" and not self.host_kv_bytes:
            raise ConfigError(
                f"cpu_attention is {value} and host_kv_bytes is 0, so that no page lies where a CPU reads it; raise "
                "the second, or leave the first out"
            )
        if value != "off" and self.decode_context_parallel_size > 1:
            raise ConfigError(
                f"cpu_attention is {value} and decode_context_parallel_size {self.decode_context_parallel_size}, whose "
                "ranks share out each page, so that the engine refuses it; leave one of them out"
            )
        return value

    @property
    def layout(self) -> Layout:
        """Of the ranks."""
        return Layout(self.tensor_parallel_size, self.pipeline_parallel_size, self.decode_context_parallel_size)

    @property
    def ranks_per_node(self) -> int:
        """On each node, neighbours."""
        return self.layout.size // self.nodes

    @property
    def nodes_per_stage(self) -> int:
        """Over which the ranks of a stage are spread."""
        return -(-self.tensor_parallel_size // self.ranks_per_node)

    @property
    def is_spread(self) -> bool:
        """Whether there is more than a tensor-parallel group on the GPUs of one machine."""
        return max(self.pipeline_parallel_size, self.decode_context_parallel_size, self.nodes) > 1 or (
            self.cpu_attention != "off"
        )

    @property
    def copies_of_kv(self) -> float:
        """How many ranks hold the KV of a token, for each layer and head, on average."""
        config = self.model.config
        held = sum(find_shard(config, self.layout, rank).num_kv_heads for rank in range(self.tensor_parallel_size))
        return held / config.num_key_value_heads / self.decode_context_parallel_size

    @property
    def page_tokens(self) -> int:
        """Of a page over all ranks of a context group."""
        return self.page_size * self.decode_context_parallel_size

    @property
    def run_dtype(self) -> str:
        """Of weights, activations and KV on the device."""
        return self.model.config.run_dtype(self.dtype)

    @property
    def kv_shown(self) -> str:
        """What KV is stored and read as, for people."""
        codes = "" if self.kv_cache_dtype == "auto" else f" and {self.kv_cache_dtype} below the device"
        policy = "" if self.attention_policy == FULL else f", read by {self.attention_policy}"
        return self.run_dtype + codes + policy

    @property
    def share_read(self) -> float:
        """The part of its pages that a token at the end of a request reads, one when it reads all."""
        policy, pages = parse_policy(self.attention_policy), pages_for(self.context, self.page_size)
        return 1.0 if policy is None else policy.num_chosen(pages, self.page_size) / pages

    @property
    def summary_tokens(self) -> float:
        """How many tokens' KV takes as many bytes as the summaries of a request's pages: half a token's for each mean
        key, see `PageSummaries`. A token that chooses by them reads all."""
        policy = parse_policy(self.attention_policy)
        if policy is None or not policy.needs_summaries:
            return 0
        return pages_for(self.context, self.page_size) * self.page_size / (2 * MEAN_TOKENS)

    @property
    def kind(self) -> Kind:
        """Of the machine that the hardware is."""
        return KINDS["cpu" if self.hardware.is_cpu else "cuda"]

    @property
    def unknown_options(self) -> list[str]:
        """Those that are set and that the engine refuses on such hardware, since no kernel there knows them."""
        refuses = self.attention_policy != FULL and not self.kind.follows_policies
        return ["attention_policy"] * refuses

    @property
    def item_bytes(self) -> int:
        """Bytes of a weight."""
        return ITEM_BYTES[self.run_dtype]

    @property
    def is_too_long(self) -> bool:
        """Whether the context has more positions than the model was made for, which the engine refuses."""
        return self.context > self.model.config.most_positions

    @property
    def num_seqs(self) -> int:
        """`max_num_seqs`, also where it is left out."""
        default = min(EngineConfig.max_num_seqs, self.max_num_batched_tokens)
        return max(default, self.concurrency) if self.max_num_seqs is None else self.max_num_seqs

    @property
    def engine_options(self) -> dict[str, Any]:
        """The options of the engine that do as planned, without those that are as by default."""
        options: dict[str, Any] = {name: getattr(self, name) for name in (*PARALLEL, "cpu_attention", "dtype")}
        options |= {"kv_cache_dtype": self.kv_cache_dtype, "attention_policy": self.attention_policy}
        options |= {"device_kv_bytes": self.device_kv_bytes, "host_kv_bytes": self.host_kv_bytes}
        options |= {"disk_kv_bytes": self.disk_kv_bytes or None, "page_size": self.page_size}
        is_whole = self.context >= self.model.config.most_positions
        options |= {"max_model_len": None if is_whole else self.context}
        options |= {"max_num_seqs": self.num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens}
        options |= {"gpu_memory_utilization": self.gpu_memory_utilization}
        return {name: value for name, value in options.items() if value != getattr(EngineConfig, name)}

    def on_devices_alone(self, **changes: Any) -> "PlanRequest":
        """The same without memory below the devices, where no codec has a part, but with `changes`."""
        alone = {"host_kv_bytes": 0, "disk_kv_bytes": 0, "kv_cache_dtype": "auto", "cpu_attention": "off"}
        return replace(self, **{**alone, **changes})

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
