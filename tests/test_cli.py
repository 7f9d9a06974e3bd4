"""The command `distkv` as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_llama

import distkv

PARIS = "What is the capital of France? Answer in one sentence."


def run(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    result = subprocess.run([sys.executable, "-m", "distkv", *arguments], input=data, capture_output=True, timeout=240)
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode("utf-8"), result.stderr.decode("utf-8")
    )


def check_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line on stderr that names the cure, exit code 2, nothing on stdout."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("distkv: error: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_version_and_help() -> None:
    assert run("--version").stdout == f"distkv {distkv.__version__}\n"
    text = run("--help").stdout
    for command in ("generate", "chat", "fetch", "demo", "bench"):
        assert command in text


def test_generate_takes_a_prompt_a_file_or_stdin(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("The capital of France is", encoding="utf-8")
    common = ("generate", "--model", str(demo_model), "--temperature", "0", "--max-tokens", "6", "--dtype", "float32")
    outputs = [
        run(*common, "--prompt", "The capital of France is"),
        run(*common, "--prompt-file", str(tmp_path / "prompt.txt")),
        run(*common, stdin="The capital of France is"),
    ]
    for output in outputs:
        assert output.returncode == 0, output.stderr
        assert output.stdout == outputs[0].stdout
    assert "Paris" in outputs[0].stdout


def test_chat_remembers_the_conversation(demo_model: Path) -> None:
    result = run(
        "chat", "--model", str(demo_model), "--temperature", "0", "--max-tokens", "40", "--dtype", "float32",
        stdin=f"{PARIS}\nRepeat your last answer word by word.\n",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("> The capital of France is Paris.\n> ")
    assert result.stdout.count("Paris") >= 2


def test_fetch_prints_the_folder(demo_model: Path) -> None:
    assert run("fetch", "smollm2").stdout == f"{demo_model}\n"
    check_refused(run("fetch", "gpt2"), "gpt2", "smollm2")


def test_demo_answers_and_its_figures_agree(demo_model: Path) -> None:
    result = run("demo", "--model", str(demo_model))
    assert result.returncode == 0, result.stderr
    assert "The capital of France is Paris." in result.stdout
    assert result.stdout.count("23040") == 2  # KV bytes per token by the formula and as measured


def test_bench_decode_prints_both_engines(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    figures = tmp_path / "figures.json"
    result = run(
        "bench", "decode", "--model", str(folder), "--peer", "hf", "--context", "20", "--new-tokens", "4", "--repeats",
        "1", "--dtype", "float32", "--json", str(figures),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "distkv" in result.stdout and "transformers" in result.stdout
    assert '"decode_ms_per_token"' in figures.read_text()
    check_refused(run("bench", "decode", "--model", str(folder), "--peer", "x"), "peer 'x'", "hf")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--model", "/no/such/folder", "--prompt", "x"), ("/no/such/folder", "does not exist")),
        (("--model", "MODEL", "--prompt", ""), ("empty",)),
        (("--model", "MODEL", "--prompt", "x", "--temperature", "-1"), ("temperature",)),
        (("--model", "MODEL", "--prompt", "x", "--max-tokens", "0"), ("max_tokens",)),
        (("--model", "MODEL", "--prompt", "x " * 60, "--max-model-len", "50"), ("max_model_len is 50", "shorten")),
        (("--model", "MODEL", "--prompt-file", "/no/such/file"), ("/no/such/file", "No such file")),
        (("--model", "MODEL", "--prompt-file", "LATIN1"), ("not UTF-8", "byte 3")),
        (("--model", "MODEL", "--prompt-file", "LATIN1", "--prompt", "x"), ("one of them",)),
        (("--model", "MODEL", "--prompt", "x", "--page-size", "100"), ("page_size 100", "try 64")),
        (("--model", "MODEL", "--prompt", "x", "--device-kv-bytes", "4 apples"), ("4 apples",)),
    ],
)
def test_refusals_are_one_line(demo_model: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple) -> None:
    latin1 = tmp_path / "latin1.txt"
    latin1.write_bytes("für".encode("latin-1")[:1] + b"ab\xfc")
    places = {"MODEL": str(demo_model), "LATIN1": str(latin1)}
    check_refused(run("generate", *(places.get(argument, argument) for argument in arguments)), *words)
