"""Faults of the disk tier's files and of the disk below them, under load and between two runs."""

import errno
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from reliability.bench import PAGE, Bench, Setting
from reliability.driver_process import DriverProcess
from reliability.faults import fault
from reliability.folder_damage import ANY, OF_CHUNKS, chunks, damage, immutable, put_back, records
from reliability.trial import Trial

PAGE_BYTES = 2 * 2 * 3 * PAGE * 16 * 4
COLD = Setting(options=(("device_kv_bytes", 60 * PAGE_BYTES), ("host_kv_bytes", 30 * PAGE_BYTES)))
"""Six requests take up to 200 pages: most of them are streamed from disk."""
NO_ROOM = r"CapacityError|StoreError"


def restart(bench: Bench) -> DriverProcess:
    """Ends the engine in peace and starts another one on its folder."""
    if (driver := bench.drop_driver()) is not None:
        assert driver.close() is None
        driver.end()
    return bench.driver


@fault("chunks-damaged", "Chunk files damaged under load: bits, lengths, removed, swapped", 30)
def _damage_chunks(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    for _ in range(3):
        trial.record.moment += ": " + damage(trial.random, chunks(bench.cache), OF_CHUNKS, 8)
        bench.driver.listen(lambda: load.is_done, 0.1)
    trial.finish(bench, load, moment)


@fault("chunks-older", "Chunk files of older pages put back under load", 10)
def _put_back_chunks(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    driver = bench.driver
    before = {path: path.read_bytes() for path in chunks(bench.cache)}
    other = trial.load(bench)
    driver.finish(other)
    load = trial.load(bench)
    moment = trial.await_moment(driver, load)
    trial.record.moment += ": " + put_back(before)
    trial.finish(bench, load, moment)
    trial.compare(bench, other)


@fault("records-damaged", "Catalogue, model.json, zarr.json damaged under load, then a restart", 12)
def _damage_records(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    trial.record.moment += ": " + damage(trial.random, records(bench.cache), ANY, 2)
    trial.finish(bench, load, moment)
    again = trial.load(bench, restart(bench))
    trial.finish(bench, again)


@fault("folder-damaged", "Any files of the folder damaged between two runs", 15)
def _damage_folder(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    driver = bench.driver
    assert driver.close() is None
    driver.end()
    bench.drop_driver()
    trial.record.moment = damage(trial.random, records(bench.cache), ANY, trial.random.choice([1, 2, 4]))
    trial.record.moment += "; " + damage(trial.random, chunks(bench.cache), OF_CHUNKS, 20)
    load = trial.load(bench)
    trial.finish(bench, load)


@fault("disk-full", "Another program fills the disk (a small tmpfs) under load", 8)
def _fill_disk(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    with own_driver(trial, bench, small_disk(bench.folder / "small")) as (driver, folder):
        load = trial.load(bench, driver)
        moment = trial.await_moment(driver, load)
        fill(folder / "other")
        driver.listen(lambda: load.is_done, trial.random.random() * 3)
        (folder / "other").unlink()
        trial.finish_and_go_on(bench, driver, load, moment, NO_ROOM)


@fault("disk-errors", "Reads and writes of pages fail with EIO, one in three for a second", 8)
def _fail(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    sign = bench.folder / "fails"
    with own_driver(trial, bench, plain_folder(bench.folder / "failing"), FAILING.format(str(sign))) as (driver, _):
        load = trial.load(bench, driver)
        moment = trial.await_moment(driver, load)
        sign.touch()
        driver.listen(lambda: load.is_done, 1.0)
        sign.unlink()
        trial.finish_and_go_on(bench, driver, load, moment, NO_ROOM)


@fault("read-only", "All of the folder becomes immutable under load, for a second", 8)
def _lock_out(trial: Trial) -> None:
    bench = trial.bench_of(COLD)
    load = trial.load(bench)
    moment = trial.await_moment(bench.driver, load)
    [folder] = {path.parents[1] for path in chunks(bench.cache)}
    with immutable(folder):
        bench.driver.listen(lambda: load.is_done, 1.0)
    trial.finish(bench, load, moment, NO_ROOM)
    again = trial.load(bench, restart(bench))
    trial.finish(bench, again)


FAILING = """
import errno, os, pathlib, random
from distkv.storage.pools import disk_pool

preadv, replace_file = os.preadv, disk_pool.replace_file
sign, rng = pathlib.Path({!r}), random.Random(1)

def fail(path):
    if sign.exists() and rng.random() < 1 / 3:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

def failing_read(descriptor, *arguments):
    fail(None)
    return preadv(descriptor, *arguments)

def failing_write(path, content, *arguments):
    fail(str(path))
    replace_file(path, content, *arguments)

os.preadv, disk_pool.replace_file = failing_read, failing_write
"""
"""A store that fails where distkv reads and writes pages."""


@contextmanager
def own_driver(
    trial: Trial, bench: Bench, place: AbstractContextManager[Path], prelude: str = ""
) -> Iterator[tuple[DriverProcess, Path]]:
    """A driver whose engine has its cache folder in another place, which is ended in peace."""
    assert bench.known or bench.driver
    with place as folder:
        driver = bench.new_driver(prelude=prelude)
        driver.start(bench.model, bench.options | {"cache_dir": str(folder)})
        yield driver, folder
        if (error := driver.close()) is not None:
            trial.record.unexplained.append(f"closing: {error}")
        driver.end()


@contextmanager
def plain_folder(folder: Path) -> Iterator[Path]:
    """A folder like any other."""
    yield folder


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own with room for some 170 pages; needs the right to mount."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={200 * PAGE_BYTES}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file: Path) -> None:
    """Takes all room that is left."""
    with file.open("wb", buffering=0) as opened:
        try:
            while True:
                opened.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
