"""What is uploaded for a job, and what is refused before anything is."""

import http.server
import io
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path, PurePosixPath
from subprocess import Popen
from subprocess import run as run_process
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import ROOT

from distkv import ConfigError, StoreError
from distkv.commands.main import app
from distkv.jobs import outbox, packing
from distkv.jobs import submit as submit_module
from distkv.jobs.cluster import Cluster
from distkv.jobs.inbox import bring
from distkv.jobs.packing import files_of, stage_distkv, write_zip
from distkv.jobs.submit import Job


def fill(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def paths_of(folder: Path) -> list[str]:
    return [str(one.path) for one in files_of(folder)]


def test_a_folder_is_packed_without_what_no_job_needs(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "sub/b.txt", "sub/c.log", "sub/keep.log", "data/d.bin", ".git/HEAD", "x/__pycache__/y.pyc")
    fill(tmp_path, "distkv/__init__.py", "x/distkv/e.txt", "node_modules/f.js")
    (tmp_path / ".gitignore").write_text("/data/\n")
    (tmp_path / "sub" / ".rayignore").write_text("*.log\n!keep.log\n")
    (tmp_path / "x" / "back").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert paths_of(tmp_path) == [
        ".gitignore", "a.txt", "link.txt", "sub/.rayignore", "sub/b.txt", "sub/keep.log", "x/distkv/e.txt",
    ]  # fmt: skip


def test_what_is_deeper_or_for_ray_takes_back_what_is_ignored(tmp_path: Path) -> None:
    fill(tmp_path, "out/a.json", "sub/b.log", "venv/c.py", "d.log", "distkv/__init__.py")
    (tmp_path / ".gitignore").write_text("*.json\n*.log\n")
    (tmp_path / ".rayignore").write_text("!*.json\n!venv\n!distkv\n")
    (tmp_path / "sub" / ".gitignore").write_text("!*.log\n")
    assert paths_of(tmp_path) == [
        ".gitignore", ".rayignore", "out/a.json", "sub/.gitignore", "sub/b.log", "venv/c.py",
    ]  # fmt: skip


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / os.fsdecode(b"caf\xe9.txt")).touch()
    with pytest.raises(ConfigError, match=r"caf.*is not UTF-8; rename it"):
        files_of(tmp_path / "work")
    fill(tmp_path, "work/.gitignore")
    (tmp_path / "work" / ".gitignore").write_text("*.txt")
    assert paths_of(tmp_path / "work") == [".gitignore"]


