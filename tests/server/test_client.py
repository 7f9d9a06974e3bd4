"""`Client` and `AsyncClient` beside the `LLM` whose methods they have."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as changed
from support.servers import ServerProcess

from distkv import (
    LLM,
    AsyncClient,
    CapacityError,
    Client,
    ConfigError,
    DistKVError,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

PARAMS = SamplingParams(max_tokens=12, n=2, seed=4, logprobs=2, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "Hello world"}]


@pytest.fixture(scope="module")
def llm(talker: Path) -> Iterator[LLM]:
    with LLM(talker, page_size=16, device_kv_bytes="4MiB") as llm:
        yield llm


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def same(output: RequestOutput, expected: RequestOutput) -> bool:
    """Whether two outputs tell the same, but for what was cached and the prompt's text, which a chat has not."""
    return replace(output, request_id="", num_cached_tokens_by_tier={}) == replace(
        expected, request_id="", num_cached_tokens_by_tier={}
    )


def test_outputs_are_those_of_the_llm(client: Client, llm: LLM) -> None:
    for prompts in ("Hello world", ["Hello", [40, 41, 42]], {"prompt_token_ids": [50, 51]}):
        for output, expected in zip(
            client.generate(prompts, PARAMS, use_tqdm=False), llm.generate(prompts, PARAMS, use_tqdm=False), strict=True
        ):
            assert same(output, expected) and output.num_cached_tokens_by_tier
    [output], [expected] = client.chat(MESSAGES, PARAMS), llm.chat(MESSAGES, PARAMS, use_tqdm=False)
    assert same(output, expected)
    assert len(client.chat([MESSAGES, MESSAGES], PARAMS)) == 2
    assert client.generate([], PARAMS) == []


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_streams_are_those_of_the_llm(client: Client, llm: LLM, kind: RequestOutputKind) -> None:
    params = changed(PARAMS, n=1, output_kind=kind)
    outputs, expected = list(client.stream("Hello", params)), list(llm.stream("Hello", params))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    if kind is RequestOutputKind.DELTA:
        text = lambda outputs: "".join(output.outputs[0].text for output in outputs)  # noqa: E731
        assert text(outputs) == text(expected)
    else:
        assert same(outputs[-1], expected[-1])


def test_leaving_a_stream_ends_the_request(client: Client, server: ServerProcess) -> None:
    stream = client.stream("Hello", SamplingParams(max_tokens=2000, ignore_eos=True))
    next(stream)
    assert client.stats().num_running == 1
    stream.close()
    server.await_idle()


def test_errors_are_those_of_the_llm(client: Client) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        client.generate("", use_tqdm=False)
    with pytest.raises(RequestError, match="token id 1000000"):
        client.generate([[5], [1000000]], use_tqdm=False)
    with pytest.raises(RequestError, match=r"prompts is 5.5; give a text"):
        client.generate(5.5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="2 prompts came with 1 priority"):
        client.generate(["a", "b"], priority=[1])
    with pytest.raises(CapacityError, match="lower n"):
        client.generate("Hello", SamplingParams(n=65), use_tqdm=False)
    with pytest.raises(ConfigError, match=r"session is '\.'"):
        client.chat(MESSAGES, session=".", use_tqdm=False)
    with pytest.raises(RequestError, match="image"):
        client.chat([{"role": "user", "content": [{"type": "image"}]}], use_tqdm=False)
    with pytest.raises(ConfigError, match="url is 'here'"):
        Client("here")
    with Client("http://127.0.0.1:9") as nobody, pytest.raises(DistKVError, match="cannot be reached"):
        nobody.stats()
    client.reset_prefix_cache()


def test_a_request_that_cannot_go_on_ends_alone(client: Client, llm: LLM) -> None:
    """With what it had, as with the LLM."""
    limits = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["Hello"]), min_tokens=12, n=2, seed=4)
    params = [limits, PARAMS, limits]
    prompts = ["Hello", "Hello world", [40, 41]]
    outputs, expected = (one.generate(prompts, params, use_tqdm=False) for one in (client, llm))
    assert same(outputs[1], expected[1])
    for output, other in ((outputs[0], expected[0]), (outputs[2], expected[2])):
        assert isinstance(output.error, RequestError) and str(output.error) == str(other.error)
        assert output.outputs == other.outputs and output.outputs[0].finish_reason == "error"
        texts = [answer.text for answer in output.outputs]  # the first to be at its end ends all
        assert "Hello" in texts and all("Hello".startswith(text) for text in texts)
        assert output.prompt_token_ids == other.prompt_token_ids
    for kind in RequestOutputKind:
        for one in (client, llm):
            with pytest.raises(RequestError, match="leave no token") as failed:
                list(one.stream("Hello", changed(limits, output_kind=kind)))
            assert failed.value.output.outputs[0].finish_reason == "error"


def test_a_session_is_kept_by_the_server(client: Client) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, second = (client.chat(MESSAGES, params, session="kept", use_tqdm=False)[0] for _ in range(2))
    assert second.prompt_token_ids[: len(first.prompt_token_ids)] == first.prompt_token_ids
    assert len(second.prompt_token_ids) > len(first.prompt_token_ids) + 8


def test_the_async_client_says_the_same(server: ServerProcess, llm: LLM) -> None:
    async def main() -> None:
        async with AsyncClient(server.url) as client:
            outputs = await asyncio.gather(*(client.generate([40 + number], PARAMS) for number in range(8)))
            for number, [output] in enumerate(outputs):
                assert same(output, llm.generate([40 + number], PARAMS, use_tqdm=False)[0])
            [answer] = await client.chat(MESSAGES, PARAMS)
            assert same(answer, llm.chat(MESSAGES, PARAMS, use_tqdm=False)[0])
            streamed = [output async for output in client.stream("Hello", PARAMS)]
            assert same(streamed[-1], llm.generate("Hello", PARAMS, use_tqdm=False)[0]) and len(streamed) > 1
            task = asyncio.create_task(client.generate("Hello", SamplingParams(max_tokens=2000, ignore_eos=True)))
            while not (await client.stats()).num_running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(RequestError, match="the prompt is empty"):
                await client.generate("")
            await client.reset_prefix_cache()

    asyncio.run(main())
    server.await_idle()
