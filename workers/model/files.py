"""What is told of a file of a model folder that cannot be read."""

import errno
import os
from pathlib import Path

from distkv.workers.errors import ConfigError

CURES = {
    errno.ENOENT: "it is not there: fetch it again",
    errno.EACCES: "let this user read it",
    errno.EPERM: "let this user read it",
}


def cannot_read(path: Path, error: OSError) -> ConfigError:
    """The error of a file, in a folder or by itself, that the system refused to read, by the cause that it gave."""
    cause = os.strerror(error.errno) if error.errno else str(error)
    cure = CURES.get(error.errno or 0, "see to it, or give the path of another folder")
    return ConfigError(f"{str(error.filename or path)!r} cannot be read ({cause}); {cure}")
