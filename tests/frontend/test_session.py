"""Sessions: what is kept of a conversation, and that its prompts repeat the tokens of the turn before."""

import errno
import json
import logging
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.nodes import enter_node
from support.power_loss import PowerLoss
from support.processes import run_code

from distkv.errors import CapacityError, ConfigError, DistKVError, RequestError, StoreError
from distkv.frontend.conversation import Conversation, StoredMessage
from distkv.frontend.messages import Message
from distkv.frontend.session import Session
from distkv.frontend.session_limits import SessionLimits
from distkv.frontend.tokenizer import Tokenizer
from distkv.outputs import CompletionOutput

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTIONS = [
    {"role": "user", "content": text} for text in ("What is the capital of France?", "And of Peru?", "Thanks!")
]
ANSWERS = ["Paris. \n", "That is Lima — 🙂", ""]
END = "<|im_end|>"
LLAMA_2 = (
    "{% for one in messages %}{% if one.role == 'user' %}{{ '<|im_start|>[INST] ' + one.content | trim + ' [/INST]' }}"
    "{% elif one.role == 'assistant' %}{{ ' ' + one.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TURN = (
    "{% for one in messages %}{{ one.role + ': ' + CONTENT + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: OPENING' }}{% endif %}"
)
REWRITING = {
    "drops reasoning": TURN.replace("CONTENT", "one.content.split('</think>')[-1]").replace("OPENING", ""),
    "opens reasoning": TURN.replace("CONTENT", "one.content").replace("OPENING", "<think>"),
    "drops answers": TURN.replace("CONTENT", "(one.content if one.role == 'user' else '')").replace("OPENING", ""),
    "cuts answers": TURN.replace("CONTENT", "one.content[:10]").replace("OPENING", ""),
    "repeats answers": TURN.replace("CONTENT", "one.content + one.content").replace("OPENING", ""),
    "turns them round": TURN.replace("in messages", "in messages[::-1]").replace("CONTENT", "one.content"),
}


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def with_template(demo_model: Path, folder: Path, template: str) -> Tokenizer:
    """The demo model's tokenizer with another chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return Tokenizer(folder)


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens that decode to the text, a character each: what a model may draw, and no encoding gives."""
    token_ids = [token for character in text for token in tokenizer.encode(character)]
    assert tokenizer.decode(token_ids) == text
    assert len(text) < 2 or token_ids != tokenizer.encode(text)
    return token_ids


def answered(
    session: Session, tokenizer: Tokenizer, question: Message, text: str, token_ids: list[int] | None = None
) -> None:
    session.prompt(tokenizer, [question])
    session.add_answer(text, spelled(tokenizer, text) if token_ids is None else token_ids)


