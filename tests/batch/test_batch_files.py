"""`distkv batch` from file to file, in this process, with a small random model."""

import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from support.batches import answers, line, read_lines, start_batch, write_lines
from support.power_loss import PowerLoss

from distkv.batch import run as run_module
from distkv.batch.files import BatchFiles, Claim
from distkv.batch.input_file import scan
from distkv.batch.line_file import LineFile
from distkv.batch.run import MADE_WITH, BatchOptions, run
from distkv.config import EngineConfig
from distkv.errors import ConfigError, DistKVError, RequestError, StoreError

ENGINE: Any = {"num_threads": 1, "device_kv_bytes": "16MiB", "page_size": 16, "dtype": "auto", "seed": 0}
LINES = [
    *(line(f"chat {number}", max_tokens=12) for number in range(40)),
    line("text", "/v1/completions", prompt=["Once", "upon"], max_tokens=5, n=2, logprobs=1),
    line("response", "/v1/responses", input="Hello", max_output_tokens=5),
    line("greedy", temperature=0, max_tokens=5),
]

Run = Callable[..., int]


@pytest.fixture
def batch(talker: Path, tmp_path: Path) -> Run:
    """Runs a batch from `in.jsonl` to `out.jsonl`."""

    def start(names: list[str] | None = None, retries: bool = False, **engine: Any) -> int:
        files = BatchFiles(tmp_path / "in.jsonl", tmp_path / "out.jsonl", None)
        return run(lambda: talker, files, BatchOptions(names or ["talker"], retries), ENGINE | engine)

    return start


