"""What a plan says of bytes is what engines allocate and ranks hold: in every dtype, with and without tiers, however
unevenly ranks share the heads."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import save_llama
from support.cpu_plans import CPU, plan_on_cpu, planned_bytes
from torch import Tensor

from distkv.config import EngineConfig
from distkv.errors import CapacityError
from distkv.kernels.activation import swiglu
from distkv.kernels.codec_format import FORMATS
from distkv.kernels.cpu_kernels import CPU_KERNELS
from distkv.kernels.linear import plain_linear
from distkv.kernels.token_kernels import gated
from distkv.launch.launch import launch
from distkv.planner.plan import Plan
from distkv.planner.ranks import make_rank_config
from distkv.planner.sizing import page_bytes, page_specs, pages_with_summaries, pool_sizes
from distkv.storage.dtypes import DTYPES
from distkv.workers import rank as rank_module
from distkv.workers.cache_place import CachePlace
from distkv.workers.group.communicators import Communicators
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.model.layout import Layout
from distkv.workers.model.llama import LlamaModel, load_llama
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard
from distkv.workers.model.weights import SafetensorsSource
from distkv.workers.rank import Rank
from distkv.workers.sizes import Capacity

KIB = 2**10
DEVICE_ONLY: dict[str, Any] = {"device_kv_bytes": 300 * KIB}
ALL_TIERS: dict[str, Any] = {"device_kv_bytes": 300 * KIB, "host_kv_bytes": 1000 * KIB, "disk_kv_bytes": 3000 * KIB}
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "vocab_size": 130}
LARGEST_STEP = 48  # tokens
PLAIN_KERNELS = replace(CPU_KERNELS, make_linear=plain_linear, make_gated_linear=gated(plain_linear, swiglu))


def planned(folder: Path, **more: Any) -> Plan:
    """For requests of 200 tokens and pages of 16."""
    return plan_on_cpu(folder, context=200, page_size=16, max_num_seqs=4, max_num_batched_tokens=LARGEST_STEP, **more)


def engine_config(plan: Plan, folder: Path, cache_dir: Path, **more: Any) -> EngineConfig:
    """The engine that the plan is of."""
    disk = {"cache_dir": cache_dir} if plan.request.disk_kv_bytes else {}
    options: dict[str, Any] = plan.request.engine_options | disk | more
    return EngineConfig(folder, device="cpu", **options)


@pytest.mark.parametrize(
    "options",
    [
        *({"dtype": dtype, **tiers} for dtype in DTYPES for tiers in (DEVICE_ONLY, ALL_TIERS)),
        *({"kv_cache_dtype": codec, "dtype": "bfloat16", **ALL_TIERS} for codec in FORMATS),
    ],
    ids=" ".join,
)
def test_an_engine_allocates_what_was_planned(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    plan = planned(tiny_model, **options)
    with closing(launch(engine_config(plan, tiny_model, tmp_path))) as engine:
        info = engine.info
    assert info.max_model_len == plan.request.context
    assert info.tier_bytes == planned_bytes(plan)
    assert (info.num_pages, info.num_host_pages, info.num_disk_pages) == tuple(tier.pages for tier in plan.fit.tiers)
    assert info.kv_bytes_per_token == plan.fit.kv_bytes_per_token
    assert info.cold_page_bytes == plan.fit.cold_kv_bytes_per_token * info.page_size == plan.fit.tiers[1].page_bytes
    assert (info.cold_page_bytes < info.page_bytes) == ("kv_cache_dtype" in options)
    assert info.pool_bytes and bool(info.num_disk_pages) == ("disk_kv_bytes" in options)


@pytest.mark.parametrize("policy", ["full", "top_pages(pages=4)"])
def test_what_is_left_to_the_engine_is_planned_too(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Without a size for the device it takes a quarter of the memory, less the staging ring and the summaries of all
    pages, of the device and of the host."""
    monkeypatch.setattr(rank_module, "available_bytes", lambda: CPU.memory_bytes)
    plan = planned(tiny_model, dtype="float32", host_kv_bytes=100 * KIB, attention_policy=policy)
    most = engine_config(plan, tiny_model, Path("/"), max_num_seqs=2**13, max_num_batched_tokens=2**13)
    with closing(launch(most)) as engine:
        info, [rank] = engine.info, plan.fit.ranks
    device, host, _ = planned_bytes(plan)
    each = 0 if policy == "full" else info.page_bytes // 32
    assert info.tier_bytes[1] == host and info.summary_bytes == (info.num_pages + info.num_host_pages) * each
    # the plan's are those of its four requests
    for num_bytes, summaries in (info.tier_bytes[0], info.summary_bytes), (device, 4 * 13 * each):
        assert rank.left - info.page_bytes - each < num_bytes + summaries <= rank.left
    if policy == "full":
        assert info.num_pages == plan.fit.tiers[0].pages and info.tier_bytes[0] == device


