"""In the job: runs a command, then puts the files that it wrote where the dashboard serves them.

That is the folder of the Ray session's logs on this node, the one place whose files can be had over a job's HTTP
address. They stay there as long as the session.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

Stamp = tuple[int, int]  # time of the last change in ns, bytes

MANIFEST = "manifest.json"
LOOK_SECONDS = 0.5
MOST_LOOKS = 5
STOPPING_SECONDS = 1.5  # of a command, after which its files are put out as they are: three seconds later it is killed


def folder_name(job: str) -> str:
    """The folder of a job's files, in that of the logs."""
    return f"distkv-{job}"


def wrapped(job: str, submitted: float, patterns: list[str], command: list[str]) -> list[str]:
    """The command line, behind `python -m`, of a job whose files come back.

    Args:
        submitted: seconds since the epoch by the clock of who submits it, which the manifest says again.
    """
    flags = [f"--bring={pattern}" for pattern in patterns]
    return ["distkv.jobs.outbox", "--job", job, "--submitted", repr(submitted), *flags, "--", *command]


def main() -> int:
    """Runs the command behind `--` and returns its exit code, 128 and the signal's number when that was its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--submitted", type=float, required=True)
    parser.add_argument("--bring", action="append", required=True)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    stop_times: list[float] = []  # monotonic
    for number in (signal.SIGTERM, signal.SIGINT):  # who stops the job tells the command too; its files are brought
        signal.signal(number, lambda *_: stop_times.append(time.monotonic()))
    before = {path: _stamp(path) for pattern in options.bring for path in _found(pattern)}
    _clear(options.job)
    command = subprocess.Popen([sys.executable, "-m", "distkv", *options.command])
    is_out = False
    while (code := _ended(command)) is None:
        if not is_out and stop_times and time.monotonic() - stop_times[0] > STOPPING_SECONDS:
            _put_out(options.job, options.submitted, options.bring, before)
            is_out = True
    _put_out(options.job, options.submitted, options.bring, before)
    return code if code >= 0 else 128 - code


def _ended(command: "subprocess.Popen[bytes]") -> int | None:
    """Waits a moment; the exit code, or None."""
    try:
        return command.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _clear(job: str) -> None:
    """Takes away what an earlier job of this name has put out."""
    logs = _log_folder()
    if logs is not None:
        shutil.rmtree(logs / folder_name(job), ignore_errors=True)


def _put_out(job: str, submitted: float, patterns: list[str], before: dict[Path, Stamp | None]) -> None:
    """Copies what is new since `before`, and writes what there is; patterns without a new file are `missing`. A file
    that goes meanwhile, a temporary one of a command that still runs, say, is passed over."""
    logs = _log_folder()
    if logs is None:
        print("distkv: the job's log is no file here, so no file can be brought back", file=sys.stderr)
        return
    folder = logs / folder_name(job)
    try:
        folder.mkdir(exist_ok=True)
        first = sum(1 for _ in folder.iterdir())  # what was put out before is left until the new manifest is there
        files: dict[Path, dict] = {}
        missing = []
        for pattern in patterns:
            new = [path for path in _found(pattern) if before.get(path) != _stamp(path)]
            for path in new:
                if path not in files:
                    target = folder / str(first + len(files))
                    with suppress(FileNotFoundError):
                        shutil.copyfile(path, target)
                        files[path] = {"path": path.as_posix(), "name": target.name, **_measured(target)}
            if files.keys().isdisjoint(new):
                missing.append(pattern)
        staged = folder / f"{MANIFEST}.new"
        staged.write_text(json.dumps({"submitted": submitted, "files": list(files.values()), "missing": missing}))
        staged.rename(folder / MANIFEST)
    except OSError as error:
        print(f"distkv: files cannot be brought back: {error}", file=sys.stderr)


def _log_folder() -> Path | None:
    """Where this job's log lies, which is its stdout; None when that is something else."""
    log = Path(os.path.realpath("/proc/self/fd/1"))
    return log.parent if log.is_file() and log.name.startswith("job-driver-") else None


def _found(pattern: str) -> Iterator[Path]:
    """Files by their path in the current folder; of a folder all that are in it."""
    for path in _matching(pattern):
        inside = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names) or [path]
        yield from (one for one in inside if one.is_file())


def _matching(pattern: str) -> list[Path]:
    """Looks again when a folder goes while it is looked into, which pathlib does not pass over."""
    for _ in range(MOST_LOOKS - 1):
        with suppress(FileNotFoundError):
            return sorted(Path().glob(pattern))
    return sorted(Path().glob(pattern))


def _stamp(path: Path) -> Stamp | None:
    """What changes with a file; None for one that is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def _measured(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


if __name__ == "__main__":
    sys.exit(main())