def test_what_goes_while_a_folder_is_packed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file, or a folder, whether it goes before its size is asked for or before it is read."""
    fill(tmp_path, "in/a.txt", "in/gone", "in/folder/gone.too", "in/later")
    is_ignored = packing._is_ignored

    def look(path: PurePosixPath, is_folder: bool, rules: Any) -> bool:
        if path.name == "gone":
            (tmp_path / "in" / path).unlink()
        if path.name == "folder":
            shutil.rmtree(tmp_path / "in" / path)
        return is_ignored(path, is_folder, rules)

    monkeypatch.setattr(packing, "_is_ignored", look)
    found = files_of(tmp_path / "in")
    (tmp_path / "in" / "later").unlink()
    write_zip(found, "j", tmp_path / "job.zip")
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        assert archive.namelist() == [packing.JOB_FILE, "a.txt"]


def test_each_job_has_a_package_of_its_own(tmp_path: Path) -> None:
    """Ray would have jobs of equal packages write in one folder. Empty folders are there to be written to."""
    fill(tmp_path, "in/a.txt")
    (tmp_path / "in" / "out").mkdir()
    for job in ("first", "second"):
        write_zip(files_of(tmp_path / "in"), job, tmp_path / job)
        with zipfile.ZipFile(tmp_path / job) as archive:
            archive.extractall(tmp_path / f"of {job}")
        assert (tmp_path / f"of {job}" / "a.txt").read_bytes() == b"in/a.txt"
        assert (tmp_path / f"of {job}" / "out").is_dir()
    assert (tmp_path / "first").read_bytes() != (tmp_path / "second").read_bytes()


def test_too_much_is_refused_by_the_names_of_the_biggest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_BYTES", 1000)
    (tmp_path / "model.safetensors").write_bytes(bytes(2000))
    fill(tmp_path, "small.txt")
    with pytest.raises(ConfigError, match=r"biggest files are model.safetensors \(0.0 MB\), small.txt.*rayignore"):
        files_of(tmp_path)
    (tmp_path / ".rayignore").write_text("*.safetensors\n")
    assert paths_of(tmp_path) == [".rayignore", "small.txt"]


def test_distkv_is_shipped_whole_and_small(tmp_path: Path) -> None:
    package = stage_distkv(tmp_path)
    files = [file for file in package.rglob("*") if file.is_file()]
    assert not [file for file in files if file.is_symlink() or "__pycache__" in file.parts]
    assert sum(file.stat().st_size for file in files) < 6e6
    code = "import distkv.commands.main, distkv.storage.page_spec, distkv.workers, sys; print(distkv.__file__)"
    shown = run_process(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert shown.stdout.strip() == str(package / "__init__.py"), shown.stderr


def test_ray_itself_uploads_only_distkv_of_a_checkout(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` follows .rayignore."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    target = tmp_path / "package.zip"
    packaging.create_package(str(ROOT), target, include_gitignore=True, excludes=[".git", ".venv", "__pycache__"])
    names = zipfile.ZipFile(target).namelist()
    tops = {name.split("/")[0] for name in names}
    assert "distkv/workers/rank.py" in names and "distkv/kernels/native/attention.hpp" in names
    assert not tops & {"tests", "docs", "workers", "storage", "kernels", ".git", "dist"}
    assert target.stat().st_size < 6e6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "there is no command"),
        ("-- nonsense", "No such command"),
        ("-- stress --contxt 5", "No such option"),
        ("-- bench", "needs a command of its own"),
        ("-- chat", "cannot be a job"),
        ("--bring ../x -- stress", "not a path inside"),
        ("--bring /etc/passwd -- stress", "not a path inside"),
        ("--bring a**b -- stress", "alone between slashes"),
        ("--address nonsense:// -- stress", "nonsense"),
        ("--env NOT_SET_HERE -- stress", "NOT_SET_HERE: the variable is not set"),
        ("--env 1=2 -- stress", "neither NAME nor NAME=VALUE"),
        ("--submission-id a/b -- stress", "submission id"),
        ("--working-dir no_such_folder -- stress", "not a folder"),
        ("--follow x -- stress", "leave out all but --address"),
        (
            "--address http://127.0.0.1:1 --working-dir EMPTY -- stress",
            "no Ray dashboard answers at http://127.0.0.1:1",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=message) as caught:
        app(["submit", *arguments.replace("EMPTY", str(tmp_path)).split()], standalone_mode=False)
    assert message in getattr(caught.value, "message", str(caught.value))


def test_a_server_that_is_no_dashboard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ConfigError, match="is not a Ray dashboard"):
            app(["submit", "--address", address, "--", "stress", "--shape", "tiny"], standalone_mode=False)
        server.shutdown()


def test_help_of_a_command_is_shown_here() -> None:
    with redirect_stdout(io.StringIO()) as shown:
        app(["submit", "--", "stress", "--help"], standalone_mode=False)
    assert "--context" in shown.getvalue()


def test_a_file_that_the_job_did_not_write_is_not_put_out(tmp_path: Path) -> None:
    """It has been uploaded with the folder, and says nothing of the job."""
    fill(tmp_path, "work/old.txt")
    fill(tmp_path, "distkv-j/of_an_earlier_job_of_that_name")
    brought = [f"--bring={pattern}" for pattern in ("old.txt", "-x", "new/*")]
    command = [sys.executable, "-m", "distkv.jobs.outbox", "--job", "j", "--submitted", "1.5", *brought]
    with (tmp_path / "job-driver-j.log").open("w") as log:
        ended = run_process(
            [*command, "--", "nonsense"], cwd=tmp_path / "work", stdout=log, stderr=log, env={"PYTHONPATH": str(ROOT)}
        )
    assert ended.returncode == 2
    manifest = json.loads((tmp_path / "distkv-j" / "manifest.json").read_text())
    assert manifest == {"submitted": 1.5, "files": [], "missing": ["old.txt", "-x", "new/*"]}
    assert [path.name for path in (tmp_path / "distkv-j").iterdir()] == ["manifest.json"]


def test_a_file_that_goes_meanwhile_is_passed_over(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is looked at, before it is copied, or a folder before it is looked into: what else there is comes."""
    logs, stamp, copy, scandir = tmp_path_factory.mktemp("logs"), outbox._stamp, shutil.copyfile, os.scandir

    def look(folder: Any = ".") -> Any:
        if not isinstance(folder, int) and Path(folder).name == "gone":
            shutil.rmtree(folder, ignore_errors=True)
        return scandir(folder)

    def stamp_without(path: Path) -> Any:
        if path.suffix == ".partial":
            path.unlink(missing_ok=True)
        return stamp(path)

    def copy_without(path: Path, target: Path) -> None:
        if path.suffix == ".wal":
            path.unlink(missing_ok=True)
        copy(path, target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outbox, "_log_folder", lambda: logs)
    monkeypatch.setattr(outbox, "_stamp", stamp_without)
    monkeypatch.setattr(shutil, "copyfile", copy_without)
    monkeypatch.setattr(os, "scandir", look)
    patterns = ["*.partial", "*.wal", "out", "**/*.json", "*.*"]
    for job, own in enumerate([["*.partial"], ["*.wal"], ["out"], ["**/*.json"], patterns]):
        fill(tmp_path, "a.partial", "b.wal", "c.jsonl", "out/d.json", "out/gone/e.json")
        outbox._put_out(str(job), 1.5, own, {})
        manifest = json.loads((logs / f"distkv-{job}" / "manifest.json").read_text())
        missing = [one for one in own if one in ("*.partial", "*.wal")]
        expected = {"out": ["out/d.json"], "**/*.json": ["out/d.json"], "*.*": ["c.jsonl"]}
        found = sorted({path for one in own for path in expected.get(one, [])})
        assert sorted(one["path"] for one in manifest["files"]) == found and manifest["missing"] == missing