@given(*(st.integers(*ends) for ends in ((0, 200), (16, 99), (0, 9), (0, 150), (1, 300))))
def test_pages_and_summaries_fill_the_room(room: int, page: int, summary: int, others: int, most: int) -> None:
    def takes(pages: int) -> int:
        return pages * page + min(pages + others, most) * summary

    fits = [pages for pages in range(1, room + 1) if takes(pages) <= room * page]
    if summary and not fits:
        with pytest.raises(CapacityError, match=f"summaries of {summary} bytes of up to {most} pages"):
            pages_with_summaries(room, page, summary, others, most)
    else:
        assert pages_with_summaries(room, page, summary, others, most) == max(fits, default=0)


@pytest.mark.parametrize(
    "dtype, codec", [*((dtype, "auto") for dtype in DTYPES), ("bfloat16", "int8"), ("float32", "int4")]
)
@pytest.mark.parametrize("size", [1, 2, 4])  # of three KV heads: all, two and one, one of them held twice
def test_ranks_hold_what_was_planned(tmp_path: Path, size: int, dtype: str, codec: str) -> None:
    folder, _ = save_llama(tmp_path / "model", **UNEVEN, attention_bias=True, mlp_bias=True)
    plan = planned(folder, dtype=dtype, kv_cache_dtype=codec, tensor_parallel_size=size, **ALL_TIERS)
    config = engine_config(plan, folder, tmp_path)
    ranks = make_rank_config(config, plan.request.model.config, "cpu")
    sizes = pool_sizes(config, ranks, 200, Capacity(0, 0), 2**40)
    place = CachePlace(tmp_path / "kv")
    in_all = [0, 0, 0]
    for number, expected in enumerate(plan.fit.ranks):
        rank = Rank(ranks, Communicators(number, ProcessGroup(number, size)))  # it can do all but run
        with closing(rank):
            assert rank.allocate(sizes, place) == rank.pools.nbytes
            pools = rank.pools
            assert pools.device.data.nbytes == pools.nbytes[0] == sizes.device * expected.page_bytes
            assert pools.nbytes[1] == sizes.host * expected.cold_kv_bytes_per_token * 16
            assert pools.host.rows().nbytes == pools.nbytes[1]
            assert pools.ring.buffers.nbytes == expected.staging
            in_all = [sum(pair) for pair in zip(in_all, pools.nbytes, strict=True)]
    assert tuple(in_all) == planned_bytes(plan)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_weights_are_counted(tmp_path: Path, size: int, tied: bool) -> None:
    """As products on CUDA read them. A CPU keeps them in panels of 16 outputs, the last one filled up, and a tied
    embedding as it is besides."""
    folder, _ = save_llama(
        tmp_path, **UNEVEN, intermediate_size=113, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True
    )
    plan = planned(folder, dtype="bfloat16", tensor_parallel_size=size, **DEVICE_ONLY)
    config = plan.request.model.config
    for number, expected in enumerate(plan.fit.ranks):
        group, shard = ProcessGroup(number, size), Shard.of(config, Layout(size), number)
        with SafetensorsSource(folder) as source:
            model = load_llama(source, config, shard, group, torch.bfloat16, torch.device("cpu"), PLAIN_KERNELS)
        assert sum(one.nbytes for one in weights_of(model)) == expected.weights


def weights_of(model: LlamaModel) -> list[Tensor]:
    """All tensors that a model holds but the angles of its rotary embedding, each once."""
    parts = (model.layers, model.ends)
    return list({id(one): one for one in _tensors(parts)}.values())


def _tensors(held: Any) -> Iterator[Tensor]:
    """Tensors in tuples, lists, objects with fields, and functions that have bound them."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, list | tuple):
        for one in held:
            yield from _tensors(one)
    elif hasattr(held, "__dataclass_fields__"):
        yield from _tensors(list(vars(held).values()))
    elif callable(held):
        for cell in getattr(held, "__closure__", None) or ():
            yield from _tensors(cell.cell_contents)


def test_ranks_that_share_out_pages_hold_as_many_times_the_tokens(tmp_path: Path) -> None:
    """Of six ranks on 3 KV heads each pair holds a head: twice, or half of the tokens each. The disk holds it once."""
    folder, _ = save_llama(tmp_path, num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    model, found = ModelConfig.load(folder), []
    for context in 1, 2:
        config = EngineConfig(
            folder, tensor_parallel_size=6, decode_context_parallel_size=context, page_size=16, device_kv_bytes="1MiB",
            host_kv_bytes="2MiB", disk_kv_bytes="4MiB", cache_dir=tmp_path / "kv",
        )  # fmt: skip
        ranks = make_rank_config(config, model, "cpu")
        sizes = pool_sizes(config, ranks, 200, None, 2**40)
        found.append([pages * config.plan_page_size for pages in (sizes.device, sizes.host, sizes.disk)])
        assert page_bytes(ranks, page_specs(ranks))[2] == 16 * context * 2 * 2 * 3 * 16 * 4
    (device, host, disk), shared = found
    assert shared == [pytest.approx(2 * device, abs=32), pytest.approx(2 * host, abs=32), pytest.approx(disk, abs=32)]
