"""The promise of the product: logits are bit for bit the same wherever the pages lie, and the pages did lie there."""

import _pydecimal as decimal_module
import argparse
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.prompts import random_prompt
from support.runs import GREEDY, run

from distkv import LLM, SamplingParams
from distkv.kernels.codec_format import FORMATS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(
        tmp_path_factory.mktemp("model"), max_position_embeddings=8192, num_attention_heads=6, num_key_value_heads=3,
        hidden_size=96, head_dim=16,
    )[0]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_tiers_change_no_bit(folder: Path, tmp_path: Path, page_size: int, dtype: str) -> None:
    """A window of a few pages, with everything else on the host, and with most of that on disk."""
    prompt = random_prompt(13 * page_size + page_size // 2)
    options: dict[str, Any] = {"page_size": page_size, "max_num_batched_tokens": 2 * page_size, "max_num_seqs": 2}
    options |= {"kv_cache_dtype": dtype} if dtype in FORMATS else {"dtype": dtype}
    resident = run(folder, [prompt], pages=(None, 1 if dtype in FORMATS else 0, 0), **options)
    assert not resident.moved("host_streamed")

    on_host = run(folder, [prompt], pages=(3, 40, 0), **options)
    on_host.assert_same(resident)
    slices = cold_slices(len(prompt), GREEDY.max_tokens, page_size, window=3)
    assert on_host.moved("host_streamed") == slices * on_host.page_bytes
    assert on_host.moved("device_to_host") == (len(prompt) + 23) // page_size * on_host.page_bytes

    on_disk = run(folder, [prompt], pages=(3, 2, 40), cache_dir=tmp_path, **options)
    on_disk.assert_same(resident)
    assert on_disk.moved("host_streamed") + on_disk.moved("disk_streamed") == slices * on_disk.page_bytes
    assert on_disk.moved("disk_streamed") > 0.6 * slices * on_disk.page_bytes
    assert on_disk.peak[2] >= 7 and not on_disk.stats.pages_recomputed

    if page_size == 64 and dtype not in FORMATS:
        packed = run(
            folder, [prompt], pages=(3, 2, 40), cache_dir=tmp_path / "packed", disk_kv_codec="lossless", **options
        )
        packed.assert_same(resident)
        streamed = packed.moved("disk_streamed")
        assert packed.moved("host_streamed") + streamed == slices * packed.page_bytes and streamed
        assert 0.5 < packed.stats.disk_read_bytes / (streamed + packed.moved("disk_to_host")) < 1


def test_codes_that_save_nothing_are_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whether the device holds everything is only known when the engine starts."""
    for device, warns in (("64MiB", True), ("1MiB", False)):
        with LLM(folder, device_kv_bytes=device, kv_cache_dtype="int8", max_num_seqs=1) as llm:
            assert (llm.info.num_host_pages == 0) == warns
        assert ("no page leaves the device" in caplog.text) == warns
        caplog.clear()


def cold_slices(prompt_len: int, new_tokens: int, page_size: int, window: int) -> int:
    """Pages times steps that a single sequence must stream at least, with chunks of two pages: in each step all full
    pages of its past that do not lie in the window beside the pages that the step fills."""
    starts = [*range(0, prompt_len, 2 * page_size), prompt_len]
    steps = list(pairwise(starts)) + [(prompt_len + i, prompt_len + i + 1) for i in range(new_tokens - 1)]
    total = 0
    for start, end in steps:
        full = start // page_size
        held = min(full, window - (-(-end // page_size) - full))
        total += full - held
    return total


def test_a_mix_that_changes_during_the_run(folder: Path, tmp_path: Path) -> None:
    """Sequences of several lengths that end one after another: pages leave for host and disk and come back up."""
    prompts = [random_prompt(length, length) for length in (250, 40, 333, 90, 500, 7)]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (90, 60, 12, 30, 48, 110)]
    forks = SamplingParams(temperature=1, seed=3, n=3, max_tokens=40, ignore_eos=True)
    options = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 12}
    everything = [*prompts, random_prompt(100, 9)], [*params, forks]
    resident = run(folder, *everything, **options)
    for pages in ((20, 200, 0), (20, 12, 200)):
        mixed = run(folder, *everything, pages=pages, cache_dir=tmp_path / str(pages[2]), **options)
        mixed.assert_same(resident)
        assert mixed.moved("host_streamed") and mixed.moved("host_to_device")
        if pages[2]:
            assert mixed.moved("disk_streamed") and mixed.moved("host_to_disk") and mixed.moved("disk_to_host")


@pytest.mark.parametrize("length", [1300, pytest.param(8000, marks=pytest.mark.slow)])
def test_the_demo_model_on_real_text(demo_model: Path, tmp_path: Path, length: int) -> None:
    with LLM(demo_model, device_kv_bytes="64MiB", host_kv_bytes=0) as llm:
        prompt = llm.tokenizer.encode(stdlib_text())[:length]
    assert len(prompt) == length
    options = {"page_size": 64, "max_num_batched_tokens": 512, "max_num_seqs": 1}
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    resident = run(demo_model, [prompt], params, **options)
    tiered = run(demo_model, [prompt], params, pages=(10, 5, 200), cache_dir=tmp_path, **options)
    tiered.assert_same(resident)
    cold = length // 64 - 10
    assert tiered.moved("disk_streamed") > 5 * (cold - 5) * tiered.page_bytes > 0


def stdlib_text() -> str:
    """Long real text that every Python has."""
    return "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, decimal_module, inspect))
