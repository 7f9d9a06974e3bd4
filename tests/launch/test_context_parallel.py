"""Engines whose ranks share out the tokens of pages: answers are those of ranks that do not, bit for bit."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_llama
from support.damage import flip_bit
from support.plans import sequence_step, step_plan
from support.prompts import random_prompt, random_prompts
from support.ranks import rank_config
from support.thread_group import ThreadGroup, llm_in_threads, ranks_in_threads
from torch import Tensor
from typer.testing import CliRunner

from distkv import LLM, ConfigError, SamplingParams
from distkv.commands.main import app
from distkv.outputs import RequestOutput
from distkv.storage.disk.catalogue import Catalogue
from distkv.workers.model.layout import Layout
from distkv.workers.sizes import PoolSizes

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=2)
FORKS = SamplingParams(n=3, temperature=1, seed=3, max_tokens=30, ignore_eos=True, logprobs=2)
SIZES: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 48, "max_num_seqs": 10, "dtype": "bfloat16"}
WIDE: dict[str, Any] = {"device_kv_bytes": "4MiB", "host_kv_bytes": "4MiB"}


def save_model(folder: Path, heads: int = 6, kv_heads: int = 3) -> Path:
    return save_llama(
        folder, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads, intermediate_size=113,
        vocab_size=130, max_position_embeddings=512,
    )[0]  # fmt: skip


def answers(outputs: list[RequestOutput]) -> list[Any]:
    return [(one.token_ids, one.logprobs, output.prompt_logprobs) for output in outputs for one in output.outputs]


def drafting(method: str) -> dict[str, Any]:
    return {"speculative_config": {"method": method, "num_speculative_tokens": 4, "adaptive": False}}


@pytest.mark.parametrize(
    "heads, kv_heads, size, context",
    [
        (6, 3, 2, 2),
        pytest.param(6, 1, 3, 3, marks=pytest.mark.slow),
        pytest.param(4, 2, 4, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "options, params",
    [
        ({}, GREEDY),
        ({"kv_cache_dtype": "int8"} | drafting("self"), GREEDY),
        pytest.param({"kv_cache_dtype": "int8"} | drafting("ngram"), GREEDY, marks=pytest.mark.slow),
        pytest.param(drafting("self"), GREEDY, marks=pytest.mark.slow),
        pytest.param({}, FORKS, marks=pytest.mark.slow),
        pytest.param({"kv_cache_dtype": "fp8_e4m3"}, FORKS, marks=pytest.mark.slow),
        pytest.param({}, SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=1), marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, size: int, context: int,
    options: dict[str, Any], params: SamplingParams,
) -> None:  # fmt: skip
    """Also over a device of few pages, and where the prompts are known."""
    folder = save_model(tmp_path, heads, kv_heads)
    common = random_prompt(70, 3)
    prompts = [common + own for own in random_prompts(20, 43)] + random_prompts(5, 150) + [random_prompt(9, 1) * 12]
    sharing = {"decode_context_parallel_size": context}
    tight = WIDE | {"device_kv_bytes": 220 * 128 * kv_heads}  # for 220 tokens
    found = []
    for more in (WIDE, tight | sharing):
        llm, _ = llm_in_threads(monkeypatch, folder, tensor_parallel_size=size, **SIZES, **options, **more)
        with llm:
            found.append([answers(llm.generate(prompts, params, use_tqdm=False)) for _ in range(2)])
            assert ("host_streamed" in llm.stats().bytes_moved) == (more is not WIDE)
    assert found[0] == found[1]


@pytest.mark.slow
def test_stages_of_ranks_that_share_out_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage finds what two have kept."""
    folder, prompts, kept = save_model(tmp_path / "model"), random_prompts(20, 43, 150, 9), tmp_path / "kv"
    options = SIZES | {"tensor_parallel_size": 2, "num_threads": 1}
    tokens = 128 * 3  # bytes of each
    tight = {"device_kv_bytes": 300 * tokens, "host_kv_bytes": 200 * tokens, "disk_kv_bytes": "2MiB", "cache_dir": kept}
    sharing, stages = {"decode_context_parallel_size": 2}, {"pipeline_parallel_size": 2}
    found, hits = [], []
    for more in WIDE, WIDE | sharing | stages, tight | sharing | stages, tight | sharing:
        with ranks_in_threads(monkeypatch), LLM(folder, **options, **more) as llm:
            found.append([answers(llm.generate(prompts, GREEDY, use_tqdm=False)) for _ in range(2)])
            hits.append(llm.stats().requests.prefix_hits["disk"])
    assert all(other == found[0] for other in found)
    assert hits[-1] > 0


