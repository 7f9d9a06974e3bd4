"""A device that leaves a share of the pages to its host: the bits are those of one that leaves none, and the host has
what is its."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.prompts import random_prompt
from support.runs import Run, run
from support.thread_group import ranks_in_threads

from distkv import LLM, ConfigError, EngineConfig, SamplingParams
from distkv.kernels.codec_format import FORMATS
from distkv.launch.launch import check_config
from distkv.planner.sizing import host_share, rate_with_host
from distkv.storage.paging import is_hosts
from distkv.workers.sizes import Bandwidth, PoolSizes

SIMULATED: dict[str, Any] = {"device": "simulated", "link_bytes_per_second": "100GB"}
OPTIONS: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(
        tmp_path_factory.mktemp("model"), max_position_embeddings=8192, num_attention_heads=6, num_key_value_heads=3,
        hidden_size=96, head_dim=16,
    )[0]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_no_share_changes_a_bit(folder: Path, tmp_path: Path, dtype: str) -> None:
    """With everything on the host but a few pages, and with most of it on disk; and a CPU takes it for nothing."""
    prompts = [random_prompt(16 * 13 + 7, 1), random_prompt(65, 2), random_prompt(16 * 5, 3)]
    options = OPTIONS | ({"kv_cache_dtype": dtype} if dtype in FORMATS else {"dtype": dtype})
    expected = run(folder, prompts, pages=(None, 1 if dtype in FORMATS else 0, 0), **options)
    on_cpu = run(folder, prompts, pages=(6, 60, 0), cpu_attention=0.5, **options)
    on_cpu.assert_same(expected)
    assert not on_cpu.moved("host_attended") and on_cpu.moved("host_streamed")
    shares = {}
    for share in (0.3, 1.0):
        found = run(folder, prompts, pages=(6, 60, 0), cpu_attention=share, **SIMULATED, **options)
        found.assert_same(expected)
        shares[share] = found.moved("host_attended")
    assert 0.2 * shares[1.0] < shares[0.3] < 0.4 * shares[1.0]
    on_disk = run(folder, prompts, pages=(6, 3, 60), cache_dir=tmp_path, cpu_attention=0.5, **SIMULATED, **options)
    on_disk.assert_same(expected)
    assert on_disk.moved("disk_streamed") and on_disk.moved("host_attended")


def decoded(folder: Path, share: float | str, **options: Any) -> Run:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return run(folder, [random_prompt(16 * 20, 5)], params, cpu_attention=share, **options)


def test_pages_of_the_share_leave_the_device_to_the_others(folder: Path) -> None:
    """Of 20 pages the host attends to 10 in each step, 2 stay on the device beside the one being written, and 8
    stream."""
    options = SIMULATED | OPTIONS | {"max_num_seqs": 1, "pages": (4, 40, 0)}
    halved, alone = decoded(folder, 0.5, **options), decoded(folder, "off", **options)
    halved.assert_same(alone)
    steps = 39
    assert halved.moved("host_attended") / halved.page_bytes == pytest.approx(10.5 * steps, abs=steps)
    saved = alone.moved("host_streamed") - halved.moved("host_streamed")
    assert saved / halved.page_bytes == pytest.approx(10 * steps, abs=2 * steps)


def test_drafts_are_checked_on_both(folder: Path) -> None:
    """Several tokens of a step meet the same pages, and some of a page that is filled by the first of them."""
    prompt = random_prompt(40, 8) * 4
    options = OPTIONS | {"max_num_seqs": 9, "speculative_config": {"method": "ngram", "adaptive": False}}
    expected = run(folder, [prompt], **options)
    found = run(folder, [prompt], pages=(6, 60, 0), cpu_attention=0.5, **SIMULATED, **options)
    assert [one.outputs[0].token_ids for one in found.outputs] == [one.outputs[0].token_ids for one in expected.outputs]
    assert found.moved("host_attended")


def test_each_rank_shares_with_its_own_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages, which cut chunks of prompts into micro-batches, and tensor ranks, each with a part of the layers and
    heads."""
    prompts = [random_prompt(600, 1), random_prompt(70, 2)]
    options = OPTIONS | {"tensor_parallel_size": 2, "num_threads": 1, "dtype": "bfloat16"}
    options["max_num_batched_tokens"] = 512
    with ranks_in_threads(monkeypatch):
        expected = run(folder, prompts, **options)
        for stages in (1, 2):
            layout = {"pipeline_parallel_size": stages, "cpu_attention": 0.5, "pages": (40, 80, 0)}
            found = run(folder, prompts, **layout, **SIMULATED, **options)
            found.assert_same(expected)
            assert found.moved("host_attended") and found.moved("host_streamed")


def test_which_pages_are_the_hosts() -> None:
    for share in (0.1, 0.37, 0.5, 1.0):
        mine = [is_hosts(page, share) for page in range(1000)]
        assert sum(mine) == pytest.approx(1000 * share, abs=1)
        gaps = [sum(mine[first : first + 100]) for first in range(0, 901, 50)]
        assert max(gaps) - min(gaps) <= 1, "evenly"


def test_the_share_is_the_ratio_of_the_rates() -> None:
    config = EngineConfig("/", cpu_attention="auto", page_size=16, max_num_seqs=2)
    rates = [Bandwidth(10.0, 1.0, 31.0), Bandwidth(11.0, 1.0, 30.0)]
    sizes = PoolSizes(device=10, host=30)
    assert host_share(config, "simulated", 16000, sizes, rates) == pytest.approx(0.75 * 0.75, abs=1e-3), (
        "of what is not on the device"
    )
    assert host_share(config, "simulated", 160, sizes, rates) == 0.75 * 0.5, "two requests of 10 pages"
    assert host_share(config, "simulated", 80, sizes, rates) == 0, "all of them fit there"
    assert host_share(config, "cpu", 16000, sizes, rates) == 0
    assert host_share(config, "simulated", 16000, PoolSizes(device=10), rates) == 0
    assert rate_with_host(Bandwidth(10.0, 1.0, 30.0), 0.75) == 40, "both at a time"
    assert rate_with_host(Bandwidth(10.0, 1.0, 30.0), 0.0) == 10
    assert rate_with_host(Bandwidth(10.0, 1.0, 30.0), 1.0) == 30


def test_auto_is_measured_at_the_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distkv")
    with LLM(folder, cpu_attention="auto", device_kv_bytes="1MiB", page_size=16, **SIMULATED) as llm:
        share = llm.info.host_share
        assert 0 < share < 1 and llm.info.kv_policy is None
    assert f"the CPU attends to {share:g} of the pages" in caplog.text


def test_what_is_refused(folder: Path) -> None:
    for value in ("on", 0, 1.5, "0", None, True):
        with pytest.raises(ConfigError, match=r"cpu_attention is .*; use off, auto or a share above 0 and at most 1"):
            EngineConfig("/", cpu_attention=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cpu_attention is set and host_kv_bytes is 0"):
        EngineConfig("/", cpu_attention=0.5, host_kv_bytes=0)
    both = EngineConfig(folder, cpu_attention=0.5, tensor_parallel_size=6, decode_context_parallel_size=2)
    with pytest.raises(ConfigError, match="cpu_attention is set and decode_context_parallel_size is 2"):
        check_config(both)
    with pytest.raises(ConfigError, match="cpu_attention is set and attention_policy is top_pages"):
        EngineConfig("/", cpu_attention="auto", attention_policy="top_pages(pages=2)")
