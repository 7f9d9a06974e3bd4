"""The Python API on one rank: requests in, answers out."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.checkpoints import save_llama
from support.llms import idle_engine
from support.prompts import random_prompts
from support.servers import save_talker

from distkv import (
    LLM,
    CapacityError,
    ConfigError,
    DistKVError,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from distkv.frontend.session import Session
from distkv.outputs import join_deltas

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
FORKED = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, n=2)
LICENCE = Path(__file__).resolve().parent.parent / "LICENSE"


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    """Small pages and steps, so that prompts of a hundred tokens already span pages and chunks."""
    with LLM(tiny_model, page_size=16, max_num_batched_tokens=32, max_num_seqs=8, device_kv_bytes="4MiB") as llm:
        yield llm
        check_idle(llm)


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Iterator[LLM]:
    with LLM(demo_model, dtype="float32", device_kv_bytes="512MiB") as llm:
        yield llm
        check_idle(llm)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A small random model that answers with any bytes, so that characters begin in one token and end in another."""
    with LLM(save_talker(tmp_path_factory.mktemp("talker")), device_kv_bytes="16MiB") as llm:
        yield llm
        check_idle(llm)


def check_idle(llm: LLM) -> None:
    """All pages are free again."""
    idle_engine(llm).integrity_check()


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, heads: int, kv_heads: int) -> None:
    folder, peer = save_llama(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads)
    prompts = random_prompts(1, 7, 16, 150)
    with LLM(folder, page_size=16, max_num_batched_tokens=64, device_kv_bytes="4MiB") as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = peer.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


