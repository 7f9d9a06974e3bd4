"""What earlier runs of a batch have left: which lines need no answer any more, and files that can be gone on with."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from distkv.batch.input_file import Contents
from distkv.batch.line_file import unwritten
from distkv.batch.records import HEAD, Record, read_record, refused
from distkv.errors import ConfigError, StoreError
from distkv.values import shown


@dataclass
class Before:
    """What is there when a run begins."""

    left: set[str]  # ids that are to be answered
    num_answered: int
    num_failed: int  # lines that are in the error file and stay there


def restore(contents: Contents, output: Path, errors: Path, retries: bool) -> Before:
    """Makes both files ready to go on with: lines that were cut in the middle go, and so do errors that are to be tried
    again.

    Args:
        retries: whether all errors are tried again, and not only those that may have passed.

    Raises ConfigError for files of another input, StoreError when they cannot be read or written.
    """
    left = set(contents.ids)
    for _, record in _records(output, contents, is_output=True):
        if record.custom_id not in left:
            raise ConfigError(f"{str(output)!r} has two lines with the custom_id {shown(record.custom_id)}; remove one")
        left.remove(record.custom_id)
    num_answered = len(contents.ids) - len(left)
    num_failed = _rewrite(errors, contents, left, retries)
    return Before(left, num_answered, num_failed)


def _rewrite(errors: Path, contents: Contents, left: set[str], retries: bool) -> int:
    """Writes the error file anew, without what is tried again, and takes what stays there out of `left`; returns how
    many lines it has."""
    if not errors.exists() and not contents.faults:
        return 0
    beside, count = errors.with_name(f"{errors.name}.new"), 0
    try:
        with open(beside, "wb") as file:
            for number, message in contents.faults:
                count += 1
                file.write(refused(number, None, message).encode())
            for line, record in _records(errors, contents, is_output=False):
                if record.custom_id in left and not (retries or record.may_pass):
                    count += 1
                    left.remove(record.custom_id)
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(errors)
        if not count:
            errors.unlink()
    except OSError as error:
        raise StoreError(unwritten(errors, error)) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return count


def _records(path: Path, contents: Contents, is_output: bool) -> Iterator[tuple[bytes, Record]]:
    """The lines of a file that an earlier run may have written, each as it stands there and what it says. One that was
    cut at the end is left out, and taken off the output."""
    try:
        with open(path, "rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                record = _record(line)
                if record is None and _is_cut(line) and not file.read(1):
                    break
                if record is None:
                    raise ConfigError(
                        f"line {number} of {str(path)!r} is none of a batch's; remove it, or name another file"
                    )
                if record.custom_id not in contents.ids and (record.custom_id is not None or is_output):
                    raise ConfigError(
                        f"line {number} of {str(path)!r} has the custom_id {shown(record.custom_id)}, which the input "
                        "has not; name the output of this input, or a new one"
                    )
                start += len(line)
                yield line, record
            size = os.fstat(file.fileno()).st_size
        if is_output and start < size:
            os.truncate(path, start)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _is_cut(line: bytes) -> bool:
    """Whether this may be what is left of a line of a batch's, or what a disk has where it was to come."""
    return line.startswith(HEAD) or HEAD.startswith(line) or not line.strip(b"\0")


def _record(line: bytes) -> Record | None:
    """None for what is no whole line."""
    if not line.endswith(b"\n"):
        return None
    try:
        return read_record(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
