"""Builds the native kernels: one shared library for each instruction set, from the C++ in this folder.

`setup.py` builds all of them beside their source where there is a compiler; where there was none then, the one that is
needed is built at first use, into a folder of the user's.
"""

import fcntl
import os
import shutil
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from typing import IO

SOURCES = Path(__file__).parent
BUILT = SOURCES / "built"
PATIENCE = 120  # seconds for another process to build; it takes about five
# without -ffp-contract=off the compiler would choose where a product and a sum are rounded together; OpenMP's runtime
# is not linked but found in the process, where torch has loaded the one that both use
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"]


class BuildError(Exception):
    """The kernels cannot be built here; the message says why."""


def library_name(instruction_set: str, flags: list[str]) -> str:
    """The file name of the library for an instruction set, which tells one source from another."""
    parts = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]pp"))]
    text = b"\0".join([*parts, *(flag.encode() for flag in [*FLAGS, *flags])])
    return f"{instruction_set}-{sha256(text).hexdigest()[:16]}.so"


def find_or_build(instruction_set: str, flags: list[str]) -> Path:
    """The library for an instruction set, which is built if need be. Raises BuildError."""
    name = library_name(instruction_set, flags)
    try:
        if (BUILT / name).exists():
            return BUILT / name
        target = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distkv" / "kernels" / name
        if not _is_whole(target):
            build(target, flags)
    except RuntimeError as error:
        raise BuildError("this user has no home to build them in; set XDG_CACHE_HOME") from error
    except OSError as error:
        raise BuildError(f"{error.filename or error} cannot be used: {error.strerror}; set XDG_CACHE_HOME") from error
    return target


def build(target: Path, flags: list[str]) -> None:
    """Compiles a library to `target`, once for all processes that want it now. Raises BuildError, and OSError for the
    folder."""
    compiler = shutil.which("g++")  # torch brings the runtime of its OpenMP, not that of others
    if compiler is None:
        raise BuildError("there is no g++ on the path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:  # one for each, so that several are built side by side
        _wait_for(lock)
        if _is_whole(target):
            return
        folder = target.with_suffix(".building")
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
        folder.mkdir()
        built, compiled = folder / target.name, folder / "kernels.o"
        try:
            _run([compiler, *FLAGS, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled)])
            _run([compiler, "-shared", str(compiled), "-o", str(built)])
            _digest_file(target).write_text(_digest(built))
            built.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_whole(library: Path) -> bool:
    """Whether it lies there as it was built: one that was cut short would end the process that loads it."""
    return library.exists() and _digest_file(library).exists() and _digest_file(library).read_text() == _digest(library)


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def _wait_for(lock: IO[str]) -> None:
    """Raises BuildError when another process keeps it for too long."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BuildError(f"another process has been building them for {PATIENCE} s ({lock.name})") from None
            time.sleep(0.05)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'status {result.returncode}'}")
