"""The file of a trace, as Chrome's tracing and Perfetto read it: a JSON array of events."""

import fcntl
import logging
import os
from pathlib import Path

from distkv.errors import ConfigError

log = logging.getLogger(__name__)

END = b"\n]\n"


class TraceFile:
    """Whole after every `write`, so that a process which is killed leaves a file that opens. One engine at a time
    writes to it; what goes wrong with the file ends the trace and nothing else."""

    def __init__(self, path: Path):
        """Empties the file, or makes it. Raises ConfigError when it cannot be written, or another engine does."""
        self._path = path
        self._size = 0
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)  # the last: a pipe has no reader
        except OSError as error:
            raise ConfigError(f"the trace {str(path)!r} cannot be written: {error.strerror}; name another") from error
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115, it lasts as long as the engine
        try:
            if not path.is_file():
                raise ConfigError(f"the trace {str(path)!r} is not a file; name another")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"another engine writes the trace {str(path)!r}; name another file") from error
            self._file.truncate()
        except BaseException:
            self._file.close()
            raise

    def write(self, events: bytes) -> None:
        """Adds JSON objects that are separated by commas, at least one."""
        if self._file.closed:
            return
        try:
            self._file.seek(self._size - len(END) if self._size else 0)
            content = (b",\n" if self._size else b"[\n") + events + END
            if self._file.write(content) < len(content):
                raise OSError(0, "it takes no more")
            self._size = self._file.tell()
        except OSError as error:
            log.warning("the trace %s cannot be written any more: %s", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        """A second call does nothing."""
        self._file.close()