def test_a_cut_run_goes_on_to_the_same_answers(batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever was written of the last line; lines have seeds of their own."""
    source, output = write_lines(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    assert batch(max_num_seqs=4) == 0
    expected = answers(output)
    assert expected.keys() == {one["custom_id"] for one in LINES}
    assert len({one[0]["message"]["content"] for name, one in expected.items() if name.startswith("chat")}) > 35
    assert not (tmp_path / "out.errors.jsonl").exists() and not (tmp_path / "out.jsonl.lock").exists()
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(whole[:20]) + whole[20][:30])
    capfd.readouterr()
    assert batch(max_num_seqs=64) == 0
    told = capfd.readouterr().err
    assert "23 of 43 lines are to be answered" in told
    assert "20/43 lines (46 %)" in told and "43/43 lines (100 %)" in told
    assert answers(output) == expected
    assert output.read_bytes().startswith(b"".join(whole[:20]))

    with source.open("ab") as file:  # more lines may come later
        file.write(b"\r\n" + json.dumps(line("new", max_tokens=2)).encode())
    assert batch() == 0
    assert answers(output).keys() == {*expected, "new"}


def test_lines_that_fail_are_told_of_and_tried_again_when_asked(batch: Run, tmp_path: Path) -> None:
    errors = tmp_path / "out.errors.jsonl"
    lines = [
        line("good", max_tokens=2),
        line("cold", temperature=-1),
        line("streamed", stream=True),
        line("other", model="gpt-4o-mini", max_tokens=2),
        line("got", method="GET"),
        line("embedded", "/v1/embeddings", input="x"),
        {"custom_id": 5},
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes() + b"\n\0\xff\n")
    assert batch() == 1
    assert answers(tmp_path / "out.jsonl").keys() == {"good"}
    told = {one["custom_id"]: one for one in read_lines(errors)}
    assert told.keys() == {None, "cold", "streamed", "other", "got", "embedded"}
    assert told["cold"]["response"]["status_code"] == 400 and told["cold"]["error"] is None
    assert "temperature" in told["cold"]["response"]["body"]["error"]["message"]
    assert told["other"]["response"]["status_code"] == 404
    assert told["streamed"]["response"] is None and "line 3: stream" in told["streamed"]["error"]["message"]
    assert len(read_lines(errors)) == 7

    before = sorted(map(str, read_lines(errors)))
    record = told["cold"]["response"] | {"status_code": 503}
    with errors.open("a") as file:  # a failure that may have passed
        file.write(json.dumps(told["cold"] | {"custom_id": "good", "response": record}) + "\n")
    (tmp_path / "out.jsonl").unlink()
    assert batch() == 1
    assert answers(tmp_path / "out.jsonl").keys() == {"good"}
    known = [one for one in before if "'custom_id': None" not in one]
    assert sorted(str(one) for one in read_lines(errors) if one["custom_id"]) == known
    assert batch(["talker", "gpt-4o-mini"], retries=True) == 1
    assert answers(tmp_path / "out.jsonl").keys() == {"good", "other"}
    assert len(read_lines(errors)) == 6


def test_a_file_for_another_model_is_refused_before_any_work(batch: Run, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [line("a", model="gpt-4o-mini"), line("b", model="gpt-4o")])
    with pytest.raises(RequestError, match=r"no line asks for 'talker': .* --served-model-name 'gpt-4o'"):
        batch()
    assert not (tmp_path / "out.jsonl.run").exists()


def test_a_signal_ends_in_good_order(batch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "GRACE_SECONDS", 60.0)
    write_lines(tmp_path / "in.jsonl", [line(str(number), max_tokens=100) for number in range(200)])
    output = tmp_path / "out.jsonl"

    def interrupt() -> None:
        while not output.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert batch(max_num_seqs=4) == 128 + signal.SIGTERM
    thread.join()
    assert 0 < len(answers(output)) < 200


def test_a_full_disk_ends_it_with_nothing_half_written(
    batch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in.jsonl", LINES)
    write, room = os.write, 5000

    def write_some(fd: int, data: bytes) -> int:
        nonlocal room
        if b"batch_req_" not in data[:20] and room > 0:
            return write(fd, data)
        if room <= 0:
            raise OSError(28, "No space left on device")
        count = write(fd, data[:room])
        room -= count
        return count

    monkeypatch.setattr("distkv.batch.line_file.os.write", write_some)
    with pytest.raises(StoreError, match=r"out.jsonl' cannot be written: No space left on device.* same command"):
        batch()
    monkeypatch.undo()
    output = tmp_path / "out.jsonl"
    assert 0 < len(answers(output)) < len(LINES) and output.read_bytes().endswith(b"\n")
    assert batch() == 0
    assert len(answers(output)) == len(LINES)


def test_a_lost_engine_ends_it_and_fails_no_line(batch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be gone on with is not called failed."""
    from distkv.engine.engine import Engine
    from distkv.errors import WorkerDied

    step, count = Engine.step, 0

    def die(engine: Engine) -> Any:
        nonlocal count
        count += 1
        if count > 30:
            raise WorkerDied(0, "here", "it was shot")
        return step(engine)

    write_lines(tmp_path / "in.jsonl", LINES)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", die)
        with pytest.raises(WorkerDied, match="it was shot"):
            batch(max_num_seqs=4)
    assert not (tmp_path / "out.errors.jsonl").exists()
    assert len(answers(tmp_path / "out.jsonl")) < len(LINES)
    assert batch() == 0


def test_a_pool_that_has_no_engine_left_fails_no_line(
    batch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests end with errors after a while, though it has not ended itself."""
    from distkv.async_llm import AsyncLLM
    from distkv.batch.records import Response
    from distkv.batch.routes import Routes
    from distkv.engine.stats import EngineStats

    async def refuse(routes: Routes, url: str, body: bytes) -> Response:
        return Response(503, "x", Raw(b"{}"))

    async def stats(llm: AsyncLLM) -> EngineStats:
        return EngineStats(0, 0, 0, 0, num_engines=0, seconds_without_engine=seconds)

    write_lines(tmp_path / "in.jsonl", LINES)
    monkeypatch.setattr(Routes, "post", refuse)
    monkeypatch.setattr(AsyncLLM, "stats", stats)
    seconds = 600.0
    with pytest.raises(DistKVError, match="no engine could be started anew for 600 s"):
        batch()
    assert not (tmp_path / "out.errors.jsonl").exists()
    seconds = 20.0  # these may be what engines die of
    assert batch() == 1
    assert len(read_lines(tmp_path / "out.errors.jsonl")) == len(LINES)


def test_two_batches_do_not_share_an_error_file(talker: Path, tmp_path: Path) -> None:
    def claim(output: str) -> Claim:
        return Claim(BatchFiles(tmp_path / "in", tmp_path / output, tmp_path / "errors"), talker, {})

    first = claim("one")
    with pytest.raises(ConfigError, match=f"process {os.getpid()} .* is writing '.*errors'; .*name another"):
        claim("two")
    first.release(is_complete=True)
    claim("two").release(is_complete=True)
    assert not list(tmp_path.glob("*.lock"))


def test_a_model_is_known_again_by_what_it_holds(talker: Path, tmp_path: Path) -> None:
    def claim(model: Path) -> None:
        Claim(BatchFiles(tmp_path / "in", tmp_path / "out", None), model, {}).release(is_complete=False)

    claim(talker)
    (tmp_path / "out").write_text("{}\n")
    moved = shutil.copytree(talker, tmp_path / "moved")
    claim(moved)
    [weights] = moved.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=f"made with model '{talker}', and now it is '{moved}'"):
        claim(moved)


def test_what_a_policy_has_read_is_told(batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And by which policy it was, beside each answer."""
    lines = [line(str(number), "/v1/completions", prompt=[5, 6] * 40, max_tokens=6) for number in range(2)]
    write_lines(tmp_path / "in.jsonl", lines)
    assert batch(attention_policy="top_pages(pages=2)", attention_audit=2) == 0
    covered = r"the answers have read 33\.3% of the pages, on which [0-9.]+% of all attention lies\n"
    assert re.search(covered, capfd.readouterr().err), "two of six"
    for one in read_lines(tmp_path / "out.jsonl"):
        assert one["response"]["body"]["kv_policy"] == "top_pages(pages=2)"


@pytest.mark.parametrize("option", [{"attention_policy": "top_pages"}, {"kv_cache_dtype": "int8"}])
def test_answers_of_different_caches_are_not_mixed(option: dict[str, Any]) -> None:
    """What outputs are named by is an option that a batch must keep."""
    assert EngineConfig("/", **option).kv_policy is not None and option.keys() <= set(MADE_WITH)


def test_a_reader_of_stderr_who_has_left_ends_nothing(talker: Path, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", LINES[:3]), tmp_path / "out.jsonl"
    with start_batch(talker, source, output) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait() == 0
    assert len(answers(output)) == 3


def test_the_served_name_is_found_behind_a_thousand_others(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(number), model=f"m{number}") for number in range(1500)])
    assert "m1400" in scan(source, ["m1400"]).models and "m1400" not in scan(source, ["m1"]).models


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_line_is_lost_or_doubled_by_kills_at_any_moment(talker: Path, tmp_path: Path, batch: Run) -> None:
    import random

    lines = [line(f"line {number}", max_tokens=12) for number in range(3000)]
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "killed.jsonl"
    assert batch() == 0
    chance, num_kills = random.Random(0), 0
    for _ in range(50):
        with start_batch(talker, source, output, "--max-num-seqs", "8") as process:
            size = output.stat().st_size if output.exists() else 0
            while process.poll() is None and (not output.exists() or output.stat().st_size == size):
                time.sleep(0.01)
            time.sleep(chance.random() * 0.5)
            process.kill()
            num_kills += process.wait() == -signal.SIGKILL
    with start_batch(talker, source, output) as process:
        assert process.wait() == 0
    assert num_kills > 20
    assert answers(output) == answers(tmp_path / "out.jsonl")


def test_a_line_that_was_synced_outlives_a_loss_of_power(tmp_path: Path) -> None:
    disk, rng = tmp_path / "disk", random.Random(1)
    disk.mkdir()
    loss = PowerLoss(disk)
    with loss.followed(), closing(LineFile(disk / "out.jsonl")) as file:
        file.append(b"1\n")
        file.sync()
        for number in range(20):
            loss.leave(tmp_path / str(number), rng)
            assert (tmp_path / str(number) / "out.jsonl").read_bytes() == b"1\n"


GONE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
    "replaced": lambda path: shutil.copy(path, path.with_name("new")) and path.with_name("new").replace(path),
}


