"""Commands whose stdin or stdout is closed, full or broken, and Ctrl-C at any moment: a line at most."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.processes import ROOT, run_code

from distkv.commands.main import main
from distkv.workers.group.local_group import LocalGroup

Ended = tuple[int, str]
"""Exit code, and what was said on stderr."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A small random model with a tokenizer."""
    folder, _ = save_llama(tmp_path_factory.mktemp("model"), vocab_size=49152, max_position_embeddings=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(demo_model / name)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs a command in this process, with `stdout`; what it said on stderr is without the lines of the plan."""

    def said() -> str:
        return "".join(line for line in capfd.readouterr().err.splitlines(True) if not line.startswith("plan: "))

    def run(stdout: io.TextIOWrapper, *arguments: str, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "argv", ["distkv", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        monkeypatch.setattr(sys, "stdout", stdout)
        try:
            main()
        except SystemExit as end:
            return end.code, said()  # type: ignore[return-value]
        return 0, said()

    return run


@pytest.fixture(params=["buffered", "unbuffered"])
def full(request: pytest.FixtureRequest) -> Iterator[io.TextIOWrapper]:
    with open("/dev/full", "wb", buffering=0) as raw:
        stream: Any = raw if request.param == "unbuffered" else io.BufferedWriter(raw)
        yield io.TextIOWrapper(stream, "utf-8", write_through=request.param == "unbuffered")


@pytest.fixture
def unread() -> Iterator[io.TextIOWrapper]:
    """A pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        yield stream  # what is left to be written is dropped


def commands(model: Path) -> dict[str, tuple[str, ...]]:
    prompt = "generate", "--model", str(model), "--prompt", "x", "--max-tokens", "3"
    chat = "chat", "--model", str(model), "--max-tokens", "3"
    stress = "stress", "--shape", "tiny", "--context", "300", "--new-tokens", "2", "--device-kv-bytes", "1MiB"
    return {"help": ("--help",), "generate": prompt, "chat": chat, "stress": stress}


@pytest.mark.parametrize("name", ["help", "generate", "chat", "stress"])
def test_a_full_stdout_is_one_line(name: str, full: io.TextIOWrapper, here: Any, model: Path) -> None:
    code, said = here(full, *commands(model)[name], stdin="Hello\n")
    assert (code, said) == (2, "distkv: error: stdout cannot be written: No space left on device\n")


@pytest.mark.parametrize("name", ["help", "generate", "chat", "stress"])
def test_a_reader_who_has_left_is_no_error(name: str, unread: io.TextIOWrapper, here: Any, model: Path) -> None:
    assert here(unread, *commands(model)[name], stdin="Hello\n") == (128 + signal.SIGPIPE, "")


def test_an_encoding_that_lacks_a_character_does_not_end_an_answer(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distkv.models.fetch.fetch_model", lambda *_: "für 😀")
    memory = io.BytesIO()
    assert here(io.TextIOWrapper(memory, "latin-1"), "fetch", "smollm2") == (0, "")
    assert memory.getvalue() == b"f\xfcr \\U0001f600\n"


@pytest.mark.parametrize(
    "command, words",
    [
        ("generate --model MODEL <&-", "stdin is closed; give the prompt with --prompt or --prompt-file"),
        ("chat --model MODEL <&-", "stdin is closed; run it in a terminal"),
        ("fetch smollm2 >&-", "stdout is closed; give it a file, or /dev/null"),
        ("generate --model MODEL <&- 2>/dev/full", ""),
    ],
)
def test_closed_streams_are_refused_before_anything_is_loaded(command: str, words: str, model: Path) -> None:
    script = f"exec {sys.executable} -X importtime -m distkv {command.replace('MODEL', str(model))}"
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    *imported, said = ended.stderr.splitlines() or [""]
    assert ended.returncode == 2 and ended.stdout == ""
    assert said.startswith(f"distkv: error: {words}") or not words
    assert all(line.startswith("import time:") and not line.endswith(" distkv.llm") for line in imported)


def test_no_memory_is_one_line(model: Path) -> None:
    """Not even for torch."""
    script = f"ulimit -v 300000; exec {sys.executable} -m distkv generate --model {model} --prompt hello"
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert (
        ended.stderr.startswith("distkv: error: there is no memory to go on with (") and "(ulimit -v)" in ended.stderr
    )


def test_an_empty_prompt_is_refused_before_anything_is_loaded(
    here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("distkv.llm.LLM", "distkv.frontend.tokenizer.Tokenizer", "distkv.models.fetch.fetch_model"):
        monkeypatch.setattr(name, None)
    (tmp_path / "empty").touch()
    for more in ((), ("--prompt", ""), ("--prompt-file", str(tmp_path / "empty"))):
        code, said = here(io.TextIOWrapper(io.BytesIO(), "utf-8"), "generate", "--model", "smollm2", *more)
        assert code == 2 and said.startswith("distkv: error: the prompt is empty; give some text"), said


def test_output_may_be_kept_in_memory(here: Any) -> None:
    assert here(out := io.StringIO(), "--version") == (0, "") and out.getvalue().startswith("distkv ")


def test_stdin_that_is_no_text_is_one_line(here: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr("builtins.input", lambda prompt: b"a\xff".decode())
    said_so = 2, "distkv: error: a line of stdin is not utf-8; convert it first\n"
    assert here(out, "chat", "--model", str(model)) == said_so
    monkeypatch.setattr("builtins.input", lambda prompt: b"a\xff".decode(errors="surrogateescape"))
    assert here(out, "chat", "--model", str(model)) == said_so

    def fails(prompt: str) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.input", fails)
    code, said = here(out, "chat", "--model", str(model))
    assert (code, said) == (2, "distkv: error: stdin cannot be read: Input/output error\n")


def test_an_error_that_is_not_of_stdout_keeps_its_traceback(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distkv.models.fetch.fetch_model", fails)
    with pytest.raises(OSError, match="No space"):
        here(io.TextIOWrapper(io.BytesIO(), "utf-8"), "fetch", "smollm2")


@pytest.mark.parametrize("moment", ["typer", "torch", "at exit"])
def test_ctrl_c_while_modules_are_imported_or_python_ends(moment: str, model: Path) -> None:
    ended = run_code(
        "import atexit, os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "moment, *sys.argv = sys.argv[1:]\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == moment: interrupt()\n"
        "sys.meta_path.insert(0, Finder())\n"
        "if moment == 'at exit': atexit.register(interrupt)\n"
        "runpy.run_module('distkv', run_name='__main__')\n",
        moment, "distkv", *(["--version"] if moment == "at exit" else commands(model)["generate"]),
    )  # fmt: skip
    assert ended.returncode in (130, -signal.SIGINT), "which is 130 for a shell too"
    assert ended.stderr == ""


def test_ctrl_c_while_weights_are_loaded(here: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    closed: list[LocalGroup] = []
    monkeypatch.setattr(LocalGroup, "load", interrupted)
    monkeypatch.setattr(LocalGroup, "close", lambda group: closed.append(group))
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    for command in ("generate", "chat", "stress"):
        assert here(out, *commands(model)[command]) == (130, "")
    assert len(closed) == 3
