"""What a plan is asked for, checked."""

from dataclasses import dataclass
from typing import Any

from distkv.config import EngineConfig
from distkv.errors import ConfigError
from distkv.option_checks import check_choice, check_share, check_whole, parse_bytes
from distkv.planner.hardware import Hardware
from distkv.planner.model_shape import ModelShape
from distkv.storage.dtypes import DTYPES, ITEM_BYTES
from distkv.storage.paging import check_page_size

KV_DTYPES = (*DTYPES, "fp8", "int8")
"""Of KV. The engine stores it in its `dtype`; the last two, reckoned without scales, are for telling what quantising
would change."""
MOST_TOKENS = 2**40


@dataclass(frozen=True)
class PlanRequest:
    """A model, what it is to run on, and the work. Fields that `EngineConfig` has too mean the same here.

    Raises ConfigError for a value that cannot be planned for.

    Attributes:
        model: its shape.
        hardware: of each rank.
        tensor_parallel_size: ranks, a GPU each.
        dtype: of weights and activations; auto is the checkpoint's.
        kv_dtype: of KV, one of `KV_DTYPES`; auto is `dtype`, which is what the engine does.
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
    dtype: str = "auto"
    kv_dtype: str = "auto"
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
        for name in ("tensor_parallel_size", "concurrency", "page_size", "max_num_batched_tokens"):
            self._set(name, check_whole(name, getattr(self, name)))
        self._set("context", check_whole("context", self.context, most=MOST_TOKENS))
        if self.max_num_seqs is not None:
            self._set("max_num_seqs", check_whole("max_num_seqs", self.max_num_seqs))
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("kv_dtype", self.kv_dtype, ("auto", *KV_DTYPES))
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
        self.model.rank_parameters(0, self.tensor_parallel_size)  # refuses too many ranks

    @property
    def run_dtype(self) -> str:
        """Of weights and activations."""
        return self.model.config.run_dtype(self.dtype)

    @property
    def stored_dtype(self) -> str:
        """Of KV."""
        return self.run_dtype if self.kv_dtype == "auto" else self.kv_dtype

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
        options: dict[str, Any] = {"tensor_parallel_size": self.tensor_parallel_size, "dtype": self.dtype}
        options |= {"device_kv_bytes": self.device_kv_bytes, "host_kv_bytes": self.host_kv_bytes}
        options |= {"disk_kv_bytes": self.disk_kv_bytes or None, "page_size": self.page_size}
        is_whole = self.context >= self.model.config.most_positions
        options |= {"max_model_len": None if is_whole else self.context}
        options |= {"max_num_seqs": self.num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens}
        options |= {"gpu_memory_utilization": self.gpu_memory_utilization}
        return {name: value for name, value in options.items() if value != getattr(EngineConfig, name)}

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