@pytest.mark.parametrize("is_synced", [False, True])
@pytest.mark.parametrize("how", GONE)
def test_lines_of_a_file_that_is_gone_are_not_called_written(tmp_path: Path, how: str, is_synced: bool) -> None:
    path = tmp_path / "out.jsonl"
    with closing(LineFile(path)) as file:
        file.append(b"1\n")
        if is_synced:
            file.sync()
        GONE[how](path)
        with pytest.raises(StoreError, match=r"out.jsonl' has been removed, moved or replaced .* same command again"):
            file.sync()


def test_a_batch_whose_answers_are_taken_away_says_so(
    batch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it those of an earlier run, before there is a new one."""
    write_lines(tmp_path / "in.jsonl", LINES[:8])
    output, aside, append = tmp_path / "out.jsonl", tmp_path / "aside", LineFile.append

    def move_and_append(file: LineFile, line: bytes) -> None:
        if output.exists():
            output.rename(aside)
        append(file, line)

    assert batch() == 0
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:3]))
    with monkeypatch.context() as patch:
        patch.setattr(LineFile, "append", move_and_append)
        with pytest.raises(StoreError, match="has been removed, moved or replaced"):
            batch()
    aside.rename(output)
    assert batch() == 0
    assert len(answers(output)) == 8


def test_who_is_about_to_write_takes_no_file_from_who_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may make the output while this one sees whether it could."""
    made, os_open = [], os.open

    def note(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            made.append(Path(path))
        return os_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", note)
    files = BatchFiles(tmp_path / "in.jsonl", tmp_path / "out.jsonl", None)
    assert not {files.output, files.errors} & {*made} and not list(tmp_path.iterdir())


def test_line_files_are_made_with_their_first_line(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "none" / "out.jsonl")
    file.sync()
    file.close()
    with pytest.raises(StoreError, match="cannot be written"):
        file.append(b"x\n")
