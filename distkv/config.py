"""All options of an engine, checked in one place."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from distkv.errors import ConfigError
from distkv.option_help import explained
from distkv.storage.paging import NUM_BUFFERS, PREFILL_SPLIT, check_page_size

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig` but the model, as keyword arguments of `LLM` and `AsyncLLM`.

    Names and types stand here once more, since a type checker cannot derive them; `tests/test_async.py` compares.
    """

    tensor_parallel_size: int
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    seed: int
    ray_address: str | None
    device: str
    device_kv_bytes: int | str | None
    host_kv_bytes: int | str | None
    disk_kv_bytes: int | str | None
    cache_dir: str | Path | None
    staging_pages: int | None
    enable_prefix_caching: bool
    disk_write_policy: str
    max_cold_bytes_per_step: int | str | None
    gpu_memory_utilization: float
    load_format: str
    num_threads: int | None


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
    dtype: str = "auto"
    """auto (the checkpoint's), float32, float16 or bfloat16.

    It is the type of weights, activations and KV.
    """
    max_model_len: int | None = None
    """Most tokens of prompt and answer together.

    None takes the model's limit.
    """
    max_num_seqs: int = 64
    """Most answers that run at a time."""
    max_num_batched_tokens: int = 2048
    """Most tokens of a step.

    Longer prompts are read in chunks of this size.
    """
    page_size: int = 256
    """Tokens of a KV page, a power of two from 16 on."""
    seed: int = 0
    """Seed of dummy weights, and of the requests that bring none of their own."""
    ray_address: str | None = None
    """Ray cluster to run on: host:port, auto or local.

    auto is the one that RAY_ADDRESS names, or else the one on this machine; local starts one. None with more than one
    rank is as auto, but for a cluster of another user, and starts one where there is none. The log says which it is.
    """
    device: str = "auto"
    """auto (CUDA where there is any), cuda or cpu."""
    device_kv_bytes: int | str | None = None
    """KV memory on the devices, such as 4GiB.

    It counts all ranks together, as a number of bytes or a text. None takes what gpu_memory_utilization leaves, or a
    quarter of the free memory on a CPU.
    """
    host_kv_bytes: int | str | None = None
    """KV memory of the CPU below the devices; 0 for none.

    It counts all ranks together. None takes a quarter of the free memory, or nothing where the device holds all that
    max_num_seqs answers can need.
    """
    disk_kv_bytes: int | str | None = None
    """KV memory on disk, such as 100GiB.

    It needs cache_dir, and counts all ranks together. None takes half of what is free there.
    """
    cache_dir: str | Path | None = None
    """Folder for KV pages on disk.

    It has a sub-folder for each model. None is for no pages on disk.
    """
    staging_pages: int | None = None
    """Pages of the ring that cold pages pass through.

    They do so on their way to attention, and one layer of each is held. None takes the least, which is four pieces of
    2048 tokens (a CPU needs two of them).
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
    max_cold_bytes_per_step: int | str | None = None
    """Most bytes of cold pages that a step streams.

    It counts all ranks together. Sequences beyond it wait for their turn, and one always runs. None takes what the
    slowest tier in use brings in about a second.
    """
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights, workspace and KV."""
    load_format: str = "auto"
    """auto, or dummy for random weights.

    auto reads the folder's safetensors; dummy makes seeded weights for its config.json.
    """
    num_threads: int | None = None
    """Torch threads of each CPU rank.

    None leaves torch's default in this process, where it has cores for them, and shares the cores out among Ray actors.
    """

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "page_size"):
            _check_positive(name, getattr(self, name))
        for name in ("max_model_len", "num_threads"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed!r}; it must be an integer from 0 to {2**31 - 1}")
        for name, choices in (
            ("dtype", ("auto", "float32", "float16", "bfloat16")),
            ("device", ("auto", "cuda", "cpu")),
            ("load_format", ("auto", "dummy")),
            ("disk_write_policy", ("write_through", "idle")),
            ("enable_prefix_caching", (True, False)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(str, choices))}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share!r}; use a share above 0 and at most 1")
        if not isinstance(self.model, str | Path):
            raise ConfigError(f"model is {self.model!r}; give the path of a Hugging Face model folder")
        if self.ray_address is not None and not isinstance(self.ray_address, str):
            raise ConfigError(f"ray_address is {self.ray_address!r}; give a text such as 'auto'")
        check_page_size(self.page_size)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "not every running answer could take a token in a step; raise the first or lower the second"
            )
        for name in ("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes", "max_cold_bytes_per_step"):
            value = getattr(self, name)
            if value is not None:
                is_off = name == "host_kv_bytes" and value in (0, "0")
                object.__setattr__(self, name, 0 if is_off else parse_bytes(name, value))
        self._check_tiers()

    @property
    def min_staging_pages(self) -> int:
        """Buffers for a piece of a prefix each, so that some are filled while others are used."""
        return NUM_BUFFERS * max(1, PREFILL_SPLIT // self.page_size)

    def _check_tiers(self) -> None:
        if self.cache_dir is not None and not isinstance(self.cache_dir, str | Path):
            raise ConfigError(f"cache_dir is {self.cache_dir!r}; give the path of a folder")
        if self.cache_dir is None and self.disk_kv_bytes is not None:
            raise ConfigError("disk_kv_bytes is set and cache_dir is not; name the folder in cache_dir")
        if self.cache_dir is not None and self.host_kv_bytes == 0:
            raise ConfigError(
                "cache_dir is set and host_kv_bytes is 0: pages reach the disk by way of the host; raise it"
            )
        if self.staging_pages is not None:
            _check_positive("staging_pages", self.staging_pages)
            if self.staging_pages < self.min_staging_pages:
                raise ConfigError(
                    f"staging_pages {self.staging_pages} is less than the {self.min_staging_pages} pages of "
                    f"{self.page_size} tokens that the ring needs; raise it or leave it out"
                )


def parse_bytes(name: str, size: int | str) -> int:
    """Bytes of a number or a text such as "512MB" or "4GiB"; raises ConfigError naming the option for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise ConfigError(f"{name} is {size!r}; give bytes as a positive number or a text such as 512MB or 4GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a positive integer")
