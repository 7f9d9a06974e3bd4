"""Policies of attention in whole engines: what they choose changes answers, and nothing else does."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_llama
from support.invariance import said
from support.llms import PAGE_BYTES, idle_engine
from support.prompts import random_prompt

from distkv import LLM, ConfigError, DistKVError, EngineConfig, SamplingParams, StoreError
from distkv.engine import answer_lengths
from distkv.engine.drive import drive
from distkv.engine.protocol import EngineRequest
from distkv.launch.launch import launch
from distkv.metrics.exposition import exposition
from distkv.outputs import RequestOutput
from distkv.storage.pools import disk_slices
from distkv.workers.attention.policies.policy import Choice, Rows
from distkv.workers.attention.policies.top_pages import TopPages
from distkv.workers.backends import cpu
from distkv.workers.errors import ConfigError as RankConfigError

PARAMS = SamplingParams(temperature=1, seed=7, max_tokens=40, logprobs=5, ignore_eos=True)
PROMPT = random_prompt(300, 2)
TOP, DECAY = "top_pages(share=0.3)", "decay(share=0.3, half_life=20.0)"
both = pytest.mark.parametrize("policy", [TOP, DECAY])
OPTIONS: dict[str, Any] = {"page_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 4, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)[0]


def sizes(cache_dir: Path | None, dtype: str = "float32") -> dict[str, Any]:
    """All pages on the device, or nearly none."""
    if cache_dir is None:
        return {"device_kv_bytes": "16MiB"}
    page = PAGE_BYTES // (1 if dtype == "float32" else 2)
    tiers = {"device_kv_bytes": 7 * page, "host_kv_bytes": 6 * page, "disk_kv_bytes": 100 * page}
    return {**tiers, "cache_dir": cache_dir}


def ask(folder: Path, policy: str, prompt: list[int] = PROMPT, **options: Any) -> tuple[RequestOutput, dict[str, int]]:
    """An answer, and the bytes that moved for it."""
    with LLM(folder, attention_policy=policy, **(OPTIONS | sizes(None) | options)) as llm:
        [output] = llm.generate([prompt], PARAMS, use_tqdm=False)
        assert output.error is None
        idle_engine(llm).integrity_check()
        return output, llm.stats().bytes_moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_pages_are_full_attention(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Bit for bit, in memory and from disk; and outputs say by what they were made."""
    full, _ = ask(folder, "full", dtype=dtype)
    assert full.kv_policy is None
    for policy in ("top_pages(share=1.0)", "decay(share=1.0, half_life=16.0)", "sink_window(sinks=0, window=4096)"):
        for cache_dir in (None, tmp_path / policy):
            found, moved = ask(folder, policy, dtype=dtype, **sizes(cache_dir, dtype))
            assert said(found) == said(full) and found.kv_policy == policy
            assert (moved.get("disk_streamed", 0) > 0) == (cache_dir is not None)
    assert said(ask(folder, TOP, dtype=dtype)[0]) != said(full)


@both
@pytest.mark.parametrize("codec", ["int4", "int8"])
def test_pages_of_codes_are_chosen_alike(folder: Path, tmp_path: Path, codec: str, policy: str) -> None:
    """Resident or cold, in chunks of any size, in a process that has made no summaries of the prompt's pages: one
    answer. All pages are what full attention to codes is."""
    coded = {"kv_cache_dtype": codec, "dtype": "bfloat16"}
    cold = sizes(tmp_path, "bfloat16") | coded
    found, _ = ask(folder, policy, **coded)
    assert found.kv_policy == f"{policy}, kv_cache_dtype={codec}"
    for options in (cold | {"max_num_batched_tokens": 16}, coded | {"max_num_batched_tokens": 333}, cold):
        assert said(ask(folder, policy, **options)[0]) == said(found)
    assert said(ask(folder, "full", **coded)[0]) == said(ask(folder, policy.replace("0.3", "1"), **cold)[0])
    assert_begun_answers_go_on(folder, policy, coded)


