"""OpenAI's responses and Anthropic's messages, with their own packages."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from anthropic import Anthropic, BadRequestError
from openai import BadRequestError as RefusedError
from openai import NotFoundError, OpenAI
from support.servers import ServerProcess

from distkv.config import EngineConfig
from distkv.errors import StoreError
from distkv.frontend.conversation import Conversation, StoredMessage
from distkv.frontend.session import Session
from distkv.server.errors import ApiError
from distkv.server.kept_responses import KeptResponses
from distkv.server.options import ServerOptions
from distkv.storage.disk import file_lock
from distkv.storage.disk.file_lock import FileLock

SHORT: dict[str, Any] = {"model": "talker", "temperature": 0, "max_output_tokens": 20}
FULL: Any = {"extra_body": {"ignore_eos": True}}
WINDOW = "sink_window(sinks=4, window=32)"
ASKED: Any = [{"role": "user", "content": "Hello world"}]


def test_a_response_streams_what_it_would_say(openai: OpenAI) -> None:
    whole = openai.responses.create(input="Hello world", instructions="Be brief.", **SHORT, **FULL)
    chat = openai.chat.completions.create(
        model="talker", temperature=0, max_tokens=20,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello world"}], **FULL,
    )  # fmt: skip
    assert whole.output_text == chat.choices[0].message.content and whole.status == "incomplete"
    assert whole.usage is not None and whole.usage.output_tokens == 20
    events = list(openai.responses.create(input="Hello world", instructions="Be brief.", stream=True, **SHORT, **FULL))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == text == whole.output_text


def test_a_response_is_gone_on_from(openai: OpenAI) -> None:
    first = openai.responses.create(input="Hello world", **SHORT, **FULL)
    assert first.usage is not None
    forks = [
        openai.responses.create(input=question, previous_response_id=first.id, **SHORT, **FULL)
        for question in ("and?", "and?", "but why?")
    ]
    for fork in forks:
        assert fork.previous_response_id == first.id and fork.usage is not None
        assert fork.usage.input_tokens > first.usage.input_tokens + 20
        assert fork.usage.input_tokens_details.cached_tokens >= (first.usage.input_tokens + 20) // 16 * 16
    assert forks[0].output_text == forks[1].output_text
    third = openai.responses.create(input="so?", previous_response_id=forks[2].id, **SHORT, **FULL)
    assert third.usage is not None and third.usage.input_tokens > forks[2].usage.input_tokens + 20


def test_what_was_not_kept_cannot_be_gone_on_from(openai: OpenAI) -> None:
    passing = openai.responses.create(input="Hello", store=False, **SHORT)
    for response_id in (passing.id, "resp_" + "0" * 32, "trip", "../trip"):
        with pytest.raises(NotFoundError, match="there is no response"):
            openai.responses.create(input="and?", previous_response_id=response_id, **SHORT)


@pytest.fixture(scope="module")
def inexact(talker: Path) -> Iterator[ServerProcess]:
    """A server without a folder, whose answers are not those of the exact cache."""
    flags = ("--served-model-name", "talker", "--device-kv-bytes", "4MiB", "--num-threads", "1")
    with ServerProcess(talker, *flags, "--attention-policy", WINDOW, "--kv-cache-dtype", "int8") as server:
        yield server


def test_responses_without_a_folder_are_kept_in_memory(inexact: ServerProcess) -> None:
    with OpenAI(base_url=f"{inexact.url}/v1", api_key="none") as client:
        first = client.responses.create(input="Hello", **SHORT)
        second = client.responses.create(input="and?", previous_response_id=first.id, **SHORT)
        assert second.usage is not None and first.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens


def test_answers_that_are_not_of_the_exact_cache_say_so(inexact: ServerProcess, server: ServerProcess) -> None:
    """In every form of every API, and others do not have the field; the packages take it for what they do not know."""
    for one, extra in (inexact, {"kv_policy": f"{WINDOW}, kv_cache_dtype=int8"}), (server, {}):
        openai = OpenAI(base_url=f"{one.url}/v1", api_key="none")
        chat: Any = {"model": "talker", "messages": ASKED, "max_tokens": 3}
        completion: Any = {"model": "talker", "prompt": "Hello", "max_tokens": 3}
        with openai, Anthropic(base_url=one.url, api_key="none") as anthropic:
            response = openai.responses.create(input="Hello", **SHORT)
            events = list(openai.responses.create(input="Hello", stream=True, **SHORT))
            with anthropic.messages.stream(**chat) as stream:
                message = stream.get_final_message()
            said: list[Any] = [
                *openai.models.list(), openai.chat.completions.create(**chat), openai.completions.create(**completion),
                *openai.chat.completions.create(**chat, stream=True),
                *openai.completions.create(**completion, stream=True), response,
                *(event.response for event in events if hasattr(event, "response")),
                anthropic.messages.create(**chat), message,
            ]  # fmt: skip
        for body in said:
            told = body.model_extra or {}
            assert {name: told[name] for name in told if name == "kv_policy"} == extra, body


def _conversation() -> Conversation:
    conversation = Conversation()
    conversation._messages = [StoredMessage("user", "Hello")]
    return conversation


def test_a_response_that_is_being_dropped_is_there_or_is_not(tmp_path: Path) -> None:
    """Whoever asks for it then is not told of locks, and begins nothing anew."""
    kept = KeptResponses(_service(tmp_path))
    response_id = "resp_" + "0" * 32
    kept.keep(response_id, _conversation())
    path = tmp_path / "sessions" / f"{response_id}.json"
    lock = FileLock(path.with_suffix(".lock"))
    assert kept.begin(response_id).messages == _conversation().messages
    path.unlink()
    with pytest.raises(ApiError, match="there is no response"):
        kept.begin(response_id)
    lock.release(removes=True)
    with pytest.raises(ApiError, match="there is no response"):
        kept.begin(response_id)
    assert list((tmp_path / "sessions").iterdir()) == []


def test_answers_that_end_together_drop_the_oldest_once(tmp_path: Path) -> None:
    kept, num_threads = KeptResponses(_service(tmp_path, 2)), 3
    barrier = threading.Barrier(num_threads)

    def end(number: int) -> None:
        try:
            for turn in range(20):
                barrier.wait()
                kept.keep(f"resp_{turn * num_threads + number:032x}", _conversation())
        except BaseException:
            barrier.abort()  # or the others would wait for this one
            raise

    with ThreadPoolExecutor(num_threads) as pool:
        for done in [pool.submit(end, number) for number in range(num_threads)]:
            done.result()
    kept.keep("resp_" + "f" * 32, _conversation())
    assert len(list((tmp_path / "sessions").iterdir())) == 4, "two, each with its lock"


@pytest.mark.parametrize("moment", ["taken", "held"])
def test_a_response_that_another_thread_drops_first_is_of_no_concern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between the moments in which its lock file is opened and locked."""
    kept, take = KeptResponses(_service(tmp_path, 1)), file_lock._take
    first, second = (f"resp_{number:032x}" for number in range(2))
    kept.keep(first, _conversation())
    os.utime(tmp_path / "sessions" / f"{first}.json", (0, 0))

    def dropped(file: IO[str]) -> None:
        if Path(file.name).stem == first and Path(file.name).exists():
            Path(file.name).with_suffix(".json").unlink(missing_ok=True)
            Path(file.name).unlink()
            if moment == "held":
                raise BlockingIOError
        take(file)

    monkeypatch.setattr(file_lock, "_take", dropped)
    kept.keep(second, _conversation())
    assert kept.begin(second).messages


