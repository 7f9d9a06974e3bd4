"""What commands write beside stdout: files of figures, and folders that last as long as a measurement."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from distkv.errors import ConfigError, StoreError


def check_out_file(path: Path | None) -> None:
    """Raises ConfigError when the file, if any, could not be written now. It is left as it is; where it is not there
    its folder is tried by a file without a name, since another process may make it just then."""
    if path is None:
        return
    target = Path(os.path.realpath(path))  # a link may lead to a file that is not there yet
    try:
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            TemporaryFile(dir=target.parent).close()
        else:
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # opening something else may have an effect, a pipe, say
                os.close(os.open(target, os.O_WRONLY))
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}; name another file") from error


def check_plot_file(path: Path | None) -> None:
    """The same for a picture that --plot asks for; raises ConfigError too when that is no .png."""
    if path is not None and path.suffix != ".png":
        raise ConfigError(f"--plot {str(path)!r} is not a .png; name one")
    check_out_file(path)


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