def test_only_what_is_chosen_is_streamed(folder: Path, tmp_path: Path) -> None:
    """By single KV heads; the summaries of pages that fill here cost no read."""
    cold = sizes(tmp_path / "full")
    full = ask(folder, "full", **cold)[1]
    some = ask(folder, "top_pages(pages=5)", **(cold | {"cache_dir": tmp_path / "some"}))[1]
    streamed = [one.get("disk_streamed", 0) + one.get("host_streamed", 0) for one in (full, some)]
    # of about 20 pages 5 are chosen, and the first and the own one are on the device
    assert 0 < streamed[1] < 0.4 * streamed[0]
    assert streamed[1] % (PAGE_BYTES // 4) == 0, "slices of one layer and KV head"


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_files_are_read_whether_they_stay_open_or_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """A process may have too few descriptors for all files of a step; none is left open behind it."""
    monkeypatch.setattr(disk_slices, "MAX_OPEN", 3)
    expected = said(ask(folder, TOP)[0])
    found, moved = ask(folder, TOP, **sizes(tmp_path), disk_kv_codec=codec)
    assert said(found) == expected and moved["disk_streamed"] > 0
    left = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    assert not [file for file in left if str(tmp_path) in file]


def test_what_was_read_is_told(folder: Path, tmp_path: Path) -> None:
    """And an audit of every fifth step changes no bit."""
    expected = said(ask(folder, TOP)[0])
    audited = OPTIONS | sizes(tmp_path) | {"attention_policy": TOP, "attention_audit": 5}
    with LLM(folder, **audited) as llm:
        assert said(llm.generate([PROMPT], PARAMS, use_tqdm=False)[0]) == expected
        found = llm.stats().policy
        page = exposition(llm.stats(), llm.info, "model").decode()
    own = [(300 + step) // 16 + 1 for step in range(39)]  # the last token is never run
    heads, layers = 2, 2
    assert found.pages_visible == sum(own) * heads * layers
    assert found.pages_chosen == sum(-(-3 * count // 10) for count in own) * heads * layers
    assert found.num_audited == 8 * 4 * layers
    assert 0.3 < found.share_chosen < 0.4 < found.mean_covered < 1
    assert f'attention_pages_chosen_total{{model_name="model"}} {float(found.pages_chosen)}' in page
    with LLM(folder, **(audited | {"attention_policy": "top_pages(share=1)"})) as llm:
        llm.generate([PROMPT], PARAMS, use_tqdm=False)
        assert llm.stats().policy.mean_covered == pytest.approx(1, abs=1e-6)
        assert llm.stats().policy.share_chosen == 1
    with pytest.raises(ConfigError, match="attention_audit is set and attention_policy is full; set both, or leave"):
        LLM(folder, attention_audit=5)


@both
def test_an_answer_that_was_begun_elsewhere_goes_on(folder: Path, policy: str) -> None:
    """Its tokens are read in chunks with the prompt, and choose as they did one by one; so do those behind them."""
    assert_begun_answers_go_on(folder, policy, {})


def assert_begun_answers_go_on(folder: Path, policy: str, options: dict[str, Any]) -> None:
    engine = launch(EngineConfig(folder, attention_policy=policy, **(OPTIONS | sizes(None) | options)))
    params = SamplingParams(temperature=1, max_tokens=40, ignore_eos=True)

    def answer(begun: dict[int, list[int]]) -> list[int]:
        request = EngineRequest(str(len(begun)), PROMPT, params, 40, 5, begun=begun)
        return [output.token_id for step in drive(engine, [request]) for output in step]

    try:
        whole = answer({})
        for count in (1, 20, 37):
            assert answer({0: whole[:count]}) == whole[count:]
    finally:
        engine.close()


def test_what_a_policy_that_remembers_has_read(folder: Path) -> None:
    """Of the tokens of the answer alone, though the end of the prompt is observed."""
    with LLM(folder, attention_policy=DECAY, attention_audit=1, **OPTIONS, **sizes(None)) as llm:
        llm.generate([PROMPT], PARAMS, use_tqdm=False)
        found = llm.stats().policy
    own = [(300 + step) // 16 + 1 for step in range(39)]
    assert found.pages_visible == sum(own) * 2 * 2
    assert found.pages_chosen == sum(-(-3 * count // 10) for count in own) * 2 * 2
    assert found.num_audited == 39 * 4 * 2
    assert 0.2 < found.mean_covered < 0.5, "weights of this model are much alike"


@pytest.mark.parametrize("cold", [False, True])
def test_pages_of_an_answer_are_nobodys_prompt(folder: Path, tmp_path: Path, cold: bool) -> None:
    """A prompt that repeats an answer is read anew behind the first prompt's own pages, with the bits of a fresh
    engine; and whoever runs without a policy may take over the pages of a prompt."""
    kept = sizes(tmp_path) if cold else sizes(None)
    with LLM(folder, attention_policy=TOP, **OPTIONS, **kept) as llm:
        first = llm.generate([PROMPT], PARAMS, use_tqdm=False)[0]
        again = PROMPT + first.outputs[0].token_ids
        second = llm.generate([again], PARAMS, use_tqdm=False)[0]
        assert second.num_cached_tokens == len(PROMPT) // 16 * 16
    assert said(second) == said(ask(folder, TOP, again)[0])
    if cold:
        full, _ = ask(folder, "full", again, **kept)
        assert full.num_cached_tokens == (len(again) - 1) // 16 * 16
        assert said(full) == said(ask(folder, "full", again)[0])
        third, _ = ask(folder, TOP, again, **kept)  # whose pages this engine has made no summaries of
        assert third.num_cached_tokens == (len(again) - 1) // 16 * 16
        assert said(third) == said(second)


def test_summaries_are_those_of_the_pages_that_have_an_id_now(folder: Path) -> None:
    """Prompts that are known take turns, each with the ids that the one before has let go."""
    prompts = [PROMPT, random_prompt(300, 3), random_prompt(150, 4)]
    expected = [said(ask(folder, TOP, prompt)[0]) for prompt in prompts]
    with LLM(folder, attention_policy=TOP, **OPTIONS, **sizes(None)) as llm:
        for index in (0, 1, 2, 0, 2, 1, 0):
            assert said(llm.generate([prompts[index]], PARAMS, use_tqdm=False)[0]) == expected[index]


def test_a_policy_is_given_queries_and_summaries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each sequence beside others; the weights are what follows from them."""
    choose, num_rows = TopPages.choose, []

    def checked(policy: TopPages, rows: Rows) -> Choice:
        q_RKGD = rows.queries.unflatten(1, (rows.num_kv_heads, -1))
        assert rows.mean_keys().shape[1] == 1, "pages of 16 tokens"
        scores = torch.einsum("rkgd,pkd->rkgp", q_RKGD, rows.mean_keys()[:, 0]) * q_RKGD.shape[-1] ** -0.5
        for row, own in enumerate(rows.own_pages.tolist()):
            expected = scores[row, ..., :own].softmax(-1).sum(1).numpy()
            assert rows.expected_weights()[row, :, :own] == pytest.approx(expected, rel=1e-4)
        num_rows.append(len(rows.positions))
        return choose(policy, rows)

    monkeypatch.setattr(TopPages, "choose", checked)
    with LLM(folder, attention_policy=TOP, **OPTIONS, **sizes(None)) as llm:
        llm.generate([PROMPT, PROMPT[:90]], SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
    assert num_rows == [1] * 19 * 2 * 2, "tokens, sequences, layers"


@both
def test_forked_answers_choose_for_themselves(folder: Path, policy: str) -> None:
    """As they do where each was begun by itself, behind the one token that their seed and index give."""
    params = SamplingParams(temperature=1, seed=3, n=3, max_tokens=20, ignore_eos=True, logprobs=1)
    options = OPTIONS | {"attention_policy": policy}
    with LLM(folder, **options, **sizes(None)) as llm:
        together = said(llm.generate([PROMPT], params, use_tqdm=False)[0])
    with LLM(folder, **(options | {"max_num_seqs": 3}), device_kv_bytes=30 * PAGE_BYTES) as llm:
        assert said(llm.generate([PROMPT], params, use_tqdm=False)[0]) == together
        engine = idle_engine(llm)
        engine.integrity_check()
    engine = launch(EngineConfig(folder, **options, **sizes(None)))
    try:
        for index, (tokens, _) in enumerate(together):
            request = EngineRequest("0", PROMPT, params, 20, 3, begun={index: tokens[:1]})
            assert [one.token_id for step in drive(engine, [request]) for one in step] == tokens[1:]
    finally:
        engine.close()


def test_steps_that_raise_leave_no_trace(folder: Path) -> None:
    """Behind the model, so that ranks remember their tokens: all run again, one by one."""
    prompts = [PROMPT, PROMPT[:100], random_prompt(60, 5)]
    expected = [said(ask(folder, DECAY, prompt)[0]) for prompt in prompts]
    with LLM(folder, attention_policy=DECAY, **OPTIONS, **sizes(None)) as llm:
        engine = idle_engine(llm)
        forward, struck = engine._runner.executor.forward, {310, 325}

        def spy(plan: Any, drawn: Any) -> Any:
            logits = forward(plan, drawn)
            found = struck & {one.start for one in plan.sequences if len(plan.sequences) > 1}
            if found:
                struck.difference_update(found)
                raise RuntimeError("out of luck")
            return logits

        engine._runner.executor.forward = spy
        assert [said(one) for one in llm.generate(prompts, PARAMS, use_tqdm=False)] == expected
        assert not struck
        idle_engine(llm).integrity_check()


def test_one_whose_step_raises_is_found_behind_what_it_reads_again(folder: Path) -> None:
    """In several chunks, which go well and do not clear it."""
    prompts = [PROMPT[:100], random_prompt(60, 5)]
    expected = said(ask(folder, DECAY, prompts[1])[0])
    with LLM(folder, attention_policy=DECAY, **(OPTIONS | {"max_num_batched_tokens": 16}), **sizes(None)) as llm:
        engine = idle_engine(llm)
        forward, num_steps = engine._runner.executor.forward, 0

        def spy(plan: Any, drawn: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            logits = forward(plan, drawn)
            ends = [one.start + len(one.token_ids) for one in plan.sequences if one.prompt_len == 100]
            if num_steps < 200 and any(end > 120 for end in ends):  # so that a search without an end ends
                raise RuntimeError("out of luck")
            return logits

        engine._runner.executor.forward = spy
        bad, good = llm.generate(prompts, PARAMS, use_tqdm=False)
        assert isinstance(bad.error, DistKVError) and "out of luck" in str(bad.error)
        assert said(good) == expected and num_steps < 90
        idle_engine(llm).integrity_check()


@pytest.mark.parametrize("policy", ["top_pages(pages=4)", "decay(pages=4)"])
def test_a_disk_that_gives_nothing_back_ends_a_request(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Also where what was lost is all observed, so that the answer is read again from its beginning; others go on."""

    def broken(self: disk_slices.DiskSlices, *args: Any) -> None:
        raise StoreError("input/output error")

    prompts = [PROMPT[:20], PROMPT[100:120]]
    params = [SamplingParams(temperature=1, seed=7, max_tokens=count, ignore_eos=True) for count in (300, 40)]
    with LLM(folder, attention_policy=policy, **OPTIONS, **sizes(None)) as llm:
        short = said(llm.generate(prompts, params, use_tqdm=False)[1])
    monkeypatch.setattr(disk_slices.DiskSlices, "read", broken)
    with LLM(folder, attention_policy=policy, **OPTIONS, **sizes(tmp_path)) as llm:
        failed, other = llm.generate(prompts, params, use_tqdm=False)
        assert isinstance(failed.error, StoreError) and "was lost 4 times, the last time because" in str(failed.error)
        assert other.error is None and said(other) == short
        assert llm.stats().pages_recomputed >= 3
        idle_engine(llm).integrity_check()


def test_answers_that_give_their_room_up_remember_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_lengths, "FIRST_GUESS", 32)
    params = SamplingParams(temperature=1, seed=7, max_tokens=None, ignore_eos=True, logprobs=1)
    prompts = [PROMPT[:40], PROMPT[:70], random_prompt(40, 5)]
    options = OPTIONS | {"attention_policy": DECAY, "max_model_len": 260, "enable_prefix_caching": False}
    with LLM(folder, **options, **sizes(None)) as llm:
        expected = [said(llm.generate([prompt], params, use_tqdm=False)[0]) for prompt in prompts]
    with LLM(folder, **options, device_kv_bytes=22 * PAGE_BYTES, host_kv_bytes=0) as llm:
        assert [said(one) for one in llm.generate(prompts, params, use_tqdm=False)] == expected
        assert llm.stats().num_preemptions


def test_what_is_remembered_ends_with_its_request(folder: Path) -> None:
    """And what a rank does not remember is not made up: a leader that goes on behind it is told."""
    with LLM(folder, attention_policy=DECAY, **OPTIONS, **sizes(None)) as llm:
        engine = idle_engine(llm)
        directory = engine._runner.executor.warm_up.__self__._directory
        llm.generate([PROMPT, PROMPT[:90]], PARAMS, use_tqdm=False)
        idle_engine(llm)
        assert not directory._memories
        forward = engine._runner.executor.forward

        def forgetful(plan: Any, drawn: Any) -> Any:
            if any(one.start == 320 for one in plan.sequences):
                directory._memories.clear()
            return forward(plan, drawn)

        engine._runner.executor.forward = forgetful
        with pytest.raises(DistKVError, match=r"at position 320 .* the policy of attention remembers nothing"):
            llm.generate([PROMPT], PARAMS, use_tqdm=False)


def test_kernels_that_cannot_choose_refuse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also CUDA's, of which the backend says so, as `test_backend.py` has it."""

    def none() -> None:
        raise cpu.BuildError("there is no g++ on the path")

    monkeypatch.setattr(cpu, "load_best", none)
    with pytest.raises(RankConfigError, match=r"top_pages\(share=0.3\), which the native kernels of a CPU alone"):
        LLM(folder, attention_policy=TOP, **OPTIONS, **sizes(None))
    with pytest.raises(ConfigError, match="attention_policy is 'all', which is none of full"):
        LLM(folder, attention_policy="all")
