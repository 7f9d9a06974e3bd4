"""OpenAI's own package as the client of a server."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from support.servers import ServerProcess

from distkv import LLM, SamplingParams

ASKED: Any = [{"role": "user", "content": "Hello world"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
FULL: Any = {"extra_body": {"ignore_eos": True}}


def test_a_completion_is_that_of_the_llm(openai: OpenAI, talker: Any) -> None:
    answer = openai.completions.create(model="talker", prompt="Hello", **GREEDY, **FULL)
    with LLM(talker, page_size=16, device_kv_bytes="4MiB") as llm:
        [expected] = llm.generate("Hello", SamplingParams(ignore_eos=True, **GREEDY), use_tqdm=False)
    [choice] = answer.choices
    assert choice.text == expected.outputs[0].text and choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.id.startswith("cmpl-") and answer.model == "talker" and answer.object == "text_completion"


def test_texts_and_token_ids_come_in_batches(openai: OpenAI) -> None:
    one_by_one = [
        openai.completions.create(model="talker", prompt=prompt, n=2, seed=3, max_tokens=6, **FULL)
        for prompt in ([40, 41, 42], [43, 44])
    ]
    prompts = [[40, 41, 42], [43, 44]]
    batch = openai.completions.create(model="talker", prompt=prompts, n=2, seed=3, max_tokens=6, **FULL)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in batch.choices] == [one.text for each in one_by_one for one in each.choices]
    assert batch.usage is not None and (batch.usage.prompt_tokens, batch.usage.completion_tokens) == (5, 24)
    pieces = ["", "", "", ""]
    for chunk in openai.completions.create(
        model="talker", prompt=prompts, n=2, seed=3, max_tokens=6, stream=True, **FULL
    ):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == [choice.text for choice in batch.choices]
    texts = openai.completions.create(model="talker", prompt=["Hello", " world"], **GREEDY)
    assert len(texts.choices) == 2


def test_a_chat_streams_what_it_would_say(openai: OpenAI) -> None:
    whole = openai.chat.completions.create(model="talker", messages=ASKED, **GREEDY, **FULL)
    [choice] = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    chunks = list(
        openai.chat.completions.create(
            model="talker", messages=ASKED, stream=True, stream_options={"include_usage": True}, **GREEDY, **FULL
        )
    )
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant" and not any(part.usage for part in parts)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == choice.message.content
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    parts_of_text: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello world"}]}]
    again = openai.chat.completions.create(model="talker", messages=parts_of_text, **GREEDY, **FULL)
    assert again.choices[0].message.content == choice.message.content


def test_usage_comes_with_every_chunk_when_asked_for(openai: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        openai.completions.create(model="talker", prompt="Hello", stream=True, stream_options=options, **GREEDY, **FULL)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 12


def test_cached_tokens_are_told(openai: OpenAI) -> None:
    prompt = list(range(30, 80))
    for cached in (0, 48):
        answer = openai.completions.create(
            model="talker", prompt=prompt, max_tokens=2, extra_body={"cache_salt": "told"}
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == cached


def test_logprobs_of_completions(openai: OpenAI) -> None:
    answer = openai.completions.create(model="talker", prompt="Hello", logprobs=3, **GREEDY, **FULL)
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert len(found.tokens) == 12
    for index, token in enumerate(found.tokens):
        table = found.top_logprobs[index]
        assert 1 <= len(table) <= 3 and max(table.values()) == table[token] == found.token_logprobs[index] <= 0
        assert found.text_offset[index] == sum(map(len, found.tokens[:index]))
    offsets: list[int] = []
    for chunk in openai.completions.create(model="talker", prompt="Hello", logprobs=0, stream=True, **GREEDY, **FULL):
        part = chunk.choices[0].logprobs
        assert part is not None
        offsets += part.text_offset or []
    assert offsets == found.text_offset


def test_logprobs_of_chats(openai: OpenAI) -> None:
    options: Any = {"logprobs": True, "top_logprobs": 4, **GREEDY, **FULL}
    answer = openai.chat.completions.create(model="talker", messages=ASKED, **options)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 12
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 4 and entry.top_logprobs[0].logprob == entry.logprob
        assert entry.bytes == list(entry.token.encode())
    streamed = []
    for chunk in openai.chat.completions.create(model="talker", messages=ASKED, stream=True, **options):
        part = chunk.choices[0].logprobs
        streamed += part.content or [] if part is not None else []
    assert [one.logprob for one in streamed] == [one.logprob for one in logprobs.content]


def test_stop_seed_and_penalties_reach_the_sampler(openai: OpenAI) -> None:
    def text(**options: Any) -> str:
        return (
            openai.completions.create(model="talker", prompt="Hello", max_tokens=30, **FULL, **options).choices[0].text
        )

    greedy = text(temperature=0)
    stop = greedy[5:7]
    stopped = openai.completions.create(
        model="talker", prompt="Hello", temperature=0, max_tokens=30, stop=[stop], **FULL
    )
    assert stopped.choices[0].text == greedy[: greedy.index(stop)] and stopped.choices[0].finish_reason == "stop"
    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text(temperature=0, presence_penalty=2.0, frequency_penalty=2.0) != greedy


def test_several_answers(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model="talker", messages=ASKED, n=3, seed=5, temperature=1.5, max_completion_tokens=9, **FULL
    )
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in answer.choices] == [0, 1, 2]
    pieces = ["", "", ""]
    for chunk in openai.chat.completions.create(
        model="talker", messages=ASKED, n=3, seed=5, temperature=1.5, max_completion_tokens=9, stream=True, **FULL
    ):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == texts


def test_models_can_be_listed(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["talker", "other"]
    assert openai.models.retrieve("other").owned_by == "distkv"
    with pytest.raises(NotFoundError, match="'gpt-4' is not served here; use 'talker'"):
        openai.models.retrieve("gpt-4")


def test_a_session_is_gone_on_with(openai: OpenAI, server: ServerProcess) -> None:
    def say(content: str) -> Any:
        return openai.chat.completions.create(
            model="talker", messages=[{"role": "user", "content": content}], max_tokens=20,
            extra_body={"session": "trip", "ignore_eos": True},
        )  # fmt: skip

    first, second = say("Hello world" * 4), say("and?")
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 20
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 16 * 16


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_kept_comes_with_the_reason(openai: OpenAI, cache_dir: Path, stream: bool) -> None:
    name = f"unkept-{stream}"
    (cache_dir / "sessions" / f"{name}.json.partial").mkdir(parents=True)
    answer: Any = openai.chat.completions.create(
        model="talker", messages=ASKED, max_tokens=3, stream=stream, extra_body={"session": name}
    )
    last = list(answer)[-1] if stream else answer
    assert last.choices[0].finish_reason and "cannot be written" in last.session_error


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"temperature": -1}, "temperature is -1", None),
    ({"temperature": "hot"}, "temperature: input should be a valid number", "temperature"),
    ({"n": 0}, "n is 0", None),
    ({"n": 65}, "lower n", None),
    ({"stop": [""]}, "none of them empty", None),
    ({"max_tokens": 0}, "max_tokens is 0", None),
    ({"prompt": ""}, "the prompt is empty", None),
    ({"prompt": []}, "empty list", None),
    ({"prompt": [[1], []]}, "the prompt is empty", None),
    ({"prompt": [1, 10**9]}, "token id 1000000000", None),
    ({"prompt": [40] * 3000}, "max_model_len is 2048", None),
    ({"prompt": {"text": "Hello"}}, "prompt: ", "prompt"),
    ({"logprobs": 101}, "logprobs is 101", None),
    ({"echo": True, "stream": True}, "echo is true", None),
    ({"suffix": "end"}, "does not support this field", "suffix"),
    ({"extra_body": {"guided_decoding_backend": "a"}}, "does not support this field", "guided_decoding_backend"),
    ({"extra_body": {"top_q": 1}}, "does not support this field", "top_q"),
    ({"extra_body": {"top_k": -2}}, "top_k is -2", None),
    ({"stream_options": {"include_usage": True}}, "stream is not true", None),
    ({"stream": True, "stream_options": {"more": 1}}, "does not support this field", "stream_options.more"),
    ({"stream": True, "temperature": -1}, "temperature is -1", None),
    ({"stream": True, "prompt": [10**9]}, "token id 1000000000", None),
]


@pytest.mark.parametrize("options, message, param", REFUSED)
def test_what_cannot_be_done_is_refused(
    openai: OpenAI, options: dict[str, Any], message: str, param: str | None
) -> None:
    with pytest.raises(BadRequestError) as caught:
        openai.completions.create(**({"model": "talker", "prompt": "Hello"} | options))
    assert message in caught.value.message and caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # nothing for this template
        ({"tools": [{"type": "function"}], "parallel_tool_calls": False}, "parallel_tool_calls is false"),
        ({"extra_body": {"chat_template_kwargs": {"thinks": True}}}, "thinks"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "colour": 1}}}, "'colour'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}, "colour": 1}}, "it must be"),
        ({"messages": []}, "a conversation is []"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, "image_url"),
        ({"top_logprobs": 2}, "logprobs is not true"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "give one of them"),
        ({"extra_body": {"session": "../trip"}}, "session is '../trip'"),
        ({"extra_body": {"session": "resp_" + "0" * 32}}, "of a stored response"),
        ({"extra_body": {"session": "a"}, "n": 2}, "leave n out"),
        ({"messages": [{"role": "user", "content": "a", "colour": "red"}]}, "'colour'"),
    ],
)
def test_what_a_chat_cannot_do_is_refused(openai: OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        openai.chat.completions.create(**({"model": "talker", "messages": ASKED} | options))
    assert message in caught.value.message


def test_what_clients_send_without_meaning_it_is_taken(openai: OpenAI) -> None:
    openai.chat.completions.create(
        model="talker", messages=ASKED, max_tokens=1, user="me", response_format={"type": "text"}, logit_bias={},
        store=False, tool_choice="auto", tools=[], stop=None, parallel_tool_calls=True,
    )  # fmt: skip
    openai.chat.completions.create(  # the template would refuse to show them
        model="talker", messages=ASKED, max_tokens=1, tool_choice="none",
        tools=[{"type": "function", "function": {"name": "f"}}],
    )  # fmt: skip
    with pytest.raises(NotFoundError):
        openai.chat.completions.create(model="gpt-4", messages=ASKED)


def test_64_streams_at_a_time(server: ServerProcess, openai: OpenAI) -> None:
    async def stream(client: AsyncOpenAI, number: int) -> str:
        text = ""
        async for chunk in await client.completions.create(
            model="talker", prompt=[40 + number, 41], temperature=0, max_tokens=24, stream=True, **FULL
        ):
            text += chunk.choices[0].text
        return text

    async def main() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(64)))

    texts = asyncio.run(main())
    prompts = [[40 + number, 41] for number in range(64)]
    batch = openai.completions.create(model="talker", prompt=prompts, temperature=0, max_tokens=24, **FULL)
    assert texts == [choice.text for choice in batch.choices]
    server.await_idle()


def test_who_goes_away_leaves_no_page_behind(server: ServerProcess) -> None:
    async def leave(client: AsyncOpenAI, number: int) -> None:
        chunks = await client.completions.create(
            model="talker", prompt=[50 + number], max_tokens=2000, stream=bool(number % 2), n=2, **FULL
        )
        async for _ in chunks:
            if number % 4 == 1:
                await chunks.close()
                return

    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            tasks = [asyncio.create_task(leave(client, number)) for number in range(24)]
            await asyncio.sleep(1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    server.await_idle()
