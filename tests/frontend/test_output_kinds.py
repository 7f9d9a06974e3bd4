"""Outputs that are cumulative, deltas, or final only: the same answers, told in other pieces."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from distkv import LLM, AsyncLLM, RequestError, RequestOutput, RequestOutputKind, SamplingParams
from distkv.engine.protocol import EngineRequest, TokenOutput
from distkv.engine.thread import Sink
from distkv.errors import StoreError
from distkv.frontend.answer import RequestState
from distkv.frontend.front_end import FrontEnd
from distkv.frontend.tokenizer import Tokenizer
from distkv.outputs import join_deltas
from distkv.workers.sampling.sampled_token import TokenLogprobs

GONE = StoreError("gone")
DELTA, FINAL = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
TEXTS = {
    "plain": ("The quick brown fox jumps over the lazy dog.", {}),
    "bytes": ("naïve 東京都 🎈🎉 \u200bok", {}),
    "stop": ("one two three four five six", {"stop": ["four", "never there"]}),
    "stop at once": ("one two", {"stop": "one"}),
    "almost a stop": ("ends with fou", {"stop": ["four"]}),
    "two stops": ("abcdefgh", {"stop": ["fg", "efgh"]}),
    "logprobs": ("a few words with numbers", {"logprobs": 2}),
}


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def told(
    tokenizer: Tokenizer, texts: list[str], params: SamplingParams, every: int = 1, fails: bool = False
) -> list[RequestOutput]:
    """What a reader gets who looks after every so many tokens; the answers grow in turns, the last token of each is an
    end token unless they fail before."""
    request = EngineRequest("0", [1, 2], msgspec.structs.replace(params, n=len(texts)), 1000, 0)
    state = RequestState(request, None, tokenizer)
    ids = [[*tokenizer.encode(text), 2] for text in texts]
    outputs: list[RequestOutput] = []
    count = 0
    for place in range(max(map(len, ids))):
        for index, tokens in enumerate(ids):
            if place >= len(tokens) or state.is_finished(index):
                continue
            reason = "stop" if place == len(tokens) - 1 else None
            if reason and fails:
                continue
            logprobs = TokenLogprobs(-0.5, 1, [(7, -0.5), (8, -1.0)][: params.logprobs]) if params.logprobs else None
            state.add(TokenOutput("0", index, tokens[place], logprobs, reason, None))
            count += 1
            if count % every == 0 and (output := state.next_output()) is not None:
                outputs.append(output)
    if fails:
        state.fail(GONE)
    if (output := state.next_output()) is not None and (not outputs or not outputs[-1].finished):
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("case", TEXTS)
def test_deltas_joined_are_the_whole(tokenizer: Tokenizer, case: str, every: int, fails: bool) -> None:
    """Whether a reader sees each step or misses some, and of several answers that end at different times."""
    text, options = TEXTS[case]
    params = SamplingParams(**options)
    texts = [text, text[::-1], "x" + text]
    whole = told(tokenizer, texts, params, fails=fails)[-1]
    deltas = told(tokenizer, texts, msgspec.structs.replace(params, output_kind=DELTA), every, fails)
    assert whole.finished and [one.finished for one in deltas] == [False] * (len(deltas) - 1) + [True]
    assert join_deltas(deltas) == whole
    for number, one in enumerate(deltas, 1):
        assert all(part.token_ids or part.finish_reason for part in one.outputs), "answers that have not grown stay out"
        assert len(join_deltas(deltas[:number]).outputs) <= 3
    [final] = told(tokenizer, texts, msgspec.structs.replace(params, output_kind=FINAL), every, fails)
    assert final == whole


@pytest.mark.parametrize("case", ["plain", "stop", "logprobs"])
def test_cumulative_outputs_only_grow(tokenizer: Tokenizer, case: str) -> None:
    text, options = TEXTS[case]
    before = ""
    for output in told(tokenizer, [text], SamplingParams(**options)):
        assert output.outputs[0].text.startswith(before)
        before = output.outputs[0].text


def test_a_delta_takes_no_longer_than_it_is(tokenizer: Tokenizer) -> None:
    """Nothing of what was taken is kept, so a step of a long answer touches what is new alone."""
    request = EngineRequest("0", [1], SamplingParams(output_kind=DELTA, logprobs=1, stop="@"), 10_000, 0)
    state = RequestState(request, None, tokenizer)
    token = tokenizer.encode(" word")[0]
    [answer] = state._answers
    for _ in range(2000):
        state.add(TokenOutput("0", 0, token, TokenLogprobs(-1.0, 1, [(token, -1.0)]), None, None))
        assert state.next_output() is not None
        assert not answer._token_ids and not answer._logprobs and not answer._pieces
        assert len(answer._text._held_back) <= 1


PROMPTS = [[5, 6, 7], [9] * 20]
PARAMS = SamplingParams(temperature=0.8, seed=3, n=2, max_tokens=20, logprobs=1, ignore_eos=True)


def test_streams_of_an_llm(tiny_model: Path) -> None:
    with LLM(tiny_model, device_kv_bytes="4MiB") as llm:
        for prompt in PROMPTS:
            whole = list(llm.stream(prompt, PARAMS))[-1]
            deltas = list(llm.stream(prompt, msgspec.structs.replace(PARAMS, output_kind=DELTA)))
            assert same(join_deltas(deltas), whole) and len(deltas) > 10
            [final] = llm.stream(prompt, msgspec.structs.replace(PARAMS, output_kind=FINAL))
            assert same(final, whole)
        for kind in RequestOutputKind:
            outputs = llm.generate(PROMPTS, msgspec.structs.replace(PARAMS, output_kind=kind), use_tqdm=False)
            assert same(outputs[1], whole), "who waits for the end gets all of it"


def test_a_slow_reader_of_an_async_llm_misses_no_delta(tiny_model: Path) -> None:
    async def read(llm: AsyncLLM, kind: RequestOutputKind, seconds: float) -> list[RequestOutput]:
        outputs = []
        async for output in llm.generate(PROMPTS[0], msgspec.structs.replace(PARAMS, output_kind=kind)):
            outputs.append(output)
            await asyncio.sleep(seconds)
        return outputs

    async def main() -> None:
        async with await AsyncLLM.create(tiny_model, device_kv_bytes="4MiB") as llm:
            whole = (await read(llm, RequestOutputKind.CUMULATIVE, 0))[-1]
            slow, quick, final = await asyncio.gather(
                read(llm, DELTA, 0.03), read(llm, DELTA, 0), read(llm, FINAL, 0.01)
            )
            assert same(join_deltas(slow), whole) and same(join_deltas(quick), whole) and same(final[0], whole)
            assert len(final) == 1 and len(slow) < len(quick)

    asyncio.run(main())


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_token_behind_a_stop_string_brings_no_output(tokenizer: Tokenizer, kind: RequestOutputKind) -> None:
    """It was under way when the answer ended, and comes while the last output is read."""
    request = EngineRequest("0", [1, 2], SamplingParams(stop="four", output_kind=kind), 100, 0)
    sinks: list[Sink] = []
    thread = SimpleNamespace(add=lambda requests, sink: sinks.append(sink), abort=lambda answers: None)
    llm = AsyncLLM.__new__(AsyncLLM)
    llm._mailbox = None
    llm._front_end = cast(
        FrontEnd,
        SimpleNamespace(
            thread=thread, next_number=lambda: 0, request=lambda *given: RequestState(request, None, tokenizer)
        ),
    )

    async def main() -> list[bool]:
        finished = []
        stream = llm.generate([1, 2], request.params)
        first = asyncio.ensure_future(anext(stream))
        while not sinks:
            await asyncio.sleep(0)
        *begin, late = tokenizer.encode("four five")
        for token in begin:
            sinks[0]([TokenOutput("0", 0, token, None, None, None)])
        finished.append((await first).finished)
        sinks[0]([TokenOutput("0", 0, late, None, None, None)])
        await asyncio.sleep(0.01)
        async for output in stream:
            finished.append(output.finished)
        return finished

    assert asyncio.run(main()) == [True]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_session_keeps_the_whole_answer(demo_model: Path, tmp_path: Path, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, output_kind=kind)
    question = [{"role": "user", "content": "Name three colours."}]

    async def ask(llm: AsyncLLM, session: str, leave_after: int | None) -> list[Any]:
        outputs = []
        stream = llm.chat(question, params, session=session)
        async for output in stream:
            outputs.append(output)
            if len(outputs) == leave_after:
                break
        await stream.aclose()
        return outputs

    async def main() -> None:
        options: dict[str, Any] = {"device_kv_bytes": "64MiB", "host_kv_bytes": "64MiB", "max_model_len": 512}
        async with await AsyncLLM.create(demo_model, cache_dir=tmp_path, disk_kv_bytes="64MiB", **options) as llm:
            await ask(llm, "all", None)
            left = await ask(llm, "some", 1)
            with llm._front_end.session("all", params) as session:
                assert len(session.messages[-1]["token_ids"]) in (5, 6)
            with llm._front_end.session("some", params) as session:
                kept = session.messages[-1]["token_ids"]
                assert kept == join_deltas(left).outputs[0].token_ids[: len(kept)] and kept

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["delta", 1, None])
def test_a_kind_that_is_none_is_refused(kind: Any) -> None:
    with pytest.raises(RequestError, match=r"output_kind is .*; use a RequestOutputKind, for instance DELTA"):
        SamplingParams(output_kind=kind)


def same(one: RequestOutput, other: RequestOutput) -> bool:
    return replace(one, request_id="", num_cached_tokens_by_tier={}) == replace(
        other, request_id="", num_cached_tokens_by_tier={}
    )
