"""The input file: read once before any work, to know what it has, and once more to answer it."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distkv.batch.requests import LineError, read_id
from distkv.errors import RequestError
from distkv.values import shown

MOST_LINE_BYTES = 64 * 2**20
BOM = b"\xef\xbb\xbf"
MOST_NAMES = 1000


@dataclass
class Contents:
    """What an input file has: the ids of its lines, and of lines without one the number and what is wrong."""

    ids: set[str] = field(default_factory=set)
    faults: list[tuple[int, str]] = field(default_factory=list)
    models: set[str | None] = field(default_factory=set)  # those that lines name, None for none, a thousand at most

    @property
    def num_lines(self) -> int:
        return len(self.ids) + len(self.faults)


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines that have something in them, None for one that is too long, with their numbers from 1 on. Raises
    RequestError when the file cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RequestError(f"the input {str(path)!r} is no regular file, and a batch reads it twice; save it first")
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MOST_LINE_BYTES + 1):
                number += 1
                if is_cut := len(line) > MOST_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MOST_LINE_BYTES)
                if number == 1:
                    line = line.removeprefix(BOM)
                if is_cut or (line := line.strip(b" \t\r\n")):
                    yield number, None if is_cut else line
    except OSError as error:
        raise RequestError(f"the input {str(path)!r} cannot be read: {error.strerror}") from error


def scan(path: Path, names: list[str]) -> Contents:
    """What the file has. Raises RequestError for a file without a request, and for an id that two lines have.

    Args:
        names: those that the model is served by, which are found however many others there are.
    """
    contents = Contents()
    for number, line in lines(path):
        try:
            if line is None:
                raise LineError(f"it has more than {MOST_LINE_BYTES >> 20} MiB")
            custom_id, model = read_id(line)
        except LineError as error:
            contents.faults.append((number, str(error)))
            continue
        if custom_id in contents.ids:
            raise RequestError(
                f"lines {_number_of(path, custom_id)} and {number} of {str(path)!r} both have the custom_id "
                f"{shown(custom_id)}; give each line one of its own"
            )
        contents.ids.add(custom_id)
        if len(contents.models) < MOST_NAMES or model is None or model in names:
            contents.models.add(model)
    if not contents.ids:
        why = "line {}: {}".format(*contents.faults[0]) if contents.faults else "it is empty"
        raise RequestError(f"the input {str(path)!r} has no line of a batch file ({why})")
    return contents


def lines_left(path: Path, left: set[str]) -> Iterator[tuple[int, str, bytes]]:
    """Number, id and text of the lines with these ids, in the order of the file. Raises RequestError when it cannot be
    read, or has changed so that some are not there any more.

    Args:
        left: the ids, of which each is taken out when its line comes.
    """
    for number, line in lines(path):
        try:
            custom_id = "" if line is None else read_id(line)[0]
        except LineError:
            continue
        if line is not None and custom_id in left:
            left.remove(custom_id)
            yield number, custom_id, line
    if left:
        raise RequestError(f"{_changed(path)}; {len(left)} lines are not there any more")


def _number_of(path: Path, custom_id: str) -> int:
    for number, line in lines(path):
        try:
            if line is not None and read_id(line)[0] == custom_id:
                return number
        except LineError:
            continue
    raise RequestError(_changed(path))


def _changed(path: Path) -> str:
    return f"the input {str(path)!r} has changed while it was read"