def test_a_response_that_cannot_be_dropped_costs_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptResponses(_service(tmp_path, 1))
    first, second = (f"resp_{number:032x}" for number in range(2))
    kept.keep(first, _conversation())
    lock = tmp_path / "sessions" / f"{first}.lock"
    lock.unlink()
    lock.mkdir()
    kept.keep(second, _conversation())
    assert f"{first}.json' is not dropped (Is a directory)" in caplog.text
    assert kept.begin(second).messages


def test_answers_in_memory_that_end_together_drop_no_one_too_many() -> None:
    """Not even where a thread is stopped between counting them and dropping one."""
    kept, both_count = KeptResponses(_service(None, 1)), threading.Barrier(2)

    class Held(OrderedDict[str, Conversation]):
        def __len__(self) -> int:
            found = super().__len__()
            with suppress(threading.BrokenBarrierError):
                both_count.wait(0.2)  # in vain where only one of them counts at a time
            return found

    kept._held = Held({"resp_" + "0" * 32: _conversation()})
    ids = [f"resp_{number:032x}" for number in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(kept.keep, one, _conversation()) for one in ids]:
            done.result()
    assert [*kept._held] in ([ids[0]], [ids[1]])


def test_a_response_that_is_being_read_is_not_dropped(tmp_path: Path) -> None:
    kept = KeptResponses(_service(tmp_path, 1))
    first, *others = (f"resp_{number:032x}" for number in range(3))
    with Session(tmp_path, first) as session:
        session.go_on_from(_conversation())
        session.save()
        for other in others:
            kept.keep(other, _conversation())
    kept.begin(first)