def turns(tokenizer: Tokenizer, cache_dir: Path, **first: Message) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each turn, every one by a session that was opened anew."""
    found = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        with Session(cache_dir, "trip") as session:
            prompt = session.prompt(tokenizer, [*first.values(), question])
            token_ids = spelled(tokenizer, answer) if answer else []
            session.add_answer(answer, token_ids)
            found.append((prompt, token_ids))
    return found


@pytest.mark.parametrize("template", [None, LLAMA_2], ids=["smollm2", "blanks around answers"])
def test_a_prompt_begins_with_the_tokens_of_the_turn_before(
    demo_model: Path, tmp_path: Path, template: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(demo_model, tmp_path, template) if template else Tokenizer(demo_model)
    [end] = tokenizer.encode(END)
    first, second, third = turns(tokenizer, tmp_path)
    for (prompt, answer), (following, _) in ((first, second), (second, third)):
        held = [*prompt, *answer, end]
        assert following[: len(held)] == held
    with Session(tmp_path, "trip") as session:
        after_nothing = session.prompt(tokenizer, QUESTIONS[:1])
    assert after_nothing[: len(third[0]) + 1] == [*third[0], end], "an answer that was interrupted at once"
    assert not caplog.records


def test_an_end_token_that_the_tokenizer_does_not_name_follows_an_answer_too(demo_model: Path, tmp_path: Path) -> None:
    with_template(demo_model, tmp_path, LLAMA_2.replace("eos_token", f"'{END}'"))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    [end] = Tokenizer(demo_model).encode(END)
    tokenizer = Tokenizer(tmp_path, [end])
    assert tokenizer.end_token_ids == {end, *tokenizer.encode("<|endoftext|>")}
    (prompt, answer), (following, _), _ = turns(tokenizer, tmp_path)
    held = [*prompt, *answer, end]
    assert following[: len(held)] == held


def test_spliced_tokens_say_what_the_template_says(tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns(tokenizer, tmp_path, system=SYSTEM)
    with Session(tmp_path, "trip") as session:
        prompt = session.prompt(tokenizer, QUESTIONS[:1])
        plain = [{"role": one["role"], "content": one["content"]} for one in session.messages]
    rendered = tokenizer.encode_chat([*plain, QUESTIONS[0]])
    assert tokenizer._tokenizer.decode(prompt) == tokenizer._tokenizer.decode(rendered)
    assert prompt != rendered


@pytest.mark.parametrize("template", REWRITING.values(), ids=REWRITING)
def test_where_the_template_rewrites_answers_their_text_is_encoded(
    demo_model: Path, tmp_path: Path, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(demo_model, tmp_path, template)
    text = "It may be Lyon. No: </think>Paris."
    messages = [QUESTIONS[0], {"role": "assistant", "content": text}, QUESTIONS[1]]
    with Session(tmp_path, "trip") as session:
        answered(session, tokenizer, QUESTIONS[0], text)
        for _ in range(2):
            assert session.prompt(tokenizer, [QUESTIONS[1]]) == tokenizer.encode_chat(messages)
    [record] = caplog.records
    assert (record.levelno, "encoded from their text" in record.message) == (logging.WARNING, True)


@pytest.mark.parametrize(
    "wrong", [{"content": "x", "token_ids": 5}, {"token_ids": [5]}, {"content": 1, "token_ids": []}]
)
def test_answers_without_text_or_with_something_else_as_tokens_are_refused(
    tokenizer: Tokenizer, wrong: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="list of integers, and its text as content"):
        tokenizer.encode_chat([QUESTIONS[0], {"role": "assistant"} | wrong, QUESTIONS[1]])


def test_a_restart_brings_the_conversation_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Session(tmp_path / "not" / "there", "trip") as session:
        assert session.messages == []
        session.prompt(tokenizer, [SYSTEM, QUESTIONS[0]])
        session.add_answer("Paris.", [7, 8])
        kept = [SYSTEM, QUESTIONS[0], {"role": "assistant", "content": "Paris.", "token_ids": [7, 8]}]
        assert session.messages == kept
    with Session(tmp_path / "not" / "there", "trip") as session, Session(tmp_path, "trip") as other:
        assert session.messages == kept
        assert other.messages == []
    assert list((tmp_path / "sessions").glob("*.json")) == [], "nothing is written before the first answer"


def test_the_system_message_is_kept_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = [prompt for prompt, _ in turns(tokenizer, tmp_path, system=SYSTEM)]
    assert [tokenizer.decode(prompt).count(SYSTEM["content"]) for prompt in prompts] == [1, 1, 1]
    with Session(tmp_path, "trip") as session:
        assert [message["role"] for message in session.messages] == ["system"] + ["user", "assistant"] * 3
        with pytest.raises(RequestError, match="did not begin with this system message; leave it out, or"):
            session.prompt(tokenizer, [{"role": "system", "content": "Rhyme."}, QUESTIONS[0]])
    with Session(tmp_path, "other") as session:
        answered(session, tokenizer, QUESTIONS[0], "Paris.", [])
        with pytest.raises(RequestError, match="did not begin with this system message"):
            session.prompt(tokenizer, [SYSTEM, QUESTIONS[0]])


def test_with_another_tokenizer_the_text_counts(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Session(tmp_path, "trip") as session:
        answered(session, tokenizer, QUESTIONS[0], "Paris.")
    path = tmp_path / "sessions" / "trip.json"
    path.write_text(path.read_text().replace(tokenizer.fingerprint, "another"))
    plain = [QUESTIONS[0], {"role": "assistant", "content": "Paris."}, QUESTIONS[1]]
    with Session(tmp_path, "trip") as session:
        for _ in range(2):
            assert session.prompt(tokenizer, [QUESTIONS[1]]) == tokenizer.encode_chat(plain)
    assert ["another tokenizer" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../up", "a b", "ä", "a\n", "x" * 65, "a\0", None, 5, Path("a")]
)
def test_bad_names(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match=r"session is .*; use up to 64 letters, digits"):
        Session(tmp_path, name)
    assert not list(tmp_path.iterdir())


@given(st.text(st.sampled_from("ab./\\~\0\n:%-_é ") | st.characters(), max_size=66))
def test_no_name_leaves_its_folder(name: str) -> None:
    """Whatever is asked for: it is refused, or all that comes of it lies in the folder of the sessions."""
    with TemporaryDirectory() as folder:
        with suppress(ConfigError), Session(folder, name) as session:
            session.save()
        entries = {path.relative_to(folder) for path in Path(folder).rglob("*")}
        assert entries <= {Path("sessions"), Path(f"sessions/{name}.json"), Path(f"sessions/{name}.lock")}


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "-", "x" * 64, "trip.json"])
def test_good_names(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    with Session(tmp_path, name) as session:
        answered(session, tokenizer, QUESTIONS[0], "Paris.", [1])
    with Session(tmp_path, name) as session:
        assert len(session.messages) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 1, "tokenizer": "", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"tokenizer": "", "messages": []}',
        b'{"version": 1, "messages": []}',
        b'{"version": 1, "tokenizer": "", "messages": [{"role": "user"}]}',
        b'{"version": 1, "tokenizer": "", "messages": [{"role": "assistant", "content": "", "token_ids": [-1]}]}',
        b'{"version": 1, "tokenizer": "", "messages": [{"role": "assistant", "content": "", "token_ids": [1.5]}]}',
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sessions" / "trip.json"
    path.parent.mkdir()
    path.write_bytes(content)
    for _ in range(2):  # the first refusal does not hold the session
        with pytest.raises(
            ConfigError, match=f"{path}' is damaged .*; move it away to begin the session anew"
        ) as error:
            Session(tmp_path, "trip")
        assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sessions" / "trip.json"
    path.parent.mkdir()
    path.write_text('{"version": 2, "turns": []}')
    with pytest.raises(ConfigError, match="has version 2 and this distkv reads version 1; update distkv"):
        Session(tmp_path, "trip")


def test_a_file_that_cannot_be_read_or_made(tmp_path: Path) -> None:
    (tmp_path / "sessions" / "trip.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"trip.json' cannot be read \(Is a directory\); move it away"):
        Session(tmp_path, "trip")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"session trip cannot be kept in .*; name a cache_dir that can be written"):
        Session(tmp_path / "file", "trip")


def test_messages_that_are_not_text_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Session(tmp_path, "trip") as session:
        for wrong in ([{"role": "user"}], [{"role": "user", "content": 5}], ["hello"], "hello", [{"x": 1}], None):
            with pytest.raises(RequestError, match="a session takes messages such as"):
                session.prompt(tokenizer, wrong)  # type: ignore[arg-type]


def test_one_holder_at_a_time(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Session(tmp_path, "trip") as session, Session(tmp_path, "other"):
        with pytest.raises(ConfigError, match=f"^session trip is open in process {os.getpid()} on .*; end that, or"):
            Session(tmp_path, "trip")
        result = run_session(f"Session({str(tmp_path)!r}, 'trip')")
        assert "session trip is open in process" in result.stderr
        answered(session, tokenizer, QUESTIONS[0], "Paris.", [1])
        session.prompt(tokenizer, QUESTIONS[1:2])
    with pytest.raises(DistKVError, match="session trip is closed; open it again"):
        session.add_answer("Lima.", [2])
    session.close()
    with Session(tmp_path, "trip") as again:
        assert len(again.messages) == 2


def run_session(code: str) -> CompletedProcess[str]:
    return run_code("import os; from distkv.frontend.session import Session\n" + code)


def test_a_kill_before_the_rename_leaves_the_old_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Session(tmp_path, "trip") as session:
        answered(session, tokenizer, QUESTIONS[0], "Paris.", [1])
        kept = session.messages
    killed = run_session(
        "class Fake:\n"
        f"    fingerprint = {tokenizer.fingerprint!r}\n"
        "    encode_chat = staticmethod(lambda *given: [1])\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), 9)\n"
        f"session = Session({str(tmp_path)!r}, 'trip')\n"
        f"session.prompt(Fake, [{QUESTIONS[1]!r}])\n"
        "session.add_answer('Lima.', [2])"
    )
    assert killed.returncode == -9
    assert (tmp_path / "sessions" / "trip.json.partial").exists()
    with Session(tmp_path, "trip") as session:  # the lock has gone with its holder
        assert session.messages == kept
        answered(session, tokenizer, QUESTIONS[2], "You are welcome.", [3])
    with Session(tmp_path, "trip") as session:
        assert [message["content"] for message in session.messages[2:]] == ["Thanks!", "You are welcome."]
    assert sorted(path.name for path in (tmp_path / "sessions").iterdir()) == ["trip.json", "trip.lock"]


@pytest.mark.parametrize("skip", [None, "os.fsync", "distkv.frontend.session.sync_folder"])
def test_a_turn_that_was_kept_outlives_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: str | None
) -> None:
    """As long as both its bytes and its name are synced."""
    rng, disk, kept = random.Random(1), tmp_path / "disk", Conversation()
    disk.mkdir()
    loss, left = PowerLoss(disk), []

    def fail() -> None:
        left.append((tmp_path / str(loss.num_calls), len(kept._messages)))
        loss.leave(left[-1][0], rng)

    loss.called = fail
    with loss.followed(), Session(disk / "cache", "trip") as session:
        if skip is not None:
            monkeypatch.setattr(skip, lambda descriptor: None)
        for turn in range(8):
            talk = Conversation()
            talk._messages = [*kept._messages, StoredMessage("user", f"{turn}" * 700)]
            session.go_on_from(talk)
            session.save()
            kept = talk
    assert len(left) > 10

    def check() -> None:
        for folder, num_kept in left:
            with Session(folder / "cache", "trip") as session:
                assert len(session.messages) in (num_kept, num_kept + 1)

    if skip is None:
        check()
    else:
        with pytest.raises((AssertionError, ConfigError)):
            check()


def test_an_answer_that_cannot_be_saved_is_not_added(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Session(tmp_path, "trip") as session:
        answered(session, tokenizer, QUESTIONS[0], "Paris.", [1])
        kept = session.messages
        (tmp_path / "sessions" / "trip.json.partial").mkdir()
        with pytest.raises(StoreError, match=r"trip.json' cannot be written \(Is a directory\); make room"):
            answered(session, tokenizer, QUESTIONS[1], "Lima.", [2])
        assert session.messages == kept
        (tmp_path / "sessions" / "trip.json.partial").rmdir()
        session.add_answer("Lima.", [2])
        assert len(session.messages) == 4


@pytest.mark.parametrize("room", ["for none of it", "for the lock", "for all of it"])
def test_a_session_without_an_answer_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    """Or those of names that never come again would pile up, on a full disk too."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "sessions").mkdir()
    if room != "for all of it":
        monkeypatch.setattr(os, "fsync", full)
    if room == "for none of it":
        enter_node("a", "none", monkeypatch)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(ConfigError, match="No space left"):
            Session(tmp_path, "trip")
    else:
        with Session(tmp_path, "trip") as session, suppress(StoreError):
            if room == "for the lock":
                session.save()
    assert list((tmp_path / "sessions").iterdir()) == []


