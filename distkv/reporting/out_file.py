"""Files of figures: whether they can be written is known before anything is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distkv.errors import ConfigError, StoreError


def check_out_file(path: Path | None) -> None:
    """Raises ConfigError when the file, if any, could not be written now."""
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):  # a device, say
        return
    is_new = not path.exists()
    try:
        with open(path, "ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}; name another file") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a StoreError of what goes wrong with the file in the meantime."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be written: {error.strerror}; the figures are above") from error
