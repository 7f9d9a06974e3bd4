"""A session goes on from what its reader saw of an answer, and repeats the tokens as far as they agree with that."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted_engine import ScriptedEngine
from support.tokenizers import save_tokenizer

import distkv.commands.chat
import distkv.frontend.front_end
from distkv import LLM, AsyncLLM, CompletionOutput, RequestError, RequestOutput, SamplingParams, StoreError
from distkv.commands.main import app
from distkv.frontend.conversation import Conversation
from distkv.frontend.incremental_decoder import IncrementalDecoder
from distkv.frontend.seen_tokens import seen_tokens
from distkv.frontend.session import Session
from distkv.frontend.tokenizer import Tokenizer

CHAT = "{% for one in messages %}<s>{{ one.role[0] }} {{ one.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>a {% endif %}"
QUESTION = {"role": "user", "content": "Hello"}
made: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the byte-level tokenizer."""
    for kind in ("sentencepiece", "byte level"):
        folder = save_tokenizer(tmp_path_factory.mktemp("model"), kind, chat_template=CHAT)
        made[kind] = Tokenizer(folder)
    return folder


def decoded(tokenizer: Tokenizer, prompt: list[int], token_ids: list[int]) -> str:
    decoder = IncrementalDecoder(tokenizer, prompt)
    return "".join(map(decoder.add, token_ids)) + decoder.finish()


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    vocabulary = tokenizer._tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
@settings(max_examples=100)
@given(st.data())
def test_seen_tokens_decode_to_the_text_that_was_seen(kind: str, data: st.DataObject) -> None:
    """Wherever the text is cut; and they begin with the sampled ones."""
    tokenizer = made[kind]
    prompt = tokenizer.encode_chat([QUESTION])
    known = st.sampled_from(sorted(tokenizer._text_ids))
    words = st.sampled_from(tokenizer.encode("Hello the world user abc. é漢🙂") + ids(tokenizer, "<special>"))
    sampled = data.draw(st.lists(words | known, max_size=15), "sampled")
    text = decoded(tokenizer, prompt, sampled)
    cut = data.draw(st.integers(0, len(text)), "cut")
    found = seen_tokens(tokenizer, prompt, sampled, text[:cut])
    if cut == len(text):
        assert found == sampled
    if found is None:  # bytes that are no character, which no text is encoded as
        assert "\ufffd" in text[:cut] or kind == "sentencepiece"
    else:
        assert decoded(tokenizer, prompt, found) == text[:cut]


@pytest.mark.parametrize(
    ("sampled", "seen", "expected"),
    [
        (["▁the", "▁world", "▁user"], " the world", ["▁the", "▁world"]),
        (["▁the", "▁world", "▁user"], " the wor", ["▁the", "▁", "<0x77>", "<0x6F>", "<0x72>"]),
        (["▁Hello", "▁the", "▁world"], " Hello the w", ["▁Hello", "▁the", "▁", "<0x77>"]),
        (["▁the", "<0x0A>", "<0x0A>", "▁user"], " the\n\n", ["▁the", "<0x0A>", "<0x0A>"]),
        (["▁the", "<0x0A>", "<0x0A>", "▁user"], " the\n", ["▁the", "<0x0A>"]),
        (["▁the", "<special>", "▁world", "</s>"], " the world", ["▁the", "<special>", "▁world", "</s>"]),
        (["▁the", "▁user"], "", []),
    ],
)
def test_tokens_are_repeated_up_to_the_cut(sampled: list[str], seen: str, expected: list[str]) -> None:
    tokenizer = made["sentencepiece"]
    prompt = tokenizer.encode_chat([QUESTION])
    assert seen_tokens(tokenizer, prompt, ids(tokenizer, *sampled), seen) == ids(tokenizer, *expected)


Ask = Callable[..., list[RequestOutput]]


def ask_blocking(folder: Path, cache_dir: Path, *calls: SamplingParams) -> list[RequestOutput]:
    with LLM(folder, cache_dir=cache_dir) as llm:
        return [llm.chat([QUESTION], params, session="trip", use_tqdm=False)[0] for params in calls]


def ask_async(folder: Path, cache_dir: Path, *calls: SamplingParams) -> list[RequestOutput]:
    async def main() -> list[RequestOutput]:
        async with AsyncLLM(folder, cache_dir=cache_dir) as llm:
            outputs = []
            for params in calls:
                async for output in llm.chat([QUESTION], params, session="trip"):
                    last = output
                outputs.append(last)
            return outputs

    return asyncio.run(main())


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    vocabulary = made["byte level"]._tokenizer.get_vocab()
    engine = ScriptedEngine([vocabulary[one] for one in ["H", "Hello", "Ġuser", "Ġworld", "</s>"]], vocab_size=400)
    monkeypatch.setattr(distkv.frontend.front_end, "launch", lambda config, check: engine)
    return engine


