"""What commands write beside stdout: files of figures, and folders that last as long as a measurement."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

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


@contextmanager
def temporary_folder(inside: Path | None = None) -> Iterator[Path]:
    """A folder of its own, in `inside`, which is made if need be, or where the system has such folders. Raises
    ConfigError when there can be none."""
    try:
        if inside is not None:
            inside.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix="distkv-", dir=inside)
    except OSError as error:
        where = "TMPDIR" if inside is None else f"{str(inside)!r}"
        raise ConfigError(f"no folder can be made in {where}: {error.strerror}; name another one") from error
    with folder as path:
        yield Path(path)
