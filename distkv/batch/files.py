"""The files of a batch: which they are, who writes them, and what their answers are made with."""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distkv.batch.line_file import unwritten
from distkv.errors import ConfigError, StoreError
from distkv.reporting.out_file import check_out_file
from distkv.storage.disk.file_lock import FileLock, HeldError


@dataclass(frozen=True)
class BatchFiles:
    """Raises ConfigError for files that cannot be what they are to be."""

    input: Path
    output: Path
    errors: Path

    def __init__(self, input_file: Path, output: Path, errors: Path | None):
        """`errors` is beside the output unless it is named."""
        output = Path(os.path.realpath(output))  # so that a file which takes its place lies where a link leads
        errors = output.with_name(f"{output.stem}.errors{output.suffix}") if errors is None else errors
        given = {"input": input_file, "output": output, "errors": Path(os.path.realpath(errors))}
        for name, path in given.items():
            if path.name == "-":
                raise ConfigError(f"--{name} is '-'; a batch reads and goes on with files, so give one")
            object.__setattr__(self, name, path)
        for name, other in (("input", "output"), ("input", "errors"), ("output", "errors")):
            if os.path.realpath(given[name]) == os.path.realpath(given[other]) or _is_one(given[name], given[other]):
                raise ConfigError(f"--{name} and --{other} are one file, {str(given[other])!r}; name another one")
        for path in (self.output, self.errors):
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise ConfigError(f"{str(path)!r} is no regular file, which a batch could go on with; name another one")
            check_out_file(path)


class Claim:
    """The right to write the output and the error file, which one process at a time has."""

    def __init__(self, files: BatchFiles, made_with: dict[str, Any]):
        """Takes it. Raises ConfigError when somebody else has it, and when the answers that are there were made with
        something else, StoreError when the files beside the output cannot be written."""
        self._locks: list[tuple[Path, FileLock]] = []
        output = files.output
        note = output.with_name(f"{output.name}.run")
        try:
            for path in (output, files.errors):
                self._take(path)
            if output.exists() and output.stat().st_size and note.exists():
                _compare(output, note, made_with)
            else:
                _write(note, made_with)
        except BaseException:
            self.release(is_complete=False)
            raise

    def release(self, is_complete: bool) -> None:
        """Lets others have it; of a batch that has nothing left to do the lock files are removed."""
        for path, lock in self._locks:
            if is_complete:
                path.unlink(missing_ok=True)  # who takes this one just now finds nothing to do, with this output
            lock.release()

    def _take(self, path: Path) -> None:
        lock_path = path.with_name(f"{path.name}.lock")
        try:
            self._locks.append((lock_path, FileLock(lock_path)))
        except HeldError as error:
            raise ConfigError(f"{error} is writing {str(path)!r}; wait for it, or name another file") from error
        except OSError as error:
            raise StoreError(unwritten(lock_path, error)) from error


def _is_one(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _compare(output: Path, note: Path, made_with: dict[str, Any]) -> None:
    try:
        before = json.loads(note.read_bytes())
        changed = [name for name, value in made_with.items() if before.get(name, value) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{str(note)!r} cannot be read; remove it if its answers may go on") from error
    if changed:
        name = changed[0]
        raise ConfigError(
            f"the answers in {str(output)!r} were made with {name} {before[name]!r}, and now it is "
            f"{made_with[name]!r}; give what was given then, name another output, or remove {str(note)!r} to mix them"
        )


def _write(note: Path, made_with: dict[str, Any]) -> None:
    beside = note.with_name(f"{note.name}.new")
    try:
        beside.write_text(json.dumps(made_with, indent=1) + "\n", encoding="utf-8")
        beside.replace(note)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StoreError(unwritten(note, error)) from error
