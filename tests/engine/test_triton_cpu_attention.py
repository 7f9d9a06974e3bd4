"""The engine with the CUDA kernels, interpreted on a CPU, where the host attends to a share of the pages by its own."""

from pathlib import Path
from typing import Any

import pytest
from support import triton_on_cpu
from support.checkpoints import save_llama
from support.measures import relative_error
from support.prompts import random_prompts
from support.runs import Run, run

from distkv import LLM, ConfigError, SamplingParams
from distkv.workers.attention import cuda as cuda_attention
from distkv.workers.attention import decode_plan
from distkv.workers.kinds import KINDS
from distkv.workers.runners import cuda_runner

pytestmark = pytest.mark.interpreter
OPTIONS: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 3}


@pytest.fixture(autouse=True)
def on_the_cuda_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """With splits of 16 tokens, so that contexts need not be so long for the interpreter."""
    monkeypatch.setitem(KINDS, "cpu", triton_on_cpu.KIND)
    for module in (decode_plan, cuda_runner):
        monkeypatch.setattr(module, "DECODE_SPLIT", 16)


def test_the_share_decides_alone(tmp_path: Path) -> None:
    """The same bits with all pages on the device too, of which the newest have not reached the host, and with most on
    disk; near to those without a share."""
    folder, _ = save_llama(tmp_path / "model", num_hidden_layers=1, head_dim=16, max_position_embeddings=256)
    prompts = random_prompts(90, 20)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    alone = run(folder, prompts, params, pages=(16, 16, 0), **OPTIONS)
    shared = run(folder, prompts, params, pages=(16, 16, 0), cpu_attention=0.5, **OPTIONS)
    assert shared.moved("host_attended") and not shared.moved("host_streamed")
    assert_near(shared, alone)
    on_disk = run(folder, prompts, params, pages=(6, 3, 20), cache_dir=tmp_path / "kv", cpu_attention=0.5, **OPTIONS)
    on_disk.assert_same(shared)
    assert on_disk.moved("disk_streamed")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_the_share_decides_alone_in_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """The same with codes, and with states that go through rounds."""
    folder, _ = save_llama(tmp_path / "model", num_hidden_layers=1, head_dim=16, max_position_embeddings=512)
    prompts = random_prompts(300, 40)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 4)]
    options = OPTIONS | {"kv_cache_dtype": codec, "cpu_attention": 0.5}
    shared = run(folder, prompts, params, pages=(28, 28, 0), **options)
    mixed = run(folder, prompts, params, pages=(8, 40, 0), **options)
    mixed.assert_same(shared)
    assert mixed.moved("host_streamed") and mixed.moved("host_attended")
    monkeypatch.setattr(cuda_attention, "STATE_BYTES", 1)
    run(folder, prompts, params, pages=(8, 6, 40), cache_dir=tmp_path / "kv", **options).assert_same(shared)


def assert_near(mine: Run, other: Run) -> None:
    for one, two in zip(mine.logits, other.logits, strict=True):
        assert relative_error(one, two) < 1e-4


def test_what_is_told_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = save_llama(tmp_path / "model", num_hidden_layers=1, head_dim=16)
    sizes = {"device_kv_bytes": "64KiB", "host_kv_bytes": "256KiB"}
    with LLM(folder, cpu_attention=0.25, cache_dir=tmp_path / "kv", **sizes, **OPTIONS) as llm:
        [output] = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1), use_tqdm=False)
        assert output.kv_policy == llm.info.kv_policy == "cpu_attention=0.25"
        shared = llm.info.fingerprint
    with LLM(folder, cache_dir=tmp_path / "kv", **sizes, **OPTIONS) as llm:
        assert llm.info.fingerprint != shared and llm.info.kv_policy is None
    for options, message in (
        ({"batch_invariant": True}, "cpu_attention is set and batch_invariant is True"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config turns"),
        ({"cpu_attention": "auto", "cache_dir": tmp_path / "kv"}, "cpu_attention is auto and cache_dir is set"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(folder, **({"cpu_attention": 0.5} | sizes | OPTIONS | options))
    monkeypatch.setattr(cuda_runner, "DECODE_SPLIT", 256)
    with pytest.raises(ConfigError, match="cpu_attention is set and page_size is 16"):
        LLM(folder, cpu_attention=0.5, **sizes, **OPTIONS)