@pytest.mark.parametrize("with_folder", [False, True])
def test_responses_that_must_not_be_kept_leave_nothing(tmp_path: Path, with_folder: bool) -> None:
    """Those of chats' sessions have a limit of their own."""
    folder, response_id = tmp_path if with_folder else None, "resp_" + "0" * 32
    with pytest.raises(StoreError, match="max_stored_responses is 0"):
        KeptResponses(_service(folder, 0)).keep(response_id, _conversation())
    if with_folder:
        with pytest.raises(StoreError, match=r"would take \d+ bytes, and max_session_bytes is 20"):
            KeptResponses(_service(folder, 9, max_session_bytes=20)).keep(response_id, _conversation())
        KeptResponses(_service(folder, 9, max_sessions=0)).keep("resp_" + "1" * 32, _conversation())
        assert [path.name for path in (tmp_path / "sessions").glob("*.json")] == ["resp_" + "1" * 32 + ".json"]


def _service(cache_dir: Path | None, most: int = 9, **options: Any) -> Any:
    config = EngineConfig("m", cache_dir=cache_dir, **options)
    return SimpleNamespace(llm=SimpleNamespace(config=config), options=ServerOptions(max_stored_responses=most))


@pytest.mark.parametrize("with_folder", [False, True])
def test_the_oldest_responses_are_dropped(tmp_path: Path, with_folder: bool) -> None:
    kept = KeptResponses(_service(tmp_path if with_folder else None, 3))
    (tmp_path / "sessions").mkdir()
    users = tmp_path / "sessions" / "resp_trip.json"
    users.write_text("a session of that name")
    os.utime(users, (0, 0))
    ids = [f"resp_{number:032x}" for number in range(5)]
    for age, response_id in enumerate(ids):
        kept.keep(response_id, _conversation())
        if with_folder:
            os.utime(tmp_path / "sessions" / f"{response_id}.json", (age, age))
    assert users.exists()
    for dropped in ids[:2]:
        with pytest.raises(ApiError, match="there is no response"):
            kept.begin(dropped)
    for response_id in ids[2:]:
        kept.begin(response_id)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input": [{"role": "user", "content": "a", "colour": "red"}]}, "'colour'"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}]}]}, "'x'"),
        ({"tools": [{"type": "web_search"}]}, "tools: this server does not"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "function_call_output"),
        ({"input": []}, "nothing that is new"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input_image"),
        ({"text": {"format": {"type": "json_object"}}}, "text: this server does not"),
    ],
)
def test_what_a_response_cannot_do_is_refused(openai: OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        openai.responses.create(**({"input": "Hello"} | SHORT | options))
    assert message in caught.value.message


@pytest.fixture
def anthropic(server: ServerProcess) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_a_message_streams_what_it_would_say(anthropic: Anthropic, openai: OpenAI) -> None:
    options: Any = {"model": "talker", "messages": ASKED, "max_tokens": 20, "system": "Be brief.", **FULL}
    options |= {"extra_body": {"ignore_eos": True, "temperature": 0}}
    whole = anthropic.messages.create(**options)
    chat = openai.chat.completions.create(
        model="talker", temperature=0, max_tokens=20, messages=[{"role": "system", "content": "Be brief."}, *ASKED],
        **FULL,
    )  # fmt: skip
    [block] = whole.content
    assert block.type == "text" and block.text == chat.choices[0].message.content
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 20
    assert chat.usage is not None
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    with anthropic.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 20
    for option in ({"temperature": 1.0}, {"stream": False}, {"max_tokens": 3}):
        with pytest.raises(BadRequestError, match="does not support"):
            anthropic.messages.count_tokens(model="talker", messages=ASKED, extra_body=option)
    counted = anthropic.messages.count_tokens(model="talker", messages=ASKED, system="Be brief.")
    assert counted.input_tokens == chat.usage.prompt_tokens
    stop = block.text[4:6]
    stopped = anthropic.messages.create(**options, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


def test_what_a_message_cannot_do_is_refused(anthropic: Anthropic) -> None:
    for options, message in (
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}}]}, "tools: this server does not"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "It"}]}, "begun answer"),
    ):
        with pytest.raises(BadRequestError) as caught:
            anthropic.messages.create(**({"model": "talker", "messages": ASKED, "max_tokens": 2} | options))
        body: Any = caught.value.body
        assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
        assert message in body["error"]["message"]