def test_what_a_command_has_written_is_put_out_before_it_is_killed(tmp_path: Path) -> None:
    """Ray gives a job that is stopped three seconds, and a command may take longer to end."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "distkv.py").write_text(
        "import signal, time\n"
        "def end(*_):\n"
        "    open('out.txt', 'a').write('more ')\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open('out.txt', 'w').write('some ')\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "outbox.py").write_text((ROOT / "distkv" / "jobs" / "outbox.py").read_text())
    flags = ["--job", "j", "--submitted", "1.5", "--bring=out.txt"]
    command = [sys.executable, str(tmp_path / "outbox.py"), *flags, "--", "stress"]
    with (
        (tmp_path / "job-driver-j.log").open("w") as log,
        Popen(command, cwd=tmp_path / "work", stdout=log, stderr=log, start_new_session=True) as job,
    ):
        written = tmp_path / "work" / "out.txt"
        while not written.exists() or written.read_text() != "some ":
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGTERM)
        while not (tmp_path / "distkv-j" / "manifest.json").exists():
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGKILL)
    [entry] = json.loads((tmp_path / "distkv-j" / "manifest.json").read_text())["files"]
    assert (tmp_path / "distkv-j" / entry["name"]).read_text() == "some more "


@pytest.mark.parametrize("is_changed", [False, True])
def test_what_is_changed_once_a_job_is_submitted_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_changed: bool
) -> None:
    """Though the cluster's clock may be ahead, by which the job began later."""
    fill(tmp_path, "here/notes", "job/notes")
    os.utime(tmp_path / "here" / "notes", (1e9, 1e9))
    (tmp_path / "job" / "distkv.py").write_text("open('notes', 'w').write('of the job')")
    (tmp_path / "outbox.py").write_text((ROOT / "distkv" / "jobs" / "outbox.py").read_text())
    monkeypatch.chdir(tmp_path / "here")

    class Ahead(Cluster):
        def __init__(self, address: str | None):
            self.address = "somewhere"

        def submit(self, job: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
            if is_changed:
                (tmp_path / "here" / "notes").write_text("mine")
            flags = shlex.split(entrypoint.partition("distkv.jobs.outbox ")[2])
            with (tmp_path / "job-driver-j.log").open("w") as log:
                command = [sys.executable, str(tmp_path / "outbox.py"), *flags]
                run_process(command, cwd=tmp_path / "job", stdout=log, stderr=log, check=True)

        def log_file(self, node: str, name: str) -> bytes:
            return (tmp_path / name).read_bytes()

    later = (time.time() + 3600) * 1e3
    details = SimpleNamespace(entrypoint="distkv.jobs.outbox", driver_node_id="node", start_time=later)
    monkeypatch.setattr(submit_module, "Cluster", Ahead)
    monkeypatch.setattr(submit_module, "follow", lambda *_: details)
    monkeypatch.setattr(submit_module, "exit_code", lambda *_: 0)
    cluster, name = submit_module.submit(None, Job(["stress"], ".", {}, ["notes"], "j"), print)
    assert submit_module.attend(cluster, name, print) == 0
    assert (tmp_path / "here" / "notes").read_text() == ("mine" if is_changed else "of the job")
    assert (tmp_path / "here" / "notes.j").exists() == is_changed


class Logs:
    """In the place of a cluster: files of logs, as the dashboard would give them."""

    def __init__(self, **files: bytes):
        self.entries = [
            {"path": path.replace("__", "/"), "name": str(number), "size": len(content), "sha256": _digest(content)}
            for number, (path, content) in enumerate(files.items())
        ]
        self.submitted = 0.0
        self.contents = {str(number): content for number, content in enumerate(files.values())}

    def log_file(self, node: str, name: str) -> bytes:
        kept = json.dumps({"submitted": self.submitted, "files": self.entries, "missing": []}).encode()
        return kept if name.endswith("manifest.json") else self.contents[name.split("/")[-1]]


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def test_files_that_come_back_spare_what_is_newer(tmp_path: Path) -> None:
    said: list[str] = []
    fill(tmp_path, "same", "newer")
    (tmp_path / "older").write_text("of before")
    cluster: Any = Logs(same=b"same", newer=b"the job's", older=b"the job's too", sub__deep=b"\0\xff" * 100)
    bring(cluster, "j", "node", tmp_path, said.append)
    assert (tmp_path / "newer").read_text() == "newer" and (tmp_path / "newer.j").read_text() == "the job's"
    assert (tmp_path / "sub" / "deep").read_bytes() == b"\0\xff" * 100
    assert [line for line in said if "newer is" in line or "newer here is newer" in line]
    cluster.submitted = 1e12
    bring(cluster, "j", "node", tmp_path, said.append)
    assert (tmp_path / "older").read_text() == "the job's too"
    cluster.contents["1"] = b"cut"
    with pytest.raises(StoreError, match="did not arrive"):
        bring(cluster, "j", "node", tmp_path, said.append)
    cluster.entries[0]["path"] = "../evil"
    with pytest.raises(ConfigError, match="not a path inside"):
        bring(cluster, "j", "node", tmp_path, said.append)