@pytest.mark.parametrize(
    ("tail", "cure"),
    [
        (b'"x": ' + b"[" * 100_000, "damaged"),
        (b'"tokenizer": "", "messages": 5}', "damaged"),
        (b'"tokenizer": "", "messages": [{"role": 5, "content": ""}]}', "damaged"),
        (b'"tokenizer": "", "messages": [{"role": "user", "content": "\\ud800"}]}', "damaged"),
    ],
)
def test_a_file_of_other_content_is_named_and_left_alone(tmp_path: Path, tail: bytes, cure: str) -> None:
    path = tmp_path / "sessions" / "trip.json"
    path.parent.mkdir()
    path.write_bytes(content := b'{"version": 1, ' + tail)
    with pytest.raises(ConfigError, match=f"{path}' is {cure} .*; move it away to begin the session anew"):
        Session(tmp_path, "trip")
    assert path.read_bytes() == content


def test_nobody_else_may_read_a_session(tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for _ in range(2):
            with Session(tmp_path / "cache", "trip") as session:
                answered(session, tokenizer, QUESTIONS[0], "Paris.", [1])
            path = tmp_path / "cache" / "sessions" / "trip.json"
            assert {one.stat().st_mode & 0o777 for one in (path, path.with_suffix(".lock"))} == {0o600}
            assert path.parent.stat().st_mode & 0o777 == 0o700
            path.with_name("trip.json.partial").write_text("")  # of a process that was killed, and readable
            for one, mode in ((path, 0o644), (path.with_suffix(".lock"), 0o644), (path.parent, 0o755)):
                one.chmod(mode)  # as earlier releases wrote it
    finally:
        os.umask(before)


def test_a_prompt_without_anything_new_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Session(tmp_path, "trip") as session:
        with pytest.raises(RequestError, match="nothing that is new in session trip"):
            session.prompt(tokenizer, [])
        session.prompt(tokenizer, [SYSTEM, QUESTIONS[0]])
        session.add_answer("Paris.", [1])
        with pytest.raises(RequestError, match="messages has nothing that is new in session trip; give what is to be"):
            session.prompt(tokenizer, [SYSTEM])


def test_parts_of_text_are_kept_as_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "And of"}, {"type": "text", "text": "Peru?"}]
    with Session(tmp_path, "trip") as session:
        session.prompt(tokenizer, [{"role": "user", "content": parts}])
        session.add_answer("Lima.", None)
        assert [message["content"] for message in session.messages] == ["And of\nPeru?", "Lima."]


