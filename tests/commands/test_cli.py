"""The command `distkv` as a user types it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import save_llama
from support.commands import Run

import distkv
from distkv.errors import DistKVError
from distkv.frontend.session import Session
from distkv.frontend.tokenizer import TOKENIZER_FILES, Tokenizer

PARIS = "What is the capital of France? Answer in one sentence."


def run(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    result = subprocess.run([sys.executable, "-m", "distkv", *arguments], input=data, capture_output=True, timeout=240)
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode("utf-8"), result.stderr.decode("utf-8")
    )


@pytest.fixture(scope="module")
def talker(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the tokenizer of the demo model, which takes a fraction of its time to say nothing."""
    folder, _ = save_llama(
        tmp_path_factory.mktemp("talker"), vocab_size=49152, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, hidden_size=96, max_position_embeddings=8192,
    )  # fmt: skip
    for name in TOKENIZER_FILES:
        if (demo_model / name).exists():
            shutil.copy(demo_model / name, folder)
    return folder


def check_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line on stderr that names the cure, after those of the plan if the model was loaded; exit code 2, nothing on
    stdout."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("plan: ")]
    assert len(lines) == 1 and lines[0].startswith("distkv: error: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_version_and_help() -> None:
    assert run("--version").stdout == f"distkv {distkv.__version__}\n"
    text = run("--help").stdout
    for command in ("generate", "chat", "fetch", "demo", "bench", "cache"):
        assert command in text


def test_generate_prints_what_the_model_says(demo_model: Path, run_here: Run) -> None:
    common = ("generate", "--model", str(demo_model), "--temperature", "0", "--max-tokens", "6", "--dtype", "float32")
    output = run_here(*common, stdin="The capital of France is")
    assert output.returncode == 0, output.stderr
    assert "Paris" in output.stdout
    plan = [line for line in output.stderr.splitlines() if line.startswith("plan: ")]
    assert len(plan) == 3 and "KV 45.0 KiB a token" in plan[0] and "bound by" in plan[2]


def test_generate_takes_a_prompt_a_file_or_stdin(talker: Path, tmp_path: Path, run_here: Run) -> None:
    (tmp_path / "prompt.txt").write_text("The capital of France is", encoding="utf-8")
    common = ("generate", "--model", str(talker), "--temperature", "0", "--max-tokens", "6", "--dtype", "float32")
    outputs = [
        run_here(*common, "--prompt", "The capital of France is"),
        run_here(*common, "--prompt-file", str(tmp_path / "prompt.txt")),
        run_here(*common, stdin="The capital of France is"),
    ]
    for output in outputs:
        assert output.returncode == 0, output.stderr
        assert output.stdout == outputs[0].stdout
    assert outputs[0].stdout.strip()
    assert run_here(*common, "--prompt", "The capital of Spain was").stdout != outputs[0].stdout
    params = distkv.SamplingParams(temperature=0, max_tokens=6)
    with distkv.LLM(talker, dtype="float32", device_kv_bytes="8MiB") as llm:
        [whole] = llm.generate("The capital of France is", params, use_tqdm=False)
    assert outputs[0].stdout == f"{whole.outputs[0].text}\n", "the pieces add up"


def test_what_a_policy_has_read_is_told(talker: Path, run_here: Run) -> None:
    text, covered = "one " * 100, r" of the pages, on which [0-9.]+% of all attention lies\n"
    options = ("--attention-policy", "top_pages(pages=2)", "--page-size", "16", "--device-kv-bytes", "8MiB")
    common = ("generate", "--model", str(talker), "--prompt", text, "--max-tokens", "6", *options)
    share = r"the answer has read 28\.6%"  # two of seven
    assert re.search(share + r" of the pages\n", run_here(*common).stderr)
    assert re.search(share + covered, run_here(*common, "--attention-audit", "2").stderr)
    talk = ("chat", "--model", str(talker), "--max-tokens", "6", *options, "--attention-audit", "2")
    assert re.search(r"the answers have read [0-9.]+%" + covered, run_here(*talk, stdin=f"{text}\nmore\n").stderr)


@pytest.mark.slow
def test_chat_remembers_the_conversation(demo_model: Path) -> None:
    result = run(
        "chat", "--model", str(demo_model), "--temperature", "0", "--max-tokens", "40", "--dtype", "float32",
        stdin=f"{PARIS}\nRepeat your last answer word by word.\n",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("> The capital of France is Paris.\n> ")
    assert result.stdout.count("Paris") >= 2


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_conversation(demo_model: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "distkv", "chat", "--model", str(demo_model), "--max-tokens", "150", "--session", "trip",
        "--cache-dir", str(tmp_path), "--host-kv-bytes", "256MiB", "--disk-kv-bytes", "256MiB",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"Write a long story about a library.\n")
    process.stdin.flush()
    begun = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(b"Hello.\n", timeout=120)
    assert process.returncode == 0, errors
    first, _, rest = (begun + output).partition(b"\n> ")
    assert len(first) < 290, "150 tokens are three times that"
    assert len(rest.rpartition(b"\n> ")[0]) > 1, "the next question was answered"
    with Session(tmp_path, "trip") as session:
        asked, told, *others = session.messages
    assert len(others) == 2 and asked["content"].startswith("Write")
    assert f"> {told['content']}".startswith(first.decode()), "what was printed is kept, and a last piece perhaps"
    assert Tokenizer(demo_model).decode(told["token_ids"]) == told["content"]


@pytest.mark.slow
def test_a_session_goes_on_in_another_process(talker: Path, tmp_path: Path, run_here: Run) -> None:
    chat = (
        "chat", "--model", str(talker), "--temperature", "0", "--max-tokens", "40", "--dtype", "float32",
        "--page-size", "16", "--cache-dir", str(tmp_path), "--host-kv-bytes", "256MiB", "--session", "trip",
        "--disk-kv-bytes", "256MiB", "--system", "Be brief.",
    )  # fmt: skip
    first = run(*chat, "--stats", stdin=f"{PARIS}\nAnd of Italy?\n")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("> ") and "goes on" not in first.stdout
    (_, before, _), (_, after, where) = told(first.stdout)
    assert before == 0 < after and where == f" (device {after})", "the second question finds the first one's pages"

    tokenizer = Tokenizer(talker)
    question = {"role": "user", "content": "Say it again."}
    with Session(tmp_path, "trip") as session:
        prompt = session.prompt(tokenizer, [question])
        answer = session.messages[-1]["token_ids"]
        kept = tokenizer.encode_chat(session.messages[:-1]) + answer  # all that had its keys and values computed
        assert prompt[: len(kept)] == kept
    second = run(*chat, "--stats", stdin="Say it again.\n")
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("session trip goes on after 5 messages\n> ")
    pages = len(kept) // 16 * 16
    assert told(second.stdout) == [(len(prompt), pages, f" (disk {pages})")]

    rhyme = run_here(*chat, "--system", "Rhyme.", stdin="Hello.\n")
    check_refused(rhyme, "session trip", "system message", "leave it out")
    check_refused(run_here("chat", "--model", str(talker), "--session", "trip"), "--session", "--cache-dir")
    check_refused(run_here(*chat, "--session", "a/b"), "session is 'a/b'")


def told(output: str) -> list[tuple[int, int, str]]:
    """The figures of each answer, as --stats prints it: tokens of the prompt, those that were cached, and where."""
    found = re.findall(r"^(\d+) tokens of prompt, (\d+) of them cached(.*), first token after \d+ ms$", output, re.M)
    return [(int(prompt), int(cached), where) for prompt, cached, where in found]


@pytest.mark.slow
def test_a_conversation_finds_its_pages_without_a_session(demo_model: Path) -> None:
    chat = (
        "chat",
        "--model",
        str(demo_model),
        "--temperature",
        "0",
        "--max-tokens",
        "20",
        "--page-size",
        "16",
        "--stats",
    )
    result = run(*chat, stdin=f"{PARIS}\nThanks!\n")
    assert result.returncode == 0, result.stderr
    first, second = told(result.stdout)
    assert first[1] == 0 and second[1] >= first[0] // 16 * 16 and second[2] == f" (device {second[1]})"
    off = run(*chat, "--no-enable-prefix-caching", stdin=f"{PARIS}\nThanks!\n")
    assert [cached for _, cached, _ in told(off.stdout)] == [0, 0]


def test_fetch_prints_the_folder(demo_model: Path) -> None:
    assert run("fetch", "smollm2").stdout == f"{demo_model}\n"
    check_refused(run("fetch", "gpt2"), "gpt2", "smollm2")


def check_demo(result: subprocess.CompletedProcess[str], kv_bytes_per_token: int) -> None:
    assert result.returncode == 0, result.stderr
    cells = re.findall(rf"│ {kv_bytes_per_token} +│$", result.stdout, re.MULTILINE)
    assert len(cells) == 2, "by the formula and as measured"
    # a second engine finds the text of the first on disk
    assert re.search(r"first +│ 20\d\d +│ 0 +│ 0 +│ 0 ", result.stdout)
    assert re.search(r"second +│ 20\d\d +│ 0 +│ 0 +│ 1984 ", result.stdout) and "last use" in result.stdout
    # the last act: a long text, read through a window on the device
    assert "device 4 of 4, host" in result.stdout
    assert "layer slices, disk to attention" in result.stdout
    assert "bit for bit the same as with everything resident" in result.stdout


@pytest.mark.slow
def test_demo_answers_and_its_figures_agree(demo_model: Path) -> None:
    result = run("demo", "--model", str(demo_model))
    check_demo(result, 23040)
    assert "The capital of France is Paris." in result.stdout
    assert result.stdout.count("Timer class") == 2


def test_demo_of_a_small_model(talker: Path, run_here: Run) -> None:
    """All acts, and what they compare; the words of the demo model itself are in the slow test, and in
    `test_llm.py::test_demo_model_answers`."""
    result = run_here("demo", "--model", str(talker))
    check_demo(result, 2 * 3 * 3 * 16 * 4)


def test_demo_refuses_an_answer_that_depends_on_where_the_cache_lies() -> None:
    from distkv.demo.long_text import compare
    from distkv.workers.sampling.sampled_token import TokenLogprobs

    answer: list = [(7, TokenLogprobs(-0.5, 1, [(7, -0.5)]))]
    compare(answer, list(answer))
    with pytest.raises(DistKVError, match="everything resident"):
        compare(answer, [(7, TokenLogprobs(-0.5000001, 1, [(7, -0.5000001)]))])


def test_bench_decode_finds_no_page_of_an_earlier_turn(tmp_path: Path, run_here: Run) -> None:
    """The prompt has two pages, and finding the first one would be an error."""
    folder, _ = save_llama(tmp_path, max_position_embeddings=1024)
    figures = tmp_path / "figures.json"
    common = ("bench", "decode", "--model", str(folder), "--dtype", "float32")
    result = run_here(*common, "--context", "600", "--new-tokens", "4", "--repeats", "1", "--json", str(figures))
    assert result.returncode == 0, result.stderr
    assert "600" in result.stdout and '"decode_ms_per_token"' in figures.read_text()
    check_refused(run_here(*common, "--context", "1000", "--new-tokens", "24"), "context 1000", "up to 999")
    check_refused(run_here(*common, "--context", "0"), "context 0", "at least 1")


def test_bench_decode_refuses_to_measure_something_easier(tiny_model: Path) -> None:
    from distkv.bench.decode import distkv_runner

    with distkv.LLM(tiny_model, page_size=16, device_kv_bytes="1MiB") as llm:
        runner = distkv_runner(llm)
        assert all(seconds > 0 for seconds in runner([7] * 40, 3))
        with pytest.raises(DistKVError, match="of 40 tokens 32 were found in the cache"):
            runner([7] * 40, 3)
        with pytest.raises(DistKVError, match=r"had \[1, 6\] tokens instead of \[1, 11\]"):
            runner([8] * 250, 10)  # of 256 positions


def test_bench_offload_counts_bytes_and_compares_answers(tmp_path: Path, run_here: Run) -> None:
    folder, _ = save_llama(tmp_path)
    figures = tmp_path / "figures.json"
    common = ("bench", "offload", "--model", str(folder), "--dtype", "float32", "--page-size", "32")
    result = run(
        *common, "--context", "128", "--new-tokens", "4", "--repeats", "2", "--cache-dir", str(tmp_path / "cache"),
        "--json", str(figures),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "damaged" not in result.stderr
    assert "all on disk" in result.stdout and "bit for bit" in result.stdout
    written = json.loads(figures.read_text())
    assert written["bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # 2 layers, 2 KV heads of 16, fp32
    rows = {row["cache"]: row for row in written["rows"]}
    # the first page of four stays on the device with the one being written, where not half of them do
    assert {name: row["cold_tokens"] for name, row in rows.items()} == {
        "all on device": 0, "half on host": 64, "all on host": 96, "all on disk": 96,
    }  # fmt: skip
    for row in rows.values():
        streamed = row["host_bytes_per_step"] + row["disk_bytes_per_step"]
        assert streamed == written["bytes_per_token"] * row["cold_tokens"]
        assert row["tokens_compared"] >= 1 + 4 + 1 + 4 and row["same_answer"]
    assert rows["all on host"]["disk_bytes_per_step"] == rows["all on disk"]["host_bytes_per_step"] == 0
    assert rows["all on disk"]["preadv_gb_per_s"]["min"] > 0
    assert not list((tmp_path / "cache").rglob("kv.zarr"))

    check_refused(run_here(*common, "--context", "100"), "context 100", "use 128")
    check_refused(run_here(*common, "--context", "256"), "256 positions", "at most 224")
    check_refused(run_here(*common, "--context", "128"), "38 tokens", "page of 32", "raise page-size")


def test_bench_offload_refuses_other_bytes_and_other_answers() -> None:
    from distkv.bench.decoder import check_streamed
    from distkv.bench.offload import check_answers
    from distkv.workers.sampling.sampled_token import TokenLogprobs

    before = {"host_streamed": 100, "device_to_host": 7}
    after = {"host_streamed": 130, "disk_streamed": 20, "device_to_host": 7}
    assert check_streamed("x", before, after, 50) == (30, 20)
    with pytest.raises(DistKVError, match="x: a step streamed 50 bytes and its cold tokens take 51"):
        check_streamed("x", before, after, 51)
    with pytest.raises(DistKVError, match=r"x: pages moved between tiers .* timed, bytes {'device_to_host': 2}"):
        check_streamed("x", before, after | {"device_to_host": 9}, 50)
    answer = [(3, TokenLogprobs(-1.0, 1, [])), (4, TokenLogprobs(-2.0, 1, []))]
    check_answers({"a": answer, "b": list(answer)})
    with pytest.raises(DistKVError, match="b and a differ from token 1"):
        check_answers({"a": answer, "b": [answer[0], (4, TokenLogprobs(-2.5, 1, []))]})


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
        (("--model", "MODEL", "--prompt", "x", "--disk-write-policy", "never"), ("disk_write_policy", "idle")),
        (("--model", "MODEL", "--prompt", "x", "--max-cold-bytes-per-step", "0"), ("max_cold_bytes_per_step is '0'",)),
    ],
)
def test_refusals_are_one_line(
    demo_model: Path, tmp_path: Path, run_here: Run, arguments: tuple[str, ...], words: tuple
) -> None:
    """As `main` prints them; `test_fetch_prints_the_folder` sees one of another process."""
    latin1 = tmp_path / "latin1.txt"
    latin1.write_bytes("für".encode("latin-1")[:1] + b"ab\xfc")
    places = {"MODEL": str(demo_model), "LATIN1": str(latin1)}
    check_refused(run_here("generate", *(places.get(argument, argument) for argument in arguments)), *words)
