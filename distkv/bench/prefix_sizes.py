"""The sizes of `distkv bench prefix`: of its prompts, and of the tiers in which it finds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distkv.config import EngineConfig
from distkv.errors import ConfigError
from distkv.storage.dtypes import ITEM_BYTES
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.storage.paging import check_page_size
from distkv.workers.bandwidth import PROBE_SHARE, READ_BYTES
from distkv.workers.model.model_config import ModelConfig

STEP_TOKENS = 2048  # the most of a step, as an engine has it unless told otherwise


@dataclass(frozen=True)
class Sizes:
    """The sizes of the prompts."""

    prefix: int  # tokens, whole pages
    page_size: int
    answer: int  # tokens

    @property
    def request_pages(self) -> int:
        """The pages of the prefix, and one for question and answer."""
        return self.prefix // self.page_size + 1

    @property
    def step_tokens(self) -> int:
        """Whole pages of which the prefix is a multiple, so that the question is read in a step of its own whether the
        prefix is cached or not: that rounds alike."""
        pages = self.prefix // self.page_size
        most = max(1, STEP_TOKENS // self.page_size)
        return self.page_size * max(count for count in range(1, most + 1) if pages % count == 0)


def check_sizes(sizes: Sizes, question: int, positions: int) -> None:
    """Raises ConfigError for sizes that do not go together, or not with a model of so many positions."""
    size = sizes.page_size
    check_page_size(size)
    if sizes.prefix % size or sizes.prefix < 2 * size:
        raise ConfigError(
            f"prefix-tokens {sizes.prefix} is not a whole number of pages of {size} tokens, at least 2; use "
            f"{max(2, -(-sizes.prefix // size)) * size}"
        )
    if question + sizes.answer > size:
        raise ConfigError(
            f"a question of {question} tokens and an answer of {sizes.answer} do not fit a page of {size}, so they "
            "would be cached too; lower answer-tokens or raise page-size"
        )
    if sizes.request_pages * size > positions:
        raise ConfigError(
            f"prefix-tokens {sizes.prefix} and a page for the answer are more than the {positions} positions of the "
            f"model; use at most {(positions // size - 1) * size}"
        )


def make_configs(model: Path, dtype: str, sizes: Sizes, folder: Path) -> dict[str, EngineConfig]:
    """An engine that has room for three requests on the device and none elsewhere, one that has room for one there, and
    one with a disk, large enough for its speed to be measured at start."""
    config = ModelConfig.load(model)
    itemsize = ITEM_BYTES[config.run_dtype(dtype)]
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    one = sizes.request_pages * sizes.page_size * token_bytes
    page = sizes.page_size * token_bytes
    spare = MAX_DISK_WRITES * page  # for pages on their way to disk
    measured = int(READ_BYTES / PROBE_SHARE) + page  # a tier has whole pages
    pools: dict[str, dict[str, Any]] = {
        "device": {"device_kv_bytes": 3 * one, "host_kv_bytes": 0},
        "host": {"device_kv_bytes": one, "host_kv_bytes": 4 * one},
        "disk": {
            "device_kv_bytes": 3 * one, "host_kv_bytes": 2 * one, "cache_dir": folder,
            "disk_kv_bytes": max(one + spare, measured),
        },
    }  # fmt: skip
    return {
        name: EngineConfig(
            model, dtype=dtype, page_size=sizes.page_size, num_threads=torch.get_num_threads(), max_num_seqs=1,
            max_model_len=sizes.request_pages * sizes.page_size, max_num_batched_tokens=sizes.step_tokens, **options,
        )
        for name, options in pools.items()
    }  # fmt: skip