@pytest.mark.parametrize("ask", [ask_blocking, ask_async])
@pytest.mark.parametrize(
    ("stop", "seen", "num_repeated"),
    [(" user", "HHello", 2), ("lo u", "HHel", 1), ("Hello", "H", 1), ("</s>", "HHello user world", 4), ("H", "", 0)],
)
def test_the_next_prompt_holds_the_text_that_was_seen(
    folder: Path, engine: ScriptedEngine, tmp_path: Path, ask: Ask, stop: str, seen: str, num_repeated: int
) -> None:
    cut, whole = SamplingParams(max_tokens=9, stop=[stop], ignore_eos=True), SamplingParams(max_tokens=9)
    first, _ = ask(folder, tmp_path, cut, whole)
    assert first.outputs[0].text == seen and first.error is None
    tokenizer, (prompt, following) = made["byte level"], engine.prompts
    repeated = prompt + engine.script[:num_repeated]
    assert following[: len(repeated)] == repeated
    assert tokenizer._tokenizer.decode(following) == f"<s>u Hello</s><s>a {seen}</s><s>u Hello</s><s>a "
    with Session(tmp_path, "trip") as session:
        for message, text in zip(session.messages[1::2], [seen, "HHello user world"], strict=True):
            assert (message["content"], decoded(tokenizer, prompt, message["token_ids"])) == (text, text)


@pytest.mark.parametrize(
    ("script", "params", "text", "kept", "num_repeated"),
    [
        (["H", "<special>", "Ġuser", "</s>"], {"skip_special_tokens": False}, "H<special> user", None, 3),
        (["H", "Ġuser", "</s>"], {"skip_special_tokens": False, "include_stop_str_in_output": True}, "H user</s>",
         "H user", 2),
        (["H", "Ġuser", "<special>"], {"include_stop_str_in_output": True, "stop": "<special>"}, "H user<special>",
         "H user", 2),
        (["H", "Hello", "Ġuser"], {"include_stop_str_in_output": True, "stop": " user"}, "HHello user", None, 3),
        (["H", "Hello", "Ġuser"], {"include_stop_str_in_output": True, "stop": "Hel"}, "HHel", None, 1),
    ],
)  # fmt: skip
def test_a_session_goes_on_from_what_was_shown_but_for_the_end(
    folder: Path, engine: ScriptedEngine, tmp_path: Path, script: list[str], params: dict[str, Any], text: str,
    kept: str | None, num_repeated: int,
) -> None:  # fmt: skip
    engine.script = ids(made["byte level"], *script)
    first, _ = ask_blocking(folder, tmp_path, SamplingParams(max_tokens=9, **params), SamplingParams(max_tokens=9))
    assert first.outputs[0].text == text
    with Session(tmp_path, "trip") as session:
        answer = session.messages[1]
        assert answer["content"] == (kept or text)
        assert answer["token_ids"][:num_repeated] == engine.script[:num_repeated]
    prompt, following = engine.prompts
    assert following[: len(prompt) + num_repeated] == prompt + engine.script[:num_repeated]


@pytest.mark.parametrize("ask", [ask_blocking, ask_async])
def test_an_answer_that_cannot_be_kept_reaches_its_reader(
    folder: Path, engine: ScriptedEngine, tmp_path: Path, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sessions" / "trip.json.partial").mkdir(parents=True)
    [output] = ask(folder, tmp_path, SamplingParams(max_tokens=9))
    assert output.finished and output.outputs[0].text == "HHello user world"
    assert isinstance(output.error, StoreError) and "trip.json' cannot be written" in str(output.error)
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "trip.json' cannot be written" in record.message


def test_an_answer_that_is_left_early_is_kept_as_it_was_seen() -> None:
    """Its last text was held back, as it could have begun a stop string."""
    tokenizer, conversation = made["byte level"], Conversation()
    prompt = conversation.prompt(tokenizer, [QUESTION])
    sampled = ids(tokenizer, "H", "Hello", "Ġuser")
    conversation.add_output(CompletionOutput(0, "HHello", sampled, None, None, None, None))
    assert conversation.messages[-1] == {"role": "assistant", "content": "HHello", "token_ids": sampled[:2]}
    following = conversation.prompt(tokenizer, [QUESTION])
    assert following[: len(prompt) + 2] == prompt + sampled[:2]


def test_a_session_without_new_messages_is_refused(folder: Path, engine: ScriptedEngine, tmp_path: Path) -> None:
    with LLM(folder, cache_dir=tmp_path) as llm, pytest.raises(RequestError, match="nothing that is new in session"):
        llm.chat([], session="trip", use_tqdm=False)
        with pytest.raises(RequestError, match="sampling_params is 5; it must be a SamplingParams"):
            llm.chat([QUESTION], 5, session="trip", use_tqdm=False)  # type: ignore[arg-type]
    assert not engine.prompts


def test_a_chat_in_a_terminal_goes_on_when_an_answer_cannot_be_kept(
    folder: Path, engine: ScriptedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "sessions" / "trip.json.partial").mkdir(parents=True)
    questions = iter(["Hello", "Hello", ""])
    monkeypatch.setattr(distkv.commands.chat, "_ask", lambda: next(questions))
    app(["chat", "--model", str(folder), "--session", "trip", "--cache-dir", str(tmp_path)], standalone_mode=False)
    output = capsys.readouterr()
    assert output.out.count("HHello user world") == 2
    assert output.err.count("distkv: error: session file") == 2
