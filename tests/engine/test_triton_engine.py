"""The whole engine with the CUDA kernels, interpreted on a CPU: tokens of transformers, one answer in all tiers."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import triton_on_cpu
from support.checkpoints import edit_weights, save_llama
from support.invariance import WHOLE, said
from support.measures import relative_error
from support.prompts import random_prompt, random_prompts
from support.runs import run
from support.thread_group import ranks_in_threads
from torch import Tensor

from distkv import LLM, SamplingParams
from distkv.workers.attention.cuda import CudaAttention
from distkv.workers.kinds import KINDS
from distkv.workers.model.llama import LlamaModel
from distkv.workers.runners.batch import Batch
from distkv.workers.runners.host_copies import map_arrays
from distkv.workers.runners.step_graphs import StepGraphs

pytestmark = pytest.mark.interpreter
NATIVE = KINDS["cpu"]


@pytest.fixture(autouse=True)
def on_the_cuda_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "cpu", triton_on_cpu.KIND)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, heads: int, kv_heads: int) -> None:
    folder, peer = save_llama(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads, head_dim=16
    )
    prompts = random_prompts(1, 5, 30)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0)
    with LLM(folder, page_size=16, max_num_batched_tokens=24, max_num_seqs=3, device_kv_bytes="1MiB") as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = peer.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output.outputs[0].token_ids == generated[0, len(prompt) :].tolist()
        logprobs = peer(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for place, table in enumerate((output.prompt_logprobs or [])[1:]):
            assert table is not None
            assert table[prompt[place + 1]].logprob == pytest.approx(
                logprobs[place, prompt[place + 1]].item(), abs=1e-4
            )


@pytest.mark.slow
def test_a_token_without_numbers_ends_its_own_request_alone(tmp_path: Path) -> None:
    """Prompts and single tokens of all of them run in one launch."""
    folder, _ = save_llama(tmp_path, num_hidden_layers=1, head_dim=16)
    prompts = random_prompts(3, 18)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    options = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    with LLM(folder, device_kv_bytes="1MiB", **options) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    met = {token for one in expected for token in one.prompt_token_ids + one.outputs[0].token_ids}
    bad = next(token for token in range(3, 128) if token not in met)
    edit_weights(folder, lambda weights: weights["model.embed_tokens.weight"][bad].fill_(torch.nan))
    with LLM(folder, device_kv_bytes="1MiB", **options) as llm:
        outputs = llm.generate([prompts[0], [5, bad], prompts[1], [bad] * 17], params, use_tqdm=False)
    for output, alone in zip(outputs[::2], expected, strict=True):
        assert output.error is None and output.outputs[0].token_ids == alone.outputs[0].token_ids
    assert all("not finite" in str(output.error) for output in outputs[1::2])


def test_tiers_change_no_bit(tmp_path: Path) -> None:
    """Decodes and chunks of prompts of several sequences, with a window of a few pages, the rest on host and disk."""
    folder, _ = save_llama(
        tmp_path / "model", num_hidden_layers=1, head_dim=16, num_attention_heads=2, num_key_value_heads=1
    )
    prompts = random_prompts(180, 40, 12)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 6, 3)]
    options = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 3}
    resident = run(folder, prompts, params, **options)
    mixed = run(folder, prompts, params, pages=(8, 6, 40), cache_dir=tmp_path / "cache", **options)
    mixed.assert_same(resident)
    assert mixed.moved("host_streamed") and mixed.moved("disk_streamed")


@pytest.mark.parametrize(
    "codec", ["int4", *(pytest.param(codec, marks=pytest.mark.slow) for codec in ("int8", "fp8_e4m3"))]
)
def test_codes_are_the_same_in_all_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """Decodes and chunks of prompts that fill pages, with a window of a few pages; and near to what the native kernels
    of a CPU compute of codes."""
    folder, _ = save_llama(
        tmp_path / "model", num_hidden_layers=1, head_dim=16, num_attention_heads=2, num_key_value_heads=1
    )
    prompts = random_prompts(70, 12)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 7)]
    options: dict[str, Any] = {
        "page_size": 16, "max_num_batched_tokens": 48, "max_num_seqs": 2, "kv_cache_dtype": codec,
    }  # fmt: skip
    resident = run(folder, prompts, params, pages=(40, 1, 0), **options)
    mixed = run(folder, prompts, params, pages=(5, 1, 20), cache_dir=tmp_path / "cache", **options)
    mixed.assert_same(resident)
    assert mixed.moved("host_streamed") and mixed.moved("disk_streamed")
    monkeypatch.setitem(KINDS, "cpu", NATIVE)
    native = run(folder, prompts, params, pages=(40, 1, 0), **options)
    for mine, theirs in zip(resident.logits, native.logits, strict=True):
        assert relative_error(mine, theirs) < 1e-4


def test_batch_mates_and_chunks_change_no_bit(tmp_path: Path) -> None:
    """With `batch_invariant`: a request alone in one chunk; and with others, in small chunks, behind a prefix."""
    folder, _ = save_llama(
        tmp_path / "model",
        num_hidden_layers=1,
        head_dim=16,
        hidden_size=512,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    first, second = random_prompts(275, 13)
    prompts = [second, first[:260] + second]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=3) for n in (4, 3)]

    common = {"page_size": 16, "batch_invariant": True, "dtype": "float16"}
    with LLM(folder, device_kv_bytes="8MiB", enable_prefix_caching=False, **common, **WHOLE) as llm:
        alone = [said(llm.generate([p], one, use_tqdm=False)[0]) for p, one in zip(prompts, params, strict=True)]
    page = 2 * 16 * 16 * 2  # bytes
    small = {"device_kv_bytes": 26 * page, "host_kv_bytes": 60 * page, "max_num_seqs": 4}
    with LLM(folder, max_num_batched_tokens=100, **common, **small) as llm:
        llm.generate([first], params[:1], use_tqdm=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert outputs[1].num_cached_tokens == 256
    assert [said(one) for one in outputs] == alone


@pytest.mark.parametrize("codec", ["auto", "int4"])
def test_graphs_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """Steps through the inputs of captured graphs, which a CPU can only launch again, and with a ladder of sizes;
    with a codec they round the pages that they fill."""
    folder, _ = save_llama(tmp_path / "model", num_hidden_layers=1, head_dim=16)
    prompts = random_prompts(20, 3, 12)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 8, 7)]
    options: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 3}
    options |= {"kv_cache_dtype": codec, "pages": (16, 1, 0)} if codec != "auto" else {}
    eager = run(folder, prompts, params, **options)
    replayed: list[int] = []

    def replays(run: Callable[[], Tensor], memory: object) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            hidden = run()
            replayed.append(len(hidden))
            return hidden

        return replay

    whole = StepGraphs._batch

    def outlives(self: StepGraphs, rows: int) -> Batch:
        """A graph reads at the addresses that it has seen, so nothing that it reads may be of the capture alone."""
        batch = whole(self, rows)
        assert isinstance(batch.attention, CudaAttention)
        read: list[Tensor] = []
        map_arrays([batch.tokens, batch.attention.arrays], read.append)
        kept = {value.untyped_storage().data_ptr() for value in vars(self).values() if isinstance(value, Tensor)}
        assert {value.untyped_storage().data_ptr() for value in read} <= kept
        return batch

    monkeypatch.setattr(StepGraphs, "_batch", outlives)
    monkeypatch.setattr("distkv.workers.runners.step_graphs.captured", replays)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr(triton_on_cpu.TritonOnCpu, "captures", True)
    graphs = run(folder, prompts, params, **options)
    graphs.assert_same(eager)
    assert set(replayed) == {1, 2, 4}


@pytest.mark.slow
def test_stages_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first one a graph begins with hidden states, at an address that it has seen."""
    folder, _ = save_llama(tmp_path / "model", head_dim=16, max_position_embeddings=256)
    prompts = random_prompts(40, 3, 12)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 6, 5)]
    options: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 3}
    options |= {"batch_invariant": True}
    alone = run(folder, prompts, params, **options)
    forward, lock, replayed = LlamaModel.forward, threading.Lock(), []

    def in_turns(*arguments: Any) -> Tensor:
        with lock:  # the interpreter takes one launch at a time
            return forward(*arguments)

    def replays(run: Callable[[], Tensor], memory: object) -> Callable[[], Tensor]:
        return lambda: replayed.append(1) or run()

    monkeypatch.setattr(LlamaModel, "forward", in_turns)
    for captures in (False, True):
        monkeypatch.setattr("distkv.workers.runners.step_graphs.captured", replays)
        monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
        monkeypatch.setattr(triton_on_cpu.TritonOnCpu, "captures", captures)
        with ranks_in_threads(monkeypatch):
            run(folder, prompts, params, pipeline_parallel_size=2, num_threads=1, **options).assert_same(alone)
    assert replayed


