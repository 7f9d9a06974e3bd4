"""`distkv bench peers`: peers that are missing or fail are left out and named, nothing of them is left running, and the
report has what was measured. Peers that fail are scripts in the place of the drivers; the last test runs real ones."""

import json
import re
import shutil
import signal
import sys
import threading
import time
import venv
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.processes import read_line, start_python
from support.servers import save_talker
from typer.testing import CliRunner, Result

from distkv.bench.peers import cpu_time, engines, guarded, opened, report
from distkv.bench.peers.engines import DRIVERS, Engine, Setting
from distkv.bench.peers.guarded import GuardedProcess, PeerFailed
from distkv.bench.peers.http_load import load
from distkv.bench.peers.workloads import Work
from distkv.commands.main import app
from distkv.errors import ConfigError, DistKVError

PROBE = """print('{"version": "1.2", "torch": "2", "python": "3"}')"""
ENGINE = """
import time, driver_loop

def load(options):
    def run(prompts, new_tokens):
        start = time.perf_counter()
        time.sleep(0.002)
        print("a library that prints")
        return time.perf_counter() - start, [[7] * count for count in new_tokens]
    return run

driver_loop.serve(load)
"""
HANGS_OR_CRASHES = """
import os, subprocess, sys, time, driver_loop

def load(options):
    if options.eager:
        sys.exit("no kernel for this machine")
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    child.stdout.readline()
    with open(os.environ["CHILD"], "w") as file:
        file.write(str(child.pid))
    return lambda prompts, new_tokens: time.sleep(1000)

driver_loop.serve(load)
"""
NONSENSE = """
import sys
print('{"start_s": 1.0}', flush=True)
sys.stdin.readline()
print('{"first_s": 1, "seconds": 1}', flush=True)
sys.stdin.readline()
"""