def test_demo_model_answers(demo: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = demo.chat(question, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].outputs[0]
    assert answer.text == "The capital of France is Paris."
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


def test_demo_model_continues_real_text_as_transformers_does(demo: LLM, demo_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = demo.tokenizer.encode(LICENCE.read_text(encoding="utf-8"))[:600]  # 3 pages
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    output = demo.generate(prompt, params, use_tqdm=False)[0]
    peer = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    expected = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


def test_batch_mates_change_nothing(llm: LLM) -> None:
    prompts = random_prompts(3, 18, 40, 90, 33, 64, 5, 100, 21)
    together = tokens(llm.generate(prompts, GREEDY, use_tqdm=False))
    alone = [tokens(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("max_num_batched_tokens", [8, 50, 512])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_chunks_and_pages_change_nothing(
    tiny_model: Path, llm: LLM, max_num_batched_tokens: int, page_size: int
) -> None:
    prompts = random_prompts(3, 18, 150, 64)
    options = {"max_num_batched_tokens": max_num_batched_tokens, "page_size": page_size, "max_num_seqs": 4}
    with LLM(tiny_model, device_kv_bytes="8MiB", **options) as other:
        assert tokens(other.generate(prompts, GREEDY, use_tqdm=False)) == tokens(
            llm.generate(prompts, GREEDY, use_tqdm=False)
        )


def test_a_seed_fixes_the_answer_whatever_the_batch(llm: LLM) -> None:
    prompts = random_prompts(12, 30, 45)
    warm = SamplingParams(temperature=1.5, max_tokens=40, seed=11, ignore_eos=True, n=2, top_p=0.95)
    other = SamplingParams(temperature=1.5, max_tokens=40, seed=12, ignore_eos=True, n=2, top_p=0.95)
    alone = tokens(llm.generate(prompts[0], warm, use_tqdm=False))
    mixed = tokens(llm.generate(prompts, [warm, other, GREEDY], use_tqdm=False))
    assert mixed[:2] == alone
    assert alone[0] != alone[1], "two answers of a request draw apart"
    assert tokens(llm.generate(prompts[0], other, use_tqdm=False)) != alone


def test_without_a_seed_answers_differ_between_requests_and_repeat_between_engines(tiny_model: Path) -> None:
    params = SamplingParams(temperature=2, max_tokens=30, ignore_eos=True)
    runs = []
    for seed in (5, 5, 6):
        with LLM(tiny_model, seed=seed, device_kv_bytes="8MiB") as llm:
            runs.append(tokens(llm.generate([[9, 8, 7]] * 2, params, use_tqdm=False)))
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


@pytest.mark.parametrize("prompt_len", [16, 32, 37])
def test_answers_of_one_request_share_the_pages_of_its_prompt(tiny_model: Path, prompt_len: int) -> None:
    prompt = random_prompts(prompt_len)[0]
    with LLM(tiny_model, page_size=16, device_kv_bytes="4MiB") as llm:
        greedy = llm.generate(prompt, GREEDY, use_tqdm=False)
        forked = llm.generate(
            prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, n=4), use_tqdm=False
        )
        assert tokens(forked) == tokens(greedy) * 4
        full, whole = prompt_len // 16, -(-(prompt_len + 63) // 16)
        assert llm.stats().peak_pages_in_use == full + 4 * (whole - full)
        check_idle(llm)


def test_pages_are_taken_as_tokens_arrive(tiny_model: Path) -> None:
    with LLM(tiny_model, page_size=16, device_kv_bytes="4MiB") as llm:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        engine, held = idle_engine(llm), []
        execute = engine._runner.executor.forward

        def spy(plan, drawn):
            held.extend((one.start + len(one.token_ids), engine.stats().pages_in_use) for one in plan.sequences)
            return execute(plan, drawn)

        engine._runner.executor.forward = spy
        llm.generate([[5] * 10], params, use_tqdm=False)
        assert [length for length, _ in held] == list(range(10, 256))
        for length, pages in held:  # the step that follows may have taken its page
            assert -(-length // 16) <= pages <= -(-(length + 1) // 16)
        check_idle(llm)
        assert llm.stats().pages_in_use == 0


def test_more_requests_than_memory_wait_their_turn(tiny_model: Path, llm: LLM) -> None:
    prompts = random_prompts(*range(20, 60))
    page_bytes = llm.info.page_bytes
    sizes = {"device_kv_bytes": 16 * page_bytes, "host_kv_bytes": 0}
    with LLM(tiny_model, page_size=16, max_num_seqs=16, **sizes) as small:
        outputs = small.generate(prompts, GREEDY, use_tqdm=False)
        assert small.stats().peak_pages_in_use <= 16
        check_idle(small)
    assert tokens(outputs) == tokens(llm.generate(prompts, GREEDY, use_tqdm=False))


def test_a_request_that_can_never_fit_is_refused_with_the_sizes(tiny_model: Path, llm: LLM) -> None:
    with LLM(tiny_model, page_size=16, device_kv_bytes=4 * llm.info.page_bytes, host_kv_bytes=0) as small:
        with pytest.raises(CapacityError, match=r"7 KV pages .* hold 4 .*device_kv_bytes"):
            small.generate([[5] * 40, [6] * 50], GREEDY, use_tqdm=False)
        check_idle(small)
        assert small.generate([5] * 8, SamplingParams(max_tokens=8), use_tqdm=False)


def test_stop_strings_end_the_answer_across_token_borders(demo: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    for stop, expected in [(" of Fra", "The capital"), ("is Paris.", "The capital of France "), ("e c", "Th")]:
        params = SamplingParams(temperature=0, max_tokens=40, stop=["not in there", stop])
        answer = demo.chat(question, params, use_tqdm=False)[0].outputs[0]
        assert (answer.text, answer.finish_reason, answer.stop_reason) == (expected, "stop", stop)
    check_idle(demo)


def test_streamed_text_never_shrinks_and_never_shows_a_stop_string(demo: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, stop=" 8, 9", ignore_eos=True)
    texts = [output.outputs[0].text for output in demo.stream("Count: 1, 2, 3, 4, 1, 2, 3, 4,", params)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == " 5, 6, 7,"
    assert len(set(texts)) > 3


def test_streamed_text_equals_generated_text(talker: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=60)
    prompt = "Some text with umlauts and signs: äöü — 漢字 🙂🙃 and"
    *_, last = talker.stream(prompt, params)
    generated = talker.generate(prompt, params, use_tqdm=False)[0]
    assert last.finished
    assert last.outputs == generated.outputs


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.2, "max_tokens": 30, "stop": "the answer's own"},
        {"temperature": 1.2, "max_tokens": 20, "n": 3},
        {"temperature": 0.9, "max_tokens": 20, "logprobs": 3},
    ],
    ids=["stop string", "three answers", "logprobs"],
)
def test_every_kind_of_output_brings_the_same_answer(talker: LLM, options: dict[str, Any]) -> None:
    prompt = "Count: 1, 2, 3, 4, 漢字 🙂, 1, 2, 3, 4,"
    if "stop" in options:
        free = SamplingParams(seed=8, ignore_eos=True, **options | {"stop": None})
        text = talker.generate(prompt, free, use_tqdm=False)[0].outputs[0].text
        options = options | {"stop": text[8:11]}
    params = SamplingParams(seed=8, ignore_eos=True, **options)
    *_, whole = talker.stream(prompt, params)
    assert (whole.outputs[0].finish_reason == "stop") == ("stop" in options)
    delta, final_only = (
        msgspec.structs.replace(params, output_kind=kind)
        for kind in (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY)
    )
    deltas = list(talker.stream(prompt, delta))
    assert join_deltas(deltas).outputs == whole.outputs
    assert [one.finished for one in deltas] == [False] * (len(deltas) - 1) + [True]
    assert {len(one.token_ids) for output in deltas for one in output.outputs} == {1}
    [last] = talker.stream(prompt, final_only)
    assert last.finished and last.outputs == whole.outputs
    for each in (delta, final_only):
        [output] = talker.generate(prompt, each, use_tqdm=False)
        assert output.finished and output.outputs == whole.outputs
    check_idle(talker)


def test_leaving_a_stream_ends_the_request(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
    next(iter(stream))
    stream.close()
    check_idle(llm)


def test_stop_tokens_and_eos(llm: LLM) -> None:
    prompt = random_prompts(20)[0]
    free = tokens(llm.generate(prompt, GREEDY, use_tqdm=False))[0]
    stop = next(token for token in free[5:] if token not in free[:5])
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop_token_ids=[stop])
    answer = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert answer.token_ids == free[: free.index(stop) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_logprobs_are_those_of_transformers(tmp_path: Path) -> None:
    folder, peer = save_llama(tmp_path)
    prompt = random_prompts(30)[0]
    with LLM(folder, device_kv_bytes="8MiB") as llm:
        params = SamplingParams(temperature=0.7, seed=3, max_tokens=10, logprobs=5, repetition_penalty=1.3)
        answer = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    with torch.inference_mode():
        logits = peer(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
    total = 0.0
    for row, table, token in zip(expected, answer.logprobs, answer.token_ids, strict=True):
        top = row.topk(5).indices.tolist()
        assert set(table) == {*top, token}
        for one, entry in table.items():
            assert entry.logprob == pytest.approx(row[one].item(), abs=1e-4)
            assert entry.rank == int((row > row[one]).sum()) + 1
        total += table[token].logprob
    assert answer.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "empty"),
        ([[]], "empty"),
        ([[5] * 256], "256 tokens and max_model_len is 256"),
        ([[5, 128]], "token id 128"),
        ([[5, -1]], "token id -1"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: list, message: str) -> None:
    if not prompt:
        assert llm.generate(prompt, use_tqdm=False) == []
        return
    with pytest.raises(RequestError, match=message):
        llm.generate([[5, 6], *prompt], use_tqdm=False)
    check_idle(llm)


def test_an_empty_text_is_an_empty_prompt(demo: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        demo.generate("", use_tqdm=False)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2},
        {"n": 0},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"logprobs": -1},
        {"stop": [""]},
        {"seed": 1.5},
        {"stop_token_ids": [-4]},
        {"stop_token_ids": 5},
        {"stop": 5},
        {"seed": 2**70},
        {"top_k": 2**70},
    ],
)
def test_bad_sampling_params_name_the_field(values: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"page_size": 100}, "page_size 100 is not a power of two >= 16; try 64"),
        ({"max_model_len": 257}, "257 is more than the 256 positions"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 4}, "less than max_num_seqs"),
        ({"dtype": "int8"}, "dtype"),
        ({"device_kv_bytes": "lots"}, "device_kv_bytes"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization"),
        ({"ray_address": 5}, "ray_address"),
        ({"tensor_parallel_size": 5}, "5 is more than the model's 4 query heads"),
        ({"load_format": "gguf"}, "load_format"),
    ],
)
def test_bad_options_name_the_cure(tiny_model: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_model, **options)


