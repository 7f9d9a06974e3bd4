"""What a message may hold, what a template may do with it, and that a model's folder runs no code."""

import asyncio
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.scripted_engine import ScriptedEngine
from support.tokenizers import save_tokenizer

import distkv.frontend.front_end
from distkv import LLM, AsyncLLM, ConfigError, RequestError, SamplingParams
from distkv.frontend.messages import Message
from distkv.frontend.session import Session
from distkv.frontend.tokenizer import Tokenizer, TokenLimit

TURN = "{% for one in messages %}<s>{{ one.role }}: {{ CONTENT }}</s>{% endfor %}"
PLAIN = TURN.replace("CONTENT", "one.content")
CALLS = TURN.replace("CONTENT", "one.content or one.tool_calls | map(attribute='id') | join")

Render = Callable[..., str]


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """Text of a conversation by a template."""

    def render(template: str, *messages: Any) -> str:
        tokenizer = Tokenizer(save_tokenizer(tmp_path, chat_template=template))
        return str(tokenizer._tokenizer.decode(tokenizer.encode_chat(list(messages))))

    return render


def user(content: Any, **more: Any) -> Message:
    return {"role": "user", "content": content} | more


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hello", "Hello"),
        ([text("Hello")], "Hello"),
        ([text("Hello"), text("the"), "world"], "Hello\nthe\nworld"),
        ((text("Hello"),), "Hello"),
        ([], ""),
        (None, ""),
    ],
)
def test_content_may_be_a_text_or_parts_of_text_or_none(render: Render, content: Any, expected: str) -> None:
    assert render(PLAIN, user(content)) == render(PLAIN, user(expected))
    assert "None" not in render(PLAIN, user(content))


def test_content_of_none_is_the_templates_business_where_it_knows_of_it(render: Render) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "abc"}]}
    assert "abc" in render(CALLS, user("Hello"), call)
    assert "abc" in render(CALLS, user("None"), {key: call[key] for key in ("role", "tool_calls")})
    adding = PLAIN.replace("one.content", "'a' + one.content")  # fails on None
    assert render(adding, user(None)) == render(adding, user(""))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), "content has a part of type 'image_url'"),
        (user([5]), "content has a part of type 5; a part is a text or {'type': 'text'"),
        (user([{"type": "text"}]), "content has a part of type 'text'"),
        (user(5), "content is 5; it must be a text or a list of parts"),
        (user({"type": "text", "text": "Hello"}), "content is {'text'.*; it must be a text or a list of parts"),
        ({"role": "user"}, "a message of the user has no content; give its text as 'content'"),
        ({"content": "Hello"}, "a message has the role None; it must be 'user'"),
        (user("Hello", role=5), "a message has the role 5"),
        (
            user("Hello", tool_calls=[{"id": "abc"}]),
            "has 'tool_calls', which the model's chat template leaves out",
        ),
        (user("Hello", name="a", id=5), "a message has 'name', 'id', which the model's"),
    ],
)
def test_what_a_template_would_pass_over_is_refused(render: Render, message: Message, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        render(PLAIN, message)


def test_many_fields_are_refused_before_any_is_tried(render: Render) -> None:
    """Each takes a rendering of all messages; thousands would hold a server up."""
    message: Any = {"role": "user", "content": "a"} | {f"field_{index}": 1 for index in range(30000)}
    with pytest.raises(RequestError, match="30000 fields beside role and content"):
        render("{{ messages[0].content }}", message)


def test_the_template_that_is_rendered_says_whether_it_uses_a_field(render: Render) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "abc"}]}
    never = "{# tool_calls #}" + PLAIN  # which has the word
    both: Any = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": CALLS}]
    for template in (never, both):
        with pytest.raises(RequestError, match="has 'tool_calls', which"):
            render(template, user("Hello"), call)
    needing = PLAIN.replace("one.content", "one.content + one.name")
    assert "Helloabc" in render(needing, user("Hello", name="abc"))


