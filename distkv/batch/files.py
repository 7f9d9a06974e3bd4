"""The files of a batch: which they are, who writes them, and what their answers are made with."""

import json
import os
import stat
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from distkv.batch.line_file import unwritten
from distkv.errors import ConfigError, StoreError
from distkv.reporting.out_file import check_out_file
from distkv.storage.disk.file_lock import FileLock, HeldError

SAMPLE_BYTES = 2**20


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

    def __init__(self, files: BatchFiles, model: Path, made_with: dict[str, Any]):
        """Takes it.

        Args:
            model: file or folder, which is known again by what it holds wherever it lies.
            made_with: what else answers depend on.

        Raises ConfigError when somebody else has it, and when the answers that are there were made with
        something else, StoreError when the files beside the output cannot be written."""
        self._locks: list[FileLock] = []
        output = files.output
        made_with = {"model": str(model), "model_digest": _digest(model), **made_with}
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
        for lock in self._locks:
            lock.release(removes=is_complete)

    def _take(self, path: Path) -> None:
        lock_path = path.with_name(f"{path.name}.lock")
        try:
            self._locks.append(FileLock(lock_path))
        except HeldError as error:
            raise ConfigError(f"{error} is writing {str(path)!r}; wait for it, or name another file") from error
        except OSError as error:
            raise StoreError(unwritten(lock_path, error)) from error


def _is_one(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _compare(output: Path, note: Path, made_with: dict[str, Any]) -> None:
    try:
        before = json.loads(note.read_bytes())
        changed = [
            name for name in made_with if name != "model" and before.get(name, made_with[name]) != made_with[name]
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{str(note)!r} cannot be read; remove it if its answers may go on") from error
    if changed:
        name = changed[0].removesuffix("_digest")
        raise ConfigError(
            f"the answers in {str(output)!r} were made with {name} {before[name]!r}, and now it is "
            f"{made_with[name]!r}; give what was given then, name another output, or remove {str(note)!r} to mix them"
        )


def _digest(model: Path) -> str:
    """64 hex digits of a model: small files as a whole, of the others size, beginning, middle and end."""
    digest = sha256()
    try:
        for path in [model] if model.is_file() else sorted(one for one in model.iterdir() if one.is_file()):
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name if path != model else ''} {size} ".encode(errors="surrogateescape"))
                if size <= 3 * SAMPLE_BYTES:
                    digest.update(file.read())
                    continue
                for start in (0, size // 2, size - SAMPLE_BYTES):
                    file.seek(start)
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise ConfigError(f"the model {str(model)!r} cannot be read: {error.strerror}; name another one") from error
    return digest.hexdigest()


def _write(note: Path, made_with: dict[str, Any]) -> None:
    beside = note.with_name(f"{note.name}.new")
    try:
        beside.write_text(json.dumps(made_with, indent=1) + "\n", encoding="utf-8")
        beside.replace(note)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StoreError(unwritten(note, error)) from error
