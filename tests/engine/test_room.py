"""Errors for want of room name the option that gives it, exactly: with that value it works."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.prompts import random_prompts

from distkv import LLM, CapacityError, SamplingParams

CODED = {"auto": 16 * 4, "int8": 16 + 4, "int4": 8 + 2 * 4}  # bytes of a token and head: codes and scales, or float32
PAGE_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # of 16 tokens: K and V, layers, KV heads, tokens, head_dim, float32


def test_sizes_that_an_engine_cannot_work_with(tiny_model: Path) -> None:
    with pytest.raises(CapacityError, match="less than one page") as refused:
        LLM(tiny_model, device_kv_bytes=100, host_kv_bytes="1MiB", max_num_batched_tokens=64)
    with LLM(tiny_model, host_kv_bytes="1MiB", max_num_batched_tokens=64, **named_option(refused)) as llm:
        assert llm.info.num_pages == 1, "a page of 256 tokens holds any request of this model"
    with pytest.raises(CapacityError, match="beside one being written") as refused:
        LLM(tiny_model, page_size=16, device_kv_bytes="64KiB", host_kv_bytes="1MiB", max_num_batched_tokens=128)
    options = {"page_size": 16, "host_kv_bytes": "1MiB", "max_num_batched_tokens": 128}
    with LLM(tiny_model, **options, **named_option(refused)) as llm:
        assert llm.info.num_pages == 9
        assert llm.generate(random_prompts(200), SamplingParams(max_tokens=56), use_tqdm=False)[0].error is None


@pytest.mark.parametrize(
    "tiers, codec",
    [((4, 0, 0), "auto"), ((5, 2, 0), "auto"), ((5, 2, 3), "auto"), ((5, 2, 0), "int4"), ((5, 2, 3), "int8")],
    ids=["device", "host", "disk", "host, int4", "disk, int8"],
)
def test_an_error_names_the_option_that_fits_and_the_longest_answer(
    tiny_model: Path, tmp_path: Path, tiers: tuple[int, int, int], codec: str
) -> None:
    prompt, params = [5] * 150, SamplingParams(max_tokens=60, ignore_eos=True)
    names = ("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes")
    coded = PAGE_BYTES * CODED[codec] // (16 * 4)
    bytes_of = dict(zip(names, (PAGE_BYTES, coded, coded), strict=True))
    sizes: dict[str, Any] = {name: count * bytes_of[name] for name, count in zip(names, tiers, strict=True)}
    sizes |= {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 4, "kv_cache_dtype": codec}
    sizes |= {"cache_dir": tmp_path} if tiers[2] else {"disk_kv_bytes": None}
    with LLM(tiny_model, **sizes) as small, pytest.raises(CapacityError, match="14 KV pages") as refused:
        small.generate([prompt], params, use_tqdm=False)
    most, held = tiers[0], sum(tiers)
    assert f"14 KV pages ({most * PAGE_BYTES + (14 - most) * coded} bytes)" in str(refused.value)
    assert f"hold {held} ({most * PAGE_BYTES + (held - most) * coded} bytes;" in str(refused.value)
    [(name, needed)] = named_option(refused).items()
    assert name == names[sum(map(bool, tiers)) - 1]
    with LLM(tiny_model, **sizes | {name: needed}) as enough:
        assert len(enough.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids) == 60
    with LLM(tiny_model, **sizes | {name: needed - 1}) as less, pytest.raises(CapacityError, match="13 "):
        less.generate([prompt], params, use_tqdm=False)


def test_an_error_names_the_longest_answer(tiny_model: Path) -> None:
    with LLM(tiny_model, page_size=16, device_kv_bytes=8 * PAGE_BYTES, host_kv_bytes=0) as small:
        for n in (1, 2):
            params = SamplingParams(max_tokens=100, n=n, ignore_eos=True)
            with pytest.raises(CapacityError, match="lower max_tokens to") as refused:
                small.generate([[5] * 40], params, use_tqdm=False)
            most = int(str(refused.value).rpartition(" ")[2])
            assert most == {1: 8 * 16, 2: 5 * 16}[n] - 40 + 1
            fits = small.generate([[5] * 40], msgspec.structs.replace(params, max_tokens=most), use_tqdm=False)[0]
            assert [len(one.token_ids) for one in fits.outputs] == n * [most]
            with pytest.raises(CapacityError):
                small.generate([[5] * 40], msgspec.structs.replace(params, max_tokens=most + 1), use_tqdm=False)


def named_option(refused: pytest.ExceptionInfo[CapacityError]) -> dict[str, int]:
    """The option that an error names on the command line, as `LLM` takes it."""
    [(flag, value)] = re.findall(r"\(--([a-z-]+) (\d+)\)", str(refused.value))
    return {flag.replace("-", "_"): int(value)}