@pytest.mark.parametrize(
    "method", ["ngram", *(pytest.param(one, marks=pytest.mark.slow) for one in ("self", "draft_model"))]
)
def test_drafts_change_no_bit(tmp_path: Path, method: str) -> None:
    """Rows of several tokens of one sequence beside rows of one, most pages on the host."""
    folder, _ = save_llama(
        tmp_path / "model", num_hidden_layers=1, head_dim=16, vocab_size=8, max_position_embeddings=256
    )
    prompts = [random_prompt(length, length, end=8) * 3 for length in (20, 9)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=3) for n in (9, 5)]
    config = {"method": method, "num_speculative_tokens": 3, "adaptive": False}
    config |= {"ngram": {"prompt_lookup_min": 1}, "draft_model": {"model": str(folder)}}.get(method, {})
    sizes: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 9, "dtype": "float32"}
    answers = []
    for options in ({}, {"speculative_config": config}):
        small = {"device_kv_bytes": 7 * 4096, "host_kv_bytes": "1MiB", "batch_invariant": True}
        with LLM(folder, **sizes, **small, **options) as llm:
            answers.append([said(output) for output in llm.generate(prompts, params, use_tqdm=False)])
            told = llm.stats().speculation
    assert answers[0] == answers[1] and told.num_accepted_tokens > 0
