"""What a job is shipped: the files of a folder, and distkv itself."""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from distkv.errors import ConfigError

MOST_BYTES = 256 << 20  # of a folder; Ray takes twice that, and every node unpacks it
JOB_FILE = ".distkv-job"
OWN = PurePosixPath("distkv")  # the package that a job gets from here
MOST_NAMED = 5  # files that are named when there are too many bytes
IGNORE_FILES = (".gitignore", ".rayignore")
NEVER = (
    ".git", ".hg", ".svn", ".venv", "venv", "__pycache__", "*.egg-info", ".mypy_cache", ".pytest_cache", ".ruff_cache",
    ".hypothesis", ".ipynb_checkpoints", ".tox", "node_modules",
)  # fmt: skip
"""What no job wants of a folder. Weights are not among them: a model that lies there may be what the job is to run."""


@dataclass(frozen=True)
class Packed:
    """A file to ship, or a folder that has none: where it lies, and its path in the working dir."""

    source: Path
    path: PurePosixPath
    size: int


def files_of(folder: Path) -> list[Packed]:
    """The files of a folder that a job gets, by path: without what `NEVER` and the .gitignore and .rayignore files in
    it say, and without a `distkv` package, in whose place the job has the one that submits it.

    Raises ConfigError when there is no such folder, a file cannot be read, or they are more than `MOST_BYTES`.
    """
    if not folder.is_dir():
        raise ConfigError(f"the working dir {str(folder)!r} is not a folder; give one with --working-dir, or a .zip")
    rules = [(PurePosixPath(), GitIgnoreSpec.from_lines(NEVER))]
    files = sorted(_walk(folder, PurePosixPath(), rules, ()), key=lambda one: one.path)
    total = sum(one.size for one in files)
    if total > MOST_BYTES:
        biggest = sorted(files, key=lambda one: -one.size)[:MOST_NAMED]
        names = ", ".join(f"{one.path} ({_megabytes(one.size)})" for one in biggest)
        raise ConfigError(
            f"the working dir {str(folder)!r} has {_megabytes(total)} to upload and at most {_megabytes(MOST_BYTES)} "
            f"are sent; the biggest files are {names}: name what the job does not need in a .rayignore there (models "
            "are read from a path that every node has), or give another --working-dir"
        )
    return files


def write_zip(files: list[Packed], job: str, target: Path) -> None:
    """Packs what a job gets, and a file with its name: Ray keeps one folder for all equal packages, and a job that
    writes needs one of its own.

    Raises ConfigError for a file that cannot be read."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(JOB_FILE, job)
        for one in files:
            if one.source.is_dir():
                archive.mkdir(str(one.path))
                continue
            info = zipfile.ZipInfo(str(one.path))
            info.compress_type = zipfile.ZIP_DEFLATED
            try:
                info.external_attr = os.stat(one.source).st_mode << 16
                with one.source.open("rb") as source, archive.open(info, "w") as packed:
                    shutil.copyfileobj(source, packed)
            except FileNotFoundError:  # it has gone since it was found
                continue
            except OSError as error:
                raise _unreadable(one.path, error) from error


def stage_distkv(folder: Path) -> Path:
    """Copies the distkv that runs here into a folder, with what its links lead to and the kernels that are built.

    Returns the package's folder, which `py_modules` takes."""
    import distkv

    [source] = distkv.__path__
    target = folder / "distkv"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.lock", "*.building"))
    return target


def _walk(
    folder: Path, inside: PurePosixPath, rules: list[tuple[PurePosixPath, GitIgnoreSpec]], above: tuple[str, ...]
) -> Iterator[Packed]:
    real = os.path.realpath(folder)
    rules = [*rules, *_rules_of(folder, inside)]
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:  # it has just gone
        return
    except OSError as error:
        raise _unreadable(inside, error) from error
    for entry in entries:
        path = inside / entry.name
        is_folder = entry.is_dir()
        if _is_ignored(path, is_folder, rules) or (path == OWN and (folder / OWN / "__init__.py").is_file()):
            continue
        if not _is_text(entry.name):
            raise ConfigError(
                f"{os.fsencode(path)!r} in the working dir has a name that is not UTF-8; rename it, or give another "
                "--working-dir"
            )
        if is_folder:
            if os.path.realpath(entry.path) not in (*above, real):  # a link that leads back
                inner = list(_walk(Path(entry.path), path, rules, (*above, real)))
                yield from inner or [Packed(Path(entry.path), path, 0)]
        elif entry.is_file():  # and not a socket, a pipe or a link that leads nowhere
            with suppress(FileNotFoundError):
                yield Packed(Path(entry.path), path, entry.stat().st_size)


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _rules_of(folder: Path, inside: PurePosixPath) -> Iterator[tuple[PurePosixPath, GitIgnoreSpec]]:
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            try:
                lines = (folder / name).read_text(encoding="utf-8").splitlines()
                yield inside, GitIgnoreSpec.from_lines(lines)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{str(inside / name)!r} cannot be read: {error}; mend it") from error


def _is_ignored(path: PurePosixPath, is_folder: bool, rules: list[tuple[PurePosixPath, GitIgnoreSpec]]) -> bool:
    """What the last rule says that says anything: deeper folders go before their parents, .rayignore before .gitignore,
    and so can take back what those ignore."""
    for base, rule in reversed(rules):
        inside = path.relative_to(base)
        found = rule.check_file(f"{inside}/" if is_folder else inside).include
        if found is not None:
            return found
    return False


def _unreadable(path: PurePosixPath, error: OSError) -> ConfigError:
    return ConfigError(
        f"{str(path)!r} in the working dir cannot be read: {error.strerror}; name it in a .rayignore there, or give "
        "another --working-dir"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