def test_a_special_token_that_stopped_an_answer_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    conversation, words = Conversation(), tokenizer.encode("Paris.")
    for stop in (END, f"{END}\n"):
        conversation.prompt(tokenizer, QUESTIONS[:1])
        end = tokenizer.special_tokens[END]
        conversation.add_output(CompletionOutput(0, "Paris.", [*words, end], None, None, "stop", stop))
        assert conversation.messages[-1]["token_ids"] == words


def test_a_prompt_waits_for_one_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Session(tmp_path, "trip") as session:
        session.prompt(tokenizer, QUESTIONS[:1])
        with pytest.raises(RequestError, match="not valid Unicode"):
            session.prompt(tokenizer, [{"role": "user", "content": "\ud800"}])
        with pytest.raises(DistKVError, match=r"has no prompt without an answer; call prompt\(\) first"):
            session.add_answer("Paris.", [1])
        session.prompt(tokenizer, QUESTIONS[:1])
        session.prompt(tokenizer, QUESTIONS[1:2])
        session.add_answer("Lima.", [2])
        assert [message["content"] for message in session.messages] == [QUESTIONS[1]["content"], "Lima."]


def test_a_session_too_many_is_refused_and_the_others_go_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    limits = SessionLimits(most=2)
    with Session(tmp_path, "one", limits) as one, Session(tmp_path, "two", limits), Session(tmp_path, "three") as three:
        answered(one, tokenizer, QUESTIONS[0], "Paris.")
        answered(three, tokenizer, QUESTIONS[0], "Paris.")
    with pytest.raises(CapacityError, match=r"session four would be a new one, and .* holds 2 of the 2 that"):
        Session(tmp_path, "four", limits)
    assert not (tmp_path / "sessions" / "four.lock").exists()
    with Session(tmp_path, "two") as late:  # as if it had been opened while there was room
        late._limits = limits
        with pytest.raises(StoreError, match="session two would be a new one"):
            answered(late, tokenizer, QUESTIONS[0], "Paris.")
        assert late.messages == []
    with Session(tmp_path, "one", limits) as one:
        answered(one, tokenizer, QUESTIONS[1], "Lima.")
        assert len(one.messages) == 4
    (tmp_path / "sessions" / "three.json").unlink()
    with Session(tmp_path, "four", limits) as four:
        answered(four, tokenizer, QUESTIONS[0], "Paris.")
    with pytest.raises(CapacityError, match="holds 0 of the 0 that"):
        Session(tmp_path / "not" / "there", "one", SessionLimits(most=0))
    assert not (tmp_path / "not").exists()


def test_a_session_that_is_full_stays_as_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "sessions" / "trip.json"
    with Session(tmp_path, "trip") as session:
        answered(session, tokenizer, QUESTIONS[0], "Paris.")
    before = path.read_bytes()
    most = len(before) + 200
    with Session(tmp_path, "trip", SessionLimits(most_bytes=most)) as session:
        session.prompt(tokenizer, [QUESTIONS[1]])
        with pytest.raises(StoreError, match=rf"trip would take \d+ bytes, and max_session_bytes is {most};"):
            session.add_answer("Lima. " * 50, None)
        assert path.read_bytes() == before and len(session.messages) == 2
        session.add_answer("Lima.", None)
        with pytest.raises(CapacityError, match="begin another session, or raise it"):
            session.prompt(tokenizer, [QUESTIONS[2] | {"content": "Thanks! " * 20}])
        with pytest.raises(DistKVError, match="no prompt without an answer"):
            session.add_answer("You are welcome.", None)
        assert len(session.messages) == 4