def test_cuda_is_refused_where_there_is_none(tiny_model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        LLM(tiny_model, device="cuda")


def test_dummy_weights_need_no_checkpoint_and_repeat(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="dummy"):
        LLM(tmp_path)
    answers = []
    for _ in range(2):
        with LLM(tmp_path, load_format="dummy", device_kv_bytes="8MiB", max_model_len=1000) as llm:
            answers.append(tokens(llm.generate([[5] * 600], GREEDY, use_tqdm=False)))
    assert answers[0] == answers[1]


def test_iterators_on_one_llm_do_not_disturb_each_other(llm: LLM) -> None:
    prompts = random_prompts(10, 20, 30)
    expected = tokens(llm.generate(prompts, GREEDY, use_tqdm=False))
    first, second = llm.stream(prompts[0], GREEDY), llm.stream(prompts[1], GREEDY)
    next(first), next(second), next(first)
    third = tokens(llm.generate(prompts[2], GREEDY, use_tqdm=False))
    *_, second_last = second
    *_, first_last = first
    assert tokens([first_last, second_last]) + third == expected


def test_an_llm_goes_on_after_a_failure_in_the_middle(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(10, 40)
    expected = tokens(llm.generate(prompts, GREEDY, use_tqdm=False))
    for error in (RuntimeError, MemoryError):
        engine = idle_engine(llm)
        execute, calls = engine._runner.executor.forward, iter(range(100))

        def fail_late(plan, drawn, execute=execute, calls=calls, error=error):
            if next(calls) == 20:
                raise error
            return execute(plan, drawn)

        bystander = llm.stream(prompts[1], FORKED)
        next(bystander)
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner.executor, "forward", fail_late)
            assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
            assert next(calls) > 20
        *_, last = bystander
        assert tokens([last]) == expected[1:] * 2
        check_idle(llm)
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


def test_each_of_several_answers_ends_at_its_own_stop_string(demo: LLM) -> None:
    free = SamplingParams(temperature=1.2, n=3, max_tokens=40, seed=8, ignore_eos=True)
    stopped = SamplingParams(temperature=1.2, n=3, max_tokens=40, seed=8, ignore_eos=True, stop=["e ", "."])
    whole = demo.generate("Once upon a time", free, use_tqdm=False)[0].outputs
    cut = demo.generate("Once upon a time", stopped, use_tqdm=False)[0].outputs
    assert len({len(answer.token_ids) for answer in cut}) > 1
    for long, short in zip(whole, cut, strict=True):
        end = min(index for stop in ("e ", ".") if (index := long.text.find(stop)) >= 0)
        assert short.text == long.text[:end]
        assert short.token_ids == long.token_ids[: len(short.token_ids)]
        assert short.finish_reason == "stop"
    check_idle(demo)


def test_a_conversation_must_be_messages(demo: LLM) -> None:
    for messages in ([], [[]], ["x"], [[5]], 5, None, "hello", {"role": "user", "content": "Hello"}):
        with pytest.raises(RequestError, match="'role': 'user'"):
            demo.chat(messages, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="not valid Unicode"):
        demo.generate("a\udcff", use_tqdm=False)


def test_a_session_goes_on_in_another_llm(demo_model: Path, tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=40)
    question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    sizes = dict.fromkeys(("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes"), "256MiB")
    options: Any = {"dtype": "float32", "page_size": 16, "cache_dir": tmp_path, "max_num_batched_tokens": 128, **sizes}
    with LLM(demo_model, **options) as llm:
        [first] = llm.chat([question], greedy, session="trip", use_tqdm=False)
        # neither the text of a stop string nor its tokens are part of the answer
        stopped = SamplingParams(temperature=0, max_tokens=40, stop=" of Fra", output_kind=RequestOutputKind.DELTA)
        [second] = llm.chat([question], [stopped], session="trip", use_tqdm=False)
    held = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    assert second.prompt_token_ids[: len(held)] == held
    assert first.outputs[0].text == "The capital of France is Paris."
    end = held[-1]
    with LLM(demo_model, **options) as llm:
        [third] = llm.chat([question], greedy, session="trip", use_tqdm=False)
        seen = second.outputs[0].token_ids[:2]
        assert llm.tokenizer.decode(seen) == second.outputs[0].text == "The capital"
        held = [*second.prompt_token_ids, *seen]
        assert third.prompt_token_ids[: len(held) + 1] == [*held, end]
        assert third.num_cached_tokens_by_tier["disk"] == len(held) // 16 * 16
        for answers, error in (
            ([greedy, greedy], "1 prompts came with 2"),
            (SamplingParams(n=2), "n is 2, and a sess"),
        ):
            with pytest.raises(RequestError, match=error):
                llm.chat([question], answers, session="trip", use_tqdm=False)
        with pytest.raises(RequestError, match="a session takes messages such as"):
            llm.chat([[question]], greedy, session="trip", use_tqdm=False)
        with Session(tmp_path, "trip") as session:
            assert len(session.messages) == 6
            with pytest.raises(ConfigError, match="session trip is open in process"):
                llm.chat([question], greedy, session="trip", use_tqdm=False)


def test_a_session_needs_a_folder(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="session 'trip' needs a folder to be kept in; set cache_dir"):
        llm.chat([{"role": "user", "content": "Hello"}], session="trip", use_tqdm=False)


def test_a_closed_llm_says_so(tiny_model: Path) -> None:
    llm = LLM(tiny_model, device_kv_bytes="8MiB")
    llm.close()
    llm.close()
    with pytest.raises(DistKVError, match="closed"):
        llm.generate([[5]], use_tqdm=False)
