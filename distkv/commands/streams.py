"""stdin, stdout and stderr as a shell may hand them over: closed, full, without a reader, in some other encoding."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from distkv.errors import ConfigError, RequestError


class Stdout(io.TextIOWrapper):
    """Remembers why it could not be written; an answer may have characters that its encoding has not."""

    def __init__(self, stream: io.TextIOWrapper):
        """In the place of `stream`."""
        super().__init__(
            stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )  # fmt: skip
        self.failure: OSError | None = None

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def guarded() -> Iterator[Stdout | None]:
    """Makes the three streams usable, and yields stdout; what is left to be written to it or to stderr is written at
    the end, or dropped when that fails. Yields None where stdout is something without bytes below it, such as StringIO,
    which stays as it is. Raises ConfigError when stdout is closed.

    In the place of a closed descriptor there is /dev/null: else a file that is opened later would get its number, and
    what a library prints would go into that file.
    """
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)  # which a child inherits
            if null > 2:
                os.close(null)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115, it lasts as long as the process
    if sys.stdout is None:
        raise ConfigError("stdout is closed; give it a file, or /dev/null")
    if not isinstance(sys.stdout, io.TextIOWrapper):
        yield None
        return
    before = sys.stdout
    sys.stdout = stdout = Stdout(before)
    try:
        yield stdout
    finally:
        sys.stdout = before
        for stream in (stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                _drop(stream)
        stdout.detach()


def complain(message: str) -> None:
    """An error as one line on stderr."""
    note(f"distkv: error: {' '.join(message.split())}")


def note(line: str) -> None:
    """One line on stderr, if that takes it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    """Has what could not be written go nowhere; Python would try once more at its end, and call that an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def check_stdin(cure: str) -> None:
    """Raises RequestError, with the cure, when stdin is closed."""
    if sys.stdin is None:
        raise RequestError(f"stdin is closed; {cure}")


def ask(prompt: str) -> str | None:
    """The next line of stdin, after a prompt on stdout; None at the end. Raises RequestError when it cannot be read."""
    try:
        line = input(prompt)
        line.encode()  # in some locales Python lets bytes that are none of its encoding pass as lone surrogates
        return line
    except EOFError:
        return None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise RequestError(f"a line of stdin is not {error.encoding}; convert it first") from error
    except OSError as error:
        if isinstance(sys.stdout, Stdout) and sys.stdout.failure is not None:
            raise
        raise RequestError(f"stdin cannot be read: {error.strerror}") from error


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """A prompt that was given, or that a file has; with neither that of stdin. Raises RequestError for both, and for
    what cannot be read."""
    if prompt is not None and prompt_file is not None:
        raise RequestError("--prompt and --prompt-file were both given; give one of them")
    if prompt is not None:
        return prompt
    if prompt_file is None:
        check_stdin("give the prompt with --prompt or --prompt-file")
    source = "stdin" if prompt_file is None else str(prompt_file)
    try:
        content = sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise RequestError(f"the prompt file {source!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt from {source!r} is not UTF-8 (byte {error.start}); convert it first") from error