def test_fields_that_hold_nothing_are_left_out(render: Render, tmp_path: Path) -> None:
    """As openai's `message.model_dump()` has them."""
    nothing = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "name")) | {"annotations": []}
    printing = PLAIN.replace("one.content", "one | list | join(',')")
    assert render(printing, user("Hello", **nothing)) == render(printing, user("Hello"))
    with Session(tmp_path, "trip") as session:
        assert session.check([user("Hello", **nothing)]) == session.check([user("Hello")])
        with pytest.raises(RequestError, match="unknown field `name`"):
            session.check([user("Hello", name="a")])


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ 1 / 0 }}", r"template fails on these messages \(ZeroDivisionError: division by zero\); see whether"),
        ("{{ raise_exception('no system') }}", "the chat template refuses these messages: no system"),
        ("{% for %}", "the chat template refuses these messages"),
        ("{{ messages[3].content }}", "the chat template refuses these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails on these messages \(RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", r"fails on these messages \(OverflowError"),
        ("{{ messages[0].content | int / 'x' }}", r"fails on these messages \(TypeError"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(render: Render, template: str, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        render(template, user("Hello"))


@pytest.mark.parametrize("content", ["", "{", "5", "[]", '{"model": 5}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_tokenizer_are_one_clear_error(tmp_path: Path, name: str, content: str) -> None:
    (save_tokenizer(tmp_path) / name).write_text(content)
    if (name, content) == ("tokenizer_config.json", '{"model": 5}'):
        assert Tokenizer(tmp_path).encode("Hello")
        return
    with pytest.raises(ConfigError, match=r"cannot be loaded \(.*mend its files for text"):
        Tokenizer(tmp_path)


def test_no_code_of_a_models_folder_is_run_and_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    save_tokenizer(tmp_path, **fields)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    with pytest.raises(ConfigError, match="it needs code of the folder's own, which is not run"):
        Tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists() and sys.stdin.tell() == 0


NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for one in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ one.content }}{% endfor %}"
    "{% generation %}{% endgeneration %}{{ mood | default('calm') }}"
)


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save_tokenizer(tmp_path, chat_template=TOOLS))
    messages = [user("a"), user("Hello")]

    def rendered(*options: Any) -> str:
        return str(tokenizer._tokenizer.decode(tokenizer.encode_chat(messages, *options)))

    assert rendered() == rendered(None, None) == rendered([], {}) == "Hellocalm"
    assert rendered([NOW]).startswith('[{"type": "function", "function": {"name": "now"')
    assert rendered(None, {"mood": "glad"}) == "Helloglad"
    with Session(tmp_path, "trip") as session:
        assert session.prompt(tokenizer, messages, [NOW], {"mood": "glad"}) == tokenizer.encode_chat(
            messages, [NOW], {"mood": "glad"}
        )


@pytest.mark.parametrize(
    ("tools", "variables", "message"),
    [
        ({"now": NOW}, None, "tools is .*; it must be a list of dicts such as {'type': 'function'"),
        (["now"], None, "tools is .*; it must be a list of dicts"),
        ([NOW], None, "chat template does nothing with 'tools'; leave it out"),
        (None, {"mood": 1}, "chat template does nothing with 'mood'; leave it out"),
        (None, ["mood"], "chat_template_kwargs is .*; it must be a dict of the template's variables"),
        (
            None,
            {"add_generation_prompt": False},
            "chat_template_kwargs has 'add_generation_prompt', which cannot be set",
        ),
        (None, {"messages": []}, "chat_template_kwargs has 'messages', which cannot be set"),
    ],
)
def test_tools_and_variables_that_come_to_nothing_are_refused(
    tmp_path: Path, tools: Any, variables: Any, message: str
) -> None:
    tokenizer = Tokenizer(save_tokenizer(tmp_path, chat_template=PLAIN))
    with pytest.raises(RequestError, match=message):
        tokenizer.encode_chat([user("Hello")], tools, variables)


def test_chats_give_them_to_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both kinds of LLM, with a session and without one."""
    folder = save_tokenizer(tmp_path / "model", chat_template=TOOLS)
    engine = ScriptedEngine([5])
    monkeypatch.setattr(distkv.frontend.front_end, "launch", lambda config, check: engine)
    options: dict[str, Any] = {"tools": [NOW], "chat_template_kwargs": {"mood": "glad"}}
    messages = [user("a"), user("Hello")]

    async def ask(llm: AsyncLLM, **session: str) -> None:
        async for _ in llm.chat(messages, SamplingParams(max_tokens=1), **options, **session):
            pass

    with LLM(folder, cache_dir=tmp_path) as llm:
        expected = llm.tokenizer.encode_chat(messages, **options)
        llm.chat(messages, SamplingParams(max_tokens=1), **options, use_tqdm=False)
        llm.chat(messages, SamplingParams(max_tokens=1), **options, session="one", use_tqdm=False)
    other = AsyncLLM(folder, cache_dir=tmp_path)
    asyncio.run(ask(other))
    asyncio.run(ask(other, session="two"))
    asyncio.run(other.close())
    assert engine.prompts == [expected] * 4


def test_what_cannot_fit_is_not_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding megabytes takes long, and others wait for it."""
    tokenizer = Tokenizer(save_tokenizer(tmp_path, chat_template=PLAIN), limit=TokenLimit("max_model_len", 20))
    most = 20 * max(map(len, tokenizer._tokenizer.get_vocab()))
    assert tokenizer.encode("a" * most)
    monkeypatch.setattr(tokenizer._tokenizer, "encode", None)
    with pytest.raises(RequestError, match=rf"the prompt has {most + 1} characters, and max_model_len is 20 tokens"):
        tokenizer.encode("a" * (most + 1))
    with pytest.raises(RequestError, match="shorten the prompt or raise max_model_len"):
        tokenizer.encode_chat([user("a" * most)])