def fake_drivers(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Puts scripts in the place of the drivers."""
    folder.mkdir()
    shutil.copy(DRIVERS / "driver_loop.py", folder)
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(engines, "DRIVERS", folder)
    monkeypatch.setattr(guarded, "GRACE", 0.2)
    monkeypatch.setattr(cpu_time, "WINDOW", 0.05)


def bench_peers(model: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "peers", "--model", str(model), "--dtype", "float32", *arguments])


def is_gone(pid: int) -> bool:
    """Whether a process has ended, though it may be that nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_peers_that_fail_are_left_out_and_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_drivers(
        tmp_path / "drivers", monkeypatch, probe=PROBE, distkv_driver=ENGINE, vllm_driver=HANGS_OR_CRASHES,
        hf_driver=NONSENSE,
    )  # fmt: skip
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    out = tmp_path / "out"
    result = bench_peers(
        tiny_model, "--peer=vllm", "--peer=vllm-eager", "--peer=hf", "--only=single", "--context=20", "--context=40",
        "--repeats=2", "--time-limit=15", f"--out={out}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert is_gone(int((tmp_path / "child").read_text()))
    written = json.loads((out / "peers.json").read_text())
    assert [(row["engine"], row["size"]) for row in written["rows"]] == [("distkv", 20), ("distkv", 40)]
    crash, hang, nonsense = written["missing"]
    assert crash == "vllm-eager, offline: it ended with exit code 1; its last words: no kernel for this machine"
    assert hang == "vllm, 20 tokens: no answer within 15 s, the time limit; it said nothing"
    assert nonsense == "hf, 20 tokens: its answer cannot be understood: KeyError: 'tokens'"
    written_report = (out / "peers.md").read_text()
    assert all(text in written_report and text in result.output for text in written["missing"])
    assert (out / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert "a library that prints" in (out / "distkv.offline.log").read_text()


def test_what_is_not_there_is_said_before_anything_is_measured(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_drivers(tmp_path / "drivers", monkeypatch, distkv_driver=ENGINE, hf_driver=ENGINE)
    shutil.copy(DRIVERS / "probe.py", tmp_path / "drivers")
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    result = bench_peers(
        tiny_model, f"--peer=vllm-eager={bare}/bin/python", f"--peer=vllm={tmp_path}/no/python", "--peer=hf",
        "--only=single", "--context=20", "--repeats=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    left_out = [line for line in lines if line.startswith("left out")]
    assert f"{bare}/bin/python has no module vllm; install it there" in left_out[0]
    assert f"'{tmp_path}/no/python' is no program that can be run" in left_out[1] and len(left_out) == 2
    [row] = [line for line in lines if "20 tokens" in line]
    assert row.count("x") == 1, "how many times as fast as hf"


@pytest.mark.parametrize(
    "code, why",
    [
        ("print('ready?'); input()", "it answered with 'ready?', which is no JSON object"),
        ("import time; time.sleep(1000)", "no answer within 0.5 s, the time limit"),
        ("import os; os.close(0); os.close(1); import time; time.sleep(1000)", "it has closed its stdout"),
    ],
    ids=["nonsense", "reads nothing", "hangs up"],
)
def test_a_process_that_does_not_answer(tmp_path: Path, code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor read what it is sent, which is more than a pipe holds."""
    monkeypatch.setattr(guarded, "GRACE", 0.2)
    limit = 0.5 if "0.5" in why else 30
    with (
        GuardedProcess([sys.executable, "-S", "-c", code], {}, tmp_path / "log") as process,
        pytest.raises(PeerFailed, match=re.escape(why)),
    ):
        process.ask({"prompts": [[7] * 10**5]}, limit)
    assert is_gone(process.group)


def test_distkvs_own_failure_is_an_error(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_drivers(tmp_path / "drivers", monkeypatch, probe=PROBE, distkv_driver=ENGINE.replace("[7] * count", "[7]"))
    result = bench_peers(tiny_model, "--only=single", "--context=20", "--repeats=1")
    assert isinstance(result.exception, DistKVError) and "answered with [1] tokens" in str(result.exception)


def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import sys; print('no port'); sys.exit(4)"]
    monkeypatch.setattr(Engine, "server_command", lambda *_: command)
    setting = Setting(tmp_path, "float32", 1, 64, 2**20)
    with pytest.raises(PeerFailed, match="exit code 4; its last words: no port"):
        opened.server(Engine("vllm", Path(sys.executable)), setting, tmp_path / "log", 30).__enter__()


def test_nothing_outlives_the_command(tmp_path: Path) -> None:
    """Not even when it has no time to end anything."""
    process = start_python(
        "import sys; from pathlib import Path; from distkv.bench.peers.guarded import GuardedProcess\n"
        "child = 'import os, sys; print(os.getpid(), file=sys.stderr, flush=True); sys.stdin.read()'\n"
        "with GuardedProcess([sys.executable, '-c', child], {}, Path(sys.argv[1])): print('up', flush=True); input()",
        tmp_path / "log",
    )
    assert read_line(process) == "up"
    deadline = time.monotonic() + 30
    while not (child := (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not is_gone(int(child))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while not is_gone(int(child)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_figures_of_a_busy_machine_come_with_a_warning() -> None:
    assert report.noise({"load_average": 0.4, "cores": 2}) == ""
    assert "load average was 5.2 on 2 cores" in report.noise({"load_average": 5.2, "cores": 2})


def test_an_engine_that_works_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_time, "PATIENCE", 60)
    monkeypatch.setattr(cpu_time, "WINDOW", 1.0)
    monkeypatch.setattr(cpu_time, "IDLE", 0.01)
    works_on = "print('{}', flush=True)\nfor _ in range(2 * 10**7): pass\nprint('{}', flush=True); input()"
    with GuardedProcess([sys.executable, "-c", works_on], {}, tmp_path / "log") as engine:
        engine.read(30)
        before = cpu_time.group_cpu_seconds(engine.group)
        cpu_time.await_idle(engine.group)
        assert cpu_time.group_cpu_seconds(engine.group) - before > 0.1
        assert engine.read(30) == {}, "it had nothing more to do"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--peer=sglang=/usr/bin/python3"], "'sglang' is not known; use one of vllm, vllm-eager, hf"),
        (["--peer=hf", "--peer=hf=/usr/bin/python3"], "hf is given twice"),
        (["--peer=vllm="], "give the path"),
        (["--only=offline"], "--only is 'offline'; use one of single, mixed, http"),
        (["--only=http", "--context=5"], "--context is for the part 'single'"),
        (["--only=single", "--streams=5"], "--streams is for the part 'http'"),
        (["--only=single", "--context=300"], "have 333 tokens, and the model has 256 positions"),
        (["--dtype=auto"], "use float32, float16, bfloat16"),
        (["--out=/dev/null/x"], "/dev/null/x"),
    ],
)
def test_bench_peers_refuses(tiny_model: Path, arguments: list[str], words: str) -> None:
    small = (
        []
        if any("context" in one or "streams" in one or "only" in one for one in arguments)
        else ["--only=single", "--context=20"]
    )
    result = bench_peers(tiny_model, *small, *arguments)
    assert isinstance(result.exception, ConfigError) and words in str(result.exception), result.exception


def test_a_real_server_under_load(tmp_path: Path) -> None:
    """distkv's own, on a model so small that the figures mean nothing."""
    out = tmp_path / "out"
    model = save_talker(tmp_path / "model")
    result = bench_peers(model, "--only=http", "--streams=2", "--quick", "--repeats=1", f"--out={out}")
    assert result.exit_code == 0, result.output
    [row] = json.loads((out / "peers.json").read_text())["rows"]
    assert (row["engine"], row["size"]) == ("distkv", 2)
    assert row["first_token_p99_ms"]["median"] >= row["first_token_p50_ms"]["median"] > 0
    assert row["between_tokens_p50_ms"]["median"] > 0 and row["output_tokens_per_s"]["median"] > 0


class Completions(BaseHTTPRequestHandler):
    """Streams answers of four tokens, whose pieces have so many each, an answer after the other."""

    pieces: list[list[int]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for _ in self.pieces.pop(0):
            self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            time.sleep(0.01)
        self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\ndata: [DONE]\n\n')

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("pieces, streams", [([[1, 1, 2], [4], [2, 2]], True), ([[4], [4], [4]], False)])
def test_pieces_of_several_tokens(pieces: list[list[int]], streams: bool) -> None:
    """A server that is behind sends several tokens in a piece, some answers in one; one that always does is refused."""
    handler = type("Handler", (Completions,), {"pieces": pieces})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            work = Work("http", 1, [[1, 2]] * 3, [4] * 3)
            if not streams:
                with pytest.raises(PeerFailed, match="in one piece, so that it does not stream"):
                    load(f"http://127.0.0.1:{server.server_port}", work, 60)
                return
            figures = load(f"http://127.0.0.1:{server.server_port}", work, 60)
            assert 0 < figures["between_tokens_p50_ms"] <= figures["between_tokens_p99_ms"]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_distkv_beside_transformers(tmp_path: Path) -> None:
    """All of `--quick`, on a model so small that the figures mean nothing."""
    model = save_talker(tmp_path / "model")
    out = tmp_path / "out"
    result = bench_peers(model, "--peer=hf", "--quick", "--repeats=1", f"--out={out}")
    assert result.exit_code == 0, result.output
    written: dict[str, Any] = json.loads((out / "peers.json").read_text())
    found = {(row["part"], row["size"], row["engine"]) for row in written["rows"]}
    offline = [("single", 128), ("single", 1024), ("mixed", 16)]
    assert found == {(*one, name) for one in offline for name in ("distkv", "hf")} | {
        ("http", streams, "distkv") for streams in (1, 8)
    }
    assert all(row["output_tokens_per_s"]["median"] > 0 for row in written["rows"] if row["part"] != "single")
    assert [text for text in written["missing"] if not text.startswith("hf, http: its server takes no token ids")] == []
    assert written["engines"]["hf"]["version"] and written["engines"]["distkv"]["start_http_s"] > 0
    assert "cores_while_waiting" in written["engines"]["hf"]