@pytest.mark.slow
def test_random_contexts_that_ranks_share_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`distkv stress` compares them with a run that has all on the device, bit for bit."""
    options = ["--shape", "tiny", "--context", "4000", "--new-tokens", "4", "--page-size", "16", "--num-threads", "1"]
    options += ["--tensor-parallel-size", "2", "--decode-context-parallel-size", "2", "--device-kv-bytes", "1MiB"]
    options += ["--host-kv-bytes", "512KiB", "--cache-dir", str(tmp_path / "kv"), "--verify"]
    with ranks_in_threads(monkeypatch):
        result = CliRunner().invoke(app, ["stress", *options])
    assert result.exit_code == 0, result.output
    assert "log-probabilities equal the all-resident run's bit for bit" in result.output
    assert "disk_streamed" in result.output


def logits(folder: Path, layout: Layout, dtype: str) -> Tensor:
    """Of all tokens of a prompt that is read in three steps."""
    group, prompt = ThreadGroup("cpu"), random_prompt(75, 1)
    size = 16 * layout.decode_context_parallel_size
    slots = [5, 1, 6, 0, 3][: -(-len(prompt) // size)]
    try:
        group.load(rank_config(folder, dtype=dtype, num_threads=1, layout=layout))
        group.allocate(PoolSizes(device=8), None)
        found = []
        for start, end in (0, 39), (39, 74), (74, 75):
            step = step_plan([sequence_step(prompt[start:end], start, slots[: -(-end // size)], 75, end - start)])
            found.append(group.on_all(lambda rank, plan=step: group.ranks[rank].execute(plan))[0])
        return torch.cat(found)
    finally:
        group.close()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_fewer_ranks_with_their_parts_change_no_bit(tmp_path: Path, dtype: str) -> None:
    folder = save_model(tmp_path, 8, 2)
    expected = logits(folder, Layout(1, num_parts=4), dtype)
    for layout in Layout(4), Layout(4, 1, 2), Layout(2, 1, 2, num_parts=4), Layout(2, num_parts=4):
        assert torch.equal(logits(folder, layout, dtype), expected), layout
    assert not torch.equal(logits(folder, Layout(1), dtype), expected), "what the parts are for"


def test_pages_outlive_the_ranks_that_share_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks that share out pages alike find them, and what one of them cannot read is computed again."""
    folder = save_model(tmp_path / "model", 8, 2)
    prompts = random_prompts(150, 90)
    options = SIZES | {
        "decode_context_parallel_size": 2, "device_kv_bytes": 4 * 8192, "host_kv_bytes": 3 * 8192,
        "disk_kv_bytes": "1MiB", "cache_dir": tmp_path / "kv",
    }  # fmt: skip
    found, hits = [], []
    for size in 4, 4, 2:
        llm, _ = llm_in_threads(monkeypatch, folder, tensor_parallel_size=size, **options)
        with llm:
            found.append(answers(llm.generate(prompts, GREEDY, use_tqdm=False)))
            stats = llm.stats()
        hits.append((stats.requests.prefix_hits["disk"], stats.pages_recomputed))
        if not found[1:]:
            array = next(tmp_path.glob("kv/*/kv.zarr"))
            with closing(Catalogue(array.parent, read_only=True)) as catalogue:
                first = next(entry for entry in catalogue.entries() if entry.index == 0)
            flip_bit(array / f"c.{first.slot}.0.0.1.1.0")  # the second part of one head
    assert found[0] == found[1]
    assert hits == [(0, 0), (192, 1), (192, 0)]

    code = distkv("export", tmp_path / "pages.zarr", "--cache-dir", tmp_path / "kv", "--all")
    assert code[0] == 0, code
    code = distkv("import", tmp_path / "pages.zarr", "--cache-dir", tmp_path / "kv")
    assert code[0] == 0, code
    others = {"cache_dir": tmp_path / "others", "device_kv_bytes": "1MiB", "host_kv_bytes": "1MiB"}
    with LLM(folder, **SIZES, **others) as llm, pytest.raises(ConfigError, match="decode_context_parallel_size"):
        llm.import_cache(tmp_path / "pages.zarr")


def distkv(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    return result.exit_code, result.output
