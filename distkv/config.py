"""All options of an engine, checked in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from distkv.errors import ConfigError
from distkv.kernels.codec_format import FORMATS
from distkv.option_checks import (
    check_amount,
    check_choice,
    check_flag,
    check_ray_address,
    check_share,
    check_share_or,
    check_whole,
    parse_bytes,
    raise_to,
    settle_path,
)
from distkv.option_effects import check_effects
from distkv.option_help import explained
from distkv.speculative_config import SpeculativeConfig
from distkv.storage.page_spec import DISK_CODECS
from distkv.storage.paging import NUM_BUFFERS, PREFILL_SPLIT, check_context_page_size, check_page_size
from distkv.workers.attention.policies.registry import FULL, policy_name

REBUILD_SECONDS = 600.0  # `EngineConfig.rebuild_timeout` unless it is given


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig` but the model, as keyword arguments of `LLM` and `AsyncLLM`.

    Names and types stand here once more, since a type checker cannot derive them; `tests/test_async.py` compares.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    max_rank_failures: int | None
    hang_timeout: float | None
    rebuild_timeout: float | None
    min_tensor_parallel_size: int | None
    dtype: str
    kv_cache_dtype: str
    max_model_len: int | None
    max_prompt_tokens: int | None
    max_num_seqs: int
    max_queued_requests: int | None
    max_num_batched_tokens: int
    page_size: int
    decode_context_parallel_size: int
    seed: int
    ray_address: str | None
    device: str
    link_bytes_per_second: int | str | None
    device_kv_bytes: int | str | None
    host_kv_bytes: int | str | None
    disk_kv_bytes: int | str | None
    max_share_per_salt: float | None
    cache_dir: str | Path | None
    disk_kv_codec: str
    max_sessions: int | None
    max_session_bytes: int | str | None
    staging_pages: int | None
    enable_prefix_caching: bool
    disk_write_policy: str
    save_timeout: float | None
    max_cold_bytes_per_step: int | str | None
    gpu_memory_utilization: float
    load_format: str
    num_threads: int | None
    trace: str | Path | None
    batch_invariant: bool | None
    attention_policy: str
    attention_audit: int | None
    cpu_attention: float | str
    speculative_config: SpeculativeConfig | dict[str, Any] | str | None


@explained
@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine; raises ConfigError when one is out of range."""

    model: str | Path
    """Folder of a Hugging Face model."""
    tensor_parallel_size: int = 1
    """Ranks that share the model; more than one run as Ray actors.

    A single one runs in this process.
    """
    pipeline_parallel_size: int = 1
    """Stages that the layers are split over, of tensor_parallel_size ranks each.

    Each stage has the weights and the KV of its layers alone, with tiers of its own. A step is cut into micro-batches,
    so that stages work at the same time; answers stay the same. It is for models or contexts that no node holds, since
    stages exchange little.
    """
    data_parallel_size: int = 1
    """Engines of this model on a Ray cluster, each of its own ranks.

    They share the requests: one goes where its beginning is known, as long as that has room. All other options are of
    one engine; with cache_dir each has a sub-folder of it. Work begins with the first that runs, and those that find no
    room are started later.
    """
    max_rank_failures: int | None = None
    """Lost ranks within ten minutes that are made good; on Ray serve has 10, batch 20.

    An engine on Ray that has lost a rank is started anew, and its requests go on where they stood: their answers pause
    and then have the same tokens. One failure more raises WorkerDied. None makes none good.
    """
    hang_timeout: float | None = None
    """Seconds of silence beyond the longest so far after which ranks count as lost.

    It is for ranks on Ray whose processes are there and do not go on: one that was stopped, a network or a device that
    is stuck. While an engine starts only stopped ones count, since loading and compiling may take long. None is 60.
    """
    rebuild_timeout: float | None = None
    """Seconds that requests wait for room in the cluster where no engine is left.

    They end with an error then, and so do those that come later, until an engine runs again. It goes with
    max_rank_failures. None is 600.
    """
    min_tensor_parallel_size: int | None = None
    """Fewest ranks that an engine is started anew with.

    Where all tensor_parallel_size have found no room for half a minute (or half of rebuild_timeout, if that is less),
    as many are taken as there is room for and the heads allow. They take the parts of all in sums, so that answers stay
    the same, but on CUDA without batch_invariant. None always waits for all. It goes with max_rank_failures.
    """
    dtype: str = "auto"
    """auto (the checkpoint's), float32, float16 or bfloat16.

    It is the type of weights, activations and KV.
    """
    kv_cache_dtype: str = "auto"
    """Full KV pages as codes below the device: auto (none), fp8_e4m3, int8 or int4.

    Answers are then not those of auto, though still the same bits wherever a page lies; `distkv bench quality` says
    what is lost. Pages on the device keep the size of dtype, for speed. It needs head_dim a multiple of 16, and CUDA
    or a CPU with native kernels.
    """
    max_model_len: int | None = None
    """Most tokens of prompt and answer together.

    None takes the model's limit.
    """
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt.

    A text that must have more is refused before it is encoded. None is for all that max_model_len has room for.
    """
    max_num_seqs: int = 64
    """Most answers that run at a time."""
    max_queued_requests: int | None = None
    """Most answers that wait beside those that run; serve has 1024.

    What is asked for beyond them is refused with QueueFull, over HTTP with status 429. It counts all engines together.
    None is for any number, as who calls LLM or AsyncLLM knows how much they ask for.
    """
    max_num_batched_tokens: int = 2048
    """Most tokens of a step.

    Longer prompts are read in chunks of this size.
    """
    page_size: int = 256
    """Tokens of a KV page, a power of two from 16 on."""
    decode_context_parallel_size: int = 1
    """Ranks that share out each page: more ranks than KV heads hold more tokens.

    It divides tensor_parallel_size. So many neighbouring ranks keep page_size tokens each of a page that is as many
    times as long, in memory and on disk, and exchange what they find in them. Answers stay the same, bit for bit, on
    CUDA with batch_invariant and some numbers of ranks (docs/invariance.md). It needs native kernels on CPUs, page_size
    256 or more on CUDA, and whole KV heads in each such group: 3 of them on 6 ranks are 3 groups of 2.
    """
    seed: int = 0
    """Seed of dummy weights, and of the requests that bring none of their own."""
    ray_address: str | None = None
    """Ray cluster to run on: host:port, auto or local.

    auto is the one that RAY_ADDRESS names, or else the one on this machine; local starts one. None with more than one
    rank is as auto, but for a cluster of another user, and starts one where there is none. The log says which it is.
    """
    device: str = "auto"
    """auto (CUDA where there is any), cuda, cpu or simulated.

    simulated is a CPU whose device tier lies behind a link of link_bytes_per_second: what crosses it is there no sooner
    than such a link would have brought it. It shows what a slow link does to steps where there is no GPU; what it
    computes takes the time of a CPU, and answers are those of one. It needs native kernels.
    """
    link_bytes_per_second: int | str | None = None
    """Rate of a simulated device's link each way, such as 4GB.

    It is of each rank, and goes with device simulated.
    """
    device_kv_bytes: int | str | None = None
    """KV memory on the devices, such as 4GiB.

    It counts all ranks together, as a number of bytes or a text. None takes what gpu_memory_utilization leaves, or a
    quarter of the free memory on a CPU.
    """
    host_kv_bytes: int | str | None = None
    """KV memory of the CPU below the devices; 0 for none.

    It counts all ranks together. None takes a quarter of the free memory, of which 32 GiB at most on a machine where it
    is pinned for CUDA, or nothing where the device holds all that max_num_seqs answers can need.
    """
    disk_kv_bytes: int | str | None = None
    """KV memory on disk, such as 100GiB; it needs cache_dir.

    It counts all ranks together, but not the pages of other models there. None takes half of what is free.
    """
    cache_dir: str | Path | None = None
    """Folder for KV pages on disk.

    It has a sub-folder for each model. A relative path begins where the process is when the engine is made, and ~ is
    the home folder. None is for no pages on disk.
    """
    disk_kv_codec: str = "none"
    """How KV pages are stored on disk: none (as they are) or lossless.

    lossless compresses them without changing a bit, to three quarters or so where they are bfloat16. That takes time of
    a core, so it is faster where the disk is slow. What one of them has written is not read with the other.
    """
    max_share_per_salt: float | None = None
    """Share of device and host for pages of one cache_salt, such as 0.25.

    A number above 0 and below 1. Beyond it they make room first, and requests of that salt wait for their own to end;
    those without a salt count as one. None is for no limit.
    """
    max_sessions: int | None = None
    """Most sessions that cache_dir holds.

    A new one beyond them is refused, and the others go on. Responses that a server stores do not count. None is for any
    number.
    """
    max_session_bytes: int | str | None = None
    """Most bytes of a session's file, such as 1MiB.

    A turn that has no room left is refused, and the session stays as it is. None is for as many as conversations of
    max_model_len tokens take.
    """
    staging_pages: int | None = None
    """Pages of the ring that cold pages pass through.

    They do so on their way to attention, and one layer of each is held. It is at least four pieces of 2048 tokens (a
    CPU needs two of them). None takes that, and four times as much on CUDA.
    """
    enable_prefix_caching: bool = True
    """Keep full KV pages for later prompts that begin alike.

    Pages of ended requests stay, in whatever tier they lie, for later requests that begin with the same tokens; with
    cache_dir also for later processes.
    """
    disk_write_policy: str = "write_through"
    """When full pages go to disk: write_through (at once) or idle.

    write_through writes pages that later requests may use as soon as they are full, idle when no request holds them any
    more.
    """
    save_timeout: float | None = None
    """Most seconds that the end may take to write KV pages to disk.

    It is for those that are not there yet. Pages of the requests that ran last come first, each prompt from its
    beginning on, so that what is saved in time can be used. None writes all of them.
    """
    max_cold_bytes_per_step: int | str | None = None
    """Most bytes of cold pages that a step streams.

    It counts all ranks together. Sequences beyond it wait for their turn, and one always runs. None takes what the
    slowest tier in use brings in about a second.
    """
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights, workspace and KV.

    It is not used on a CPU.
    """
    load_format: str = "auto"
    """auto, or dummy for random weights.

    auto reads the folder's safetensors; dummy makes seeded weights for its config.json.
    """
    num_threads: int | None = None
    """Torch threads of each CPU rank, at most a core each.

    None leaves torch's default in this process, where it has cores for them, and shares the cores out among Ray actors.
    """
    trace: str | Path | None = None
    """File for a trace of all steps, which Perfetto opens.

    It is Chrome's JSON: what the leader and each rank compute, fetch, spill, read and write, on which thread or lane of
    a GPU. It is written as the engine goes on. On Ray the process that makes the engine writes it.
    """
    batch_invariant: bool | None = None
    """On CUDA: give an answer the same bits whatever runs beside it.

    Nor do they depend on max_num_batched_tokens, or on how much of a prompt was cached. Products are then by kernels of
    distkv instead of cuBLAS. None is off on CUDA. A CPU always does so, and refuses False.
    """

    attention_policy: str = FULL
    """KV pages that an answer's tokens attend to: full, sink_window, top_pages or decay.

    sink_window(sinks=4, window=4096) is the first and the newest tokens, top_pages(share=0.1) the likeliest tenth of
    the pages; top_pages(pages=64) takes a number of them instead. decay(share=0.1) is the tenth that tokens before have
    attended to most, of which each token's part counts half as much half_life=16 tokens later; what an answer's token
    does not attend to, none behind it does. Tokens of a prompt attend to all pages. Anything but full changes answers,
    and needs the native kernels of a CPU.
    """
    attention_audit: int | None = None
    """Measure in one of so many steps how much of all attention the chosen pages have.

    Those steps read all pages of the answers that are being written; the answers stay as they are. It goes with
    attention_policy, and stats tell what was found. None measures nothing.
    """
    cpu_attention: float | str = "off"
    """Share of the KV pages that an answer's tokens meet on the CPU: off, auto or such as 0.4.

    The CPU attends to these where they lie on the host, while the device attends to its own and the others cross the
    link: so decode of what does not fit on the device goes at the rate of both. The share is of the full pages of each
    sequence, spread evenly; they leave the device first. auto has CPU and link done at the same time, by rates that are
    measured at the start, when requests fill device and host. It needs native kernels. On CUDA last bits of answers are
    those of the share, so batch_invariant is refused, and so is auto with cache_dir. On a CPU, its own host, it changes
    nothing.
    """
    speculative_config: SpeculativeConfig | dict[str, Any] | str | None = None
    """Draft tokens and check several in a step: {"method": "ngram"}, as JSON.

    A step then reads the context once for all of them; answers stay the same, bit for bit. ngram drafts what followed
    the newest tokens where they stood before, so it pays for answers that quote; prompt_lookup_min (2) and
    prompt_lookup_max (8) are the newest tokens that are looked for. self drafts by the model over the pages on the
    device alone, so it pays where most lie below. draft_model has a small model draft, of the folder
    "model", with draft_kv_bytes for its keys and values (max_model_len tokens). num_speculative_tokens is the most of a
    draft (8); "adaptive": false has drafts as long as may be, where otherwise they are as long as pays. On CUDA it
    turns batch_invariant on.
    """

    def __post_init__(self) -> None:
        self._set("model", settle_path("model", self.model))
        sizes: tuple[str, ...] = (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "page_size",
            "decode_context_parallel_size",
        )
        for name in sizes:
            self._set(name, check_whole(name, getattr(self, name)))
        whole = (
            "max_model_len",
            "max_prompt_tokens",
            "num_threads",
            "staging_pages",
            "min_tensor_parallel_size",
            "attention_audit",
        )
        for name in whole:
            if getattr(self, name) is not None:
                self._set(name, check_whole(name, getattr(self, name)))
        self._set("seed", check_whole("seed", self.seed, 0))
        for name in ("max_queued_requests", "max_rank_failures", "max_sessions"):
            if getattr(self, name) is not None:
                self._set(name, check_whole(name, getattr(self, name), 0))
        for name in ("hang_timeout", "save_timeout", "rebuild_timeout"):
            if getattr(self, name) is not None:
                self._set(name, check_amount(name, getattr(self, name)))
        for name, choices in (
            ("dtype", ("auto", "float32", "float16", "bfloat16")),
            ("kv_cache_dtype", ("auto", *FORMATS)),
            ("device", ("auto", "cuda", "cpu", "simulated")),
            ("load_format", ("auto", "dummy")),
            ("disk_write_policy", ("write_through", "idle")),
            ("disk_kv_codec", DISK_CODECS),
        ):
            check_choice(name, getattr(self, name), choices)
        self._set("enable_prefix_caching", check_flag("enable_prefix_caching", self.enable_prefix_caching))
        if self.batch_invariant is not None:
            self._set("batch_invariant", check_flag("batch_invariant", self.batch_invariant))
        self._set("gpu_memory_utilization", check_share("gpu_memory_utilization", self.gpu_memory_utilization))
        if self.max_share_per_salt is not None:
            self._set("max_share_per_salt", check_share("max_share_per_salt", self.max_share_per_salt))
        self._set("attention_policy", policy_name(self.attention_policy))
        self._set("cpu_attention", check_share_or("cpu_attention", self.cpu_attention, ("off", "auto")))
        if self.speculative_config is not None:
            self._set_speculation(SpeculativeConfig.parse(self.speculative_config))
        check_ray_address(self.ray_address)
        check_page_size(self.page_size)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "not every running answer could take a token in a step; raise the first or lower the second"
            )
        in_bytes = (
            "device_kv_bytes",
            "host_kv_bytes",
            "disk_kv_bytes",
            "max_cold_bytes_per_step",
            "max_session_bytes",
            "link_bytes_per_second",
        )
        for name in in_bytes:
            if getattr(self, name) is not None:
                self._set(name, parse_bytes(name, getattr(self, name), least=0 if name == "host_kv_bytes" else 1))
        if self.device == "simulated" and self.link_bytes_per_second is None:
            raise ConfigError(
                "device is simulated and link_bytes_per_second is not set; give the rate of its link, such as 4GB"
            )
        least, size = self.min_tensor_parallel_size, self.tensor_parallel_size
        if least is not None and least >= size:
            raise ConfigError(
                f"min_tensor_parallel_size {least} is not less than tensor_parallel_size {size}; lower the first, or "
                "leave it out"
            )
        self._check_context_groups()
        self._check_tiers()
        check_effects(self)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, as it was checked."""
        assert isinstance(self.speculative_config, SpeculativeConfig | None)
        return self.speculative_config

    @property
    def plan_page_size(self) -> int:
        """Tokens of a page over all ranks that share it out."""
        return self.page_size * self.decode_context_parallel_size

    @property
    def num_ranks(self) -> int:
        """Of each engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def is_on_ray(self) -> bool:
        """Whether the ranks are Ray actors."""
        return self.num_ranks > 1 or self.data_parallel_size > 1 or self.ray_address is not None

    @property
    def kv_policy(self) -> str | None:
        """What answers differ by from those of the exact cache: options, by their names; None where nothing does."""
        parts = [] if self.attention_policy == FULL else [self.attention_policy]
        parts += [] if self.kv_cache_dtype == "auto" else [f"kv_cache_dtype={self.kv_cache_dtype}"]
        return ", ".join(parts) or None

    @property
    def seconds_to_rebuild(self) -> float:
        """`rebuild_timeout`, or what stands for it."""
        return REBUILD_SECONDS if self.rebuild_timeout is None else self.rebuild_timeout

    @property
    def min_staging_pages(self) -> int:
        """Buffers for a piece of a prefix each, so that some are filled while others are used."""
        return NUM_BUFFERS * max(1, PREFILL_SPLIT // self.page_size)

    def _set(self, name: str, value: object) -> None:
        """What a user has given as the one type that all of distkv reads."""
        object.__setattr__(self, name, value)

    def _set_speculation(self, found: SpeculativeConfig) -> None:
        """Several tokens of a step must have the bits of one by one."""
        self._set("speculative_config", found)
        if self.batch_invariant is None:
            self._set("batch_invariant", True)
        if not self.batch_invariant:
            raise ConfigError(
                "speculative_config is set and batch_invariant is False, by which drafts could change answers; leave "
                "one of them out"
            )
        if self.attention_policy != FULL:
            raise ConfigError(
                f"speculative_config is set and attention_policy is {self.attention_policy}, by which a token that is "
                "drafted in vain would count; leave one of them out"
            )
        if found.method == "self" and self.host_kv_bytes == 0:
            raise ConfigError(
                "speculative_config has method self and host_kv_bytes is 0: it drafts by the pages that are resident, "
                "and none leaves the device; use ngram, or raise host_kv_bytes"
            )
        if self.max_num_seqs <= found.num_speculative_tokens:
            raise ConfigError(
                f"speculative_config has num_speculative_tokens {found.num_speculative_tokens}, which with the one "
                f"before are more than the max_num_seqs {self.max_num_seqs} that a step samples at most; "
                f"{raise_to('max_num_seqs', found.num_speculative_tokens + 1)}"
            )

    def _check_context_groups(self) -> None:
        size, context = self.tensor_parallel_size, self.decode_context_parallel_size
        if context == 1:
            return
        if size % context:
            raise ConfigError(
                f"decode_context_parallel_size {context} does not divide tensor_parallel_size {size}; use one that "
                "does, or leave it out"
            )
        if self.device == "cuda":
            check_context_page_size(self.page_size, context)
        for name, value, why in (
            ("attention_policy", self.attention_policy != FULL, "which chooses among the pages of a rank"),
            ("min_tensor_parallel_size", self.min_tensor_parallel_size, "by which other ranks would share out pages"),
        ):
            if value:
                raise ConfigError(
                    f"decode_context_parallel_size is {context} and {name} is {getattr(self, name)}, {why}; leave one "
                    "of them out"
                )

    def _check_tiers(self) -> None:
        if self.trace is not None:
            self._set("trace", settle_path("trace", self.trace))
        if self.cache_dir is not None:
            self._set("cache_dir", settle_path("cache_dir", self.cache_dir))
        if self.cache_dir is not None and self.host_kv_bytes == 0:
            raise ConfigError(
                "cache_dir is set and host_kv_bytes is 0: pages reach the disk by way of the host; raise it"
            )
        if self.staging_pages is not None and self.staging_pages < self.min_staging_pages:
            raise ConfigError(
                f"staging_pages {self.staging_pages} is less than the {self.min_staging_pages} pages of "
                f"{self.page_size} tokens that the ring needs; raise it or leave it out"
            )
