"""What was read once goes to another machine as a file: whole and to the same weights, or not at all."""

import errno
import json
import os
import re
import shutil
import signal
import zipfile
from collections.abc import Callable
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import zarr
from support.damage import cut_short, flip_bit
from support.disks import description, file_size_limit
from support.llms import PAGE_SIZE
from support.pages import SPEC, random_page
from support.processes import run_code
from support.servers import save_talker
from typer.testing import CliRunner
from zarr.storage import LocalStore, ZipStore

from distkv import LLM, SamplingParams
from distkv.cache_folders import import_cache as import_module
from distkv.cache_folders.export_store import new_store, open_store
from distkv.commands.main import app
from distkv.errors import ConfigError, StoreError
from distkv.storage.disk.cache_folder import FolderLock
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.disk.page_arrays import ARRAY, DiskShare
from distkv.storage.disk.reopen import reopen
from distkv.storage.ledger.prefix_index import page_keys, root_key
from distkv.storage.pools.disk_pool import DiskPool
from distkv.storage.tier import Tier

NAME = "0123456789abcdef"
GREEDY = SamplingParams(max_tokens=6, temperature=0)
CHAINS = [list(range(100, 148)), [*range(100, 132), *range(500, 532)]]  # two pages in common, one more and two more
NUM_PAGES = 5


def distkv(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.strip()


def refused(*arguments: object) -> str:
    """The error of a command that is to fail."""
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    assert result.exception is not None
    return str(result.exception)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can chat."""
    return save_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two prefixes with pages in common, of which no model is needed, and one of another salt."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    folder = tmp_path / "from" / NAME
    folder.mkdir(parents=True)
    keep(folder, CHAINS, None)
    keep(folder, CHAINS[:1], "salt")
    return tmp_path / "from"


def keep(folder: Path, chains: list[list[int]], salt: str | None) -> None:
    reopen(folder, SPEC, 20, description())
    pool = DiskPool(SPEC, folder, 20, DiskShare.of_all(SPEC))
    with closing(Catalogue(folder)) as catalogue:
        for chain in chains:
            for index, key in enumerate(page_keys(root_key(description().fingerprint, salt), chain, SPEC.page_size)):
                if key.digest not in {one.key for one in catalogue.entries()}:
                    slot = len(catalogue.slots())
                    pool.store(slot, random_page(SPEC, slot))
                    crcs = pool.checksums(slot)
                    catalogue.update([], [Entry(slot, key.digest, key.parent, key.tokens, crcs, 1.0, index)])


def pages_of(folder: Path) -> dict[bytes, bytes]:
    """The bits of all pages that are listed, by their keys, which depend on tokens and salt."""
    with closing(Catalogue(folder, read_only=True)) as catalogue:
        entries = catalogue.entries()
    return {
        one.key: b"".join((folder / ARRAY / f"c.{one.slot}.0.0.{head}.0.0").read_bytes() for head in range(2))
        for one in entries
    }


@pytest.fixture(params=["book.zarr", "book.zarr.zip"])
def book(cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Its pages without a salt, as a file."""
    path = tmp_path / request.param
    code, text = distkv("export", path, "--cache-dir", cache, "--all")
    assert code == 0 and f"{NUM_PAGES} pages (80 tokens" in text, text
    assert path.stat().st_mode & 0o077 == 0, "others may not read what was said"
    return path


@pytest.fixture
def target(cache: Path, tmp_path: Path) -> Path:
    """Another machine's cache of the same model, with a page of its own."""
    (tmp_path / "to" / NAME).mkdir(parents=True)
    keep(tmp_path / "to" / NAME, [list(range(16))], None)
    return tmp_path / "to"


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.zarr", {}), ("a.zarr.zip", {"kv_cache_dtype": "int8"}), ("b.zarr.zip", {"disk_kv_codec": "lossless"})],
)
def test_what_one_engine_read_another_one_finds(
    talker: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """A text and a session, by engines in folders of their own."""
    text, first, second = "The quick brown fox jumps over the lazy dog. " * 3, "What is a fox?", "And a dog?"

    def engine(folder: str) -> LLM:
        sizes = {"device_kv_bytes": "2MiB", "host_kv_bytes": "2MiB", "disk_kv_bytes": "8MiB"}
        return LLM(talker, cache_dir=tmp_path / folder, page_size=PAGE_SIZE, num_threads=1, **sizes, **options)

    def ask(llm: LLM, question: str) -> Any:
        [output] = llm.chat([{"role": "user", "content": question}], GREEDY, session="talk", use_tqdm=False)
        return output

    with engine("one") as llm:
        [before] = llm.generate([text], GREEDY, use_tqdm=False)
        llm.generate(["Not to be in the file: " * 3], GREEDY, use_tqdm=False)
        ask(llm, first)
    (tmp_path / "text").write_text(text)
    chosen = "--prompt-file", tmp_path / "text", "--session", "talk"
    code, out = distkv("export", tmp_path / name, "--cache-dir", tmp_path / "one", *chosen)
    assert code == 0 and "session talk:" in out, out
    with engine("one") as llm:
        expected = ask(llm, second)

    error = refused("import", tmp_path / name, "--cache-dir", tmp_path / "two")
    assert "--model" in error and not (tmp_path / "two" / "sessions").exists()
    code, out = distkv("import", tmp_path / name, "--cache-dir", tmp_path / "two", "--model", talker)
    assert code == 0 and "pages taken in" in out, out
    with engine("two") as llm:
        [after] = llm.generate([text], GREEDY, use_tqdm=False)
        answer = ask(llm, second)
        [unknown] = llm.generate(["Not to be in the file: " * 3], GREEDY, use_tqdm=False)
    assert after.num_cached_tokens == len(before.prompt_token_ids) // PAGE_SIZE * PAGE_SIZE > 0
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
    assert answer.num_cached_tokens > 0 and answer.outputs[0].token_ids == expected.outputs[0].token_ids
    assert answer.prompt_token_ids == expected.prompt_token_ids and not unknown.num_cached_tokens


def test_a_reader_with_zarr_alone_finds_pages_and_tokens(cache: Path, book: Path) -> None:
    store = ZipStore(book, mode="r") if book.suffix == ".zip" else LocalStore(book)
    group: Any = zarr.open_group(store, mode="r")
    source: Any = zarr.open_array(cache / NAME / ARRAY, mode="r")
    with closing(Catalogue(cache / NAME, read_only=True)) as catalogue:
        slots = {(one.parent, one.tokens): one for one in catalogue.entries()}
    roots: dict[int, bytes] = {-1: root_key(description().fingerprint, None)}
    for row in range(NUM_PAGES):
        entry = slots[roots[int(group["parents"][row])], group["tokens"][row].tobytes()]
        roots[row] = entry.key
        assert group["pages"][row].tobytes() == source[entry.slot].tobytes()
        assert group["checksums"][row].tobytes() == entry.crc32c
    told = group.attrs["distkv"]
    assert told["pages"]["model"] == "one", "a path would tell of the machine"
    assert told["num_pages"] == NUM_PAGES and "salt" not in json.dumps(told)


def test_pages_that_are_there_stay_and_a_salt_is_of_the_importers_choosing(
    cache: Path, book: Path, target: Path
) -> None:
    own = pages_of(target / NAME)
    code, text = distkv("import", book, "--cache-dir", target)
    assert code == 0 and "5 of 5 pages taken in" in text and "6 pages are there now" in text, text
    code, text = distkv("import", book, "--cache-dir", target)
    assert code == 0 and "0 of 5 pages taken in" in text, text
    salted = cache / NAME
    without = {key: bits for key, bits in pages_of(salted).items() if key not in keys_of("salt")}
    assert pages_of(target / NAME) == own | without
    distkv("import", book, "--cache-dir", target, "--cache-salt", "mine")
    assert pages_of(target / NAME).keys() == own.keys() | without.keys() | keys_of("mine", CHAINS)
    assert distkv("verify", "--cache-dir", target) == (0, "11 pages read, all whole")


def keys_of(salt: str, chains: list[list[int]] = CHAINS[:1]) -> set[bytes]:
    root = root_key(description().fingerprint, salt)
    return {key.digest for chain in chains for key in page_keys(root, chain, SPEC.page_size)}


# --- what is damaged, of others, or has no room ---


def member(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Damage to one member, of a zip file too, which is made anew."""

    def damage(book: Path) -> None:
        folder = book
        if book.suffix == ".zip":
            folder = book.with_suffix(".folder")
            zipfile.ZipFile(book).extractall(folder)
        change(folder / name)
        if folder != book:
            book.unlink()
            with zipfile.ZipFile(book, "w") as file:
                for path in folder.rglob("*"):
                    file.write(path, path.relative_to(folder))

    return damage


def edit(*keys: str, value: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        content = inner = json.loads(path.read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(content))

    return change


TOLD = "attributes", "distkv"
LONG = "\x1b[2J" * 1000  # what a terminal would follow
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "page flipped": (member("pages/c.2.0.0.1.0.0", flip_bit), "the checksum of layer 1 is wrong"),
    "page cut short": (member("pages/c.4.0.0.0.0.0", cut_short), "has not the 1536 bytes"),
    "page missing": (member("pages/c.1.0.0.0.0.0", Path.unlink), "c.1.0.0.0.0.0.*(missing|has no)|has no .*c.1"),
    "tokens flipped": (member("tokens/c.0.0", flip_bit), "tokens is damaged"),
    "tokens missing": (member("tokens/c.0.0", Path.unlink), "missing|has no tokens"),
    "no tree": (member("parents/zarr.json", edit("shape", value=[4])), "metadata of parents"),
    "other dtype": (member("pages/zarr.json", edit("data_type", value="int32")), "metadata of pages"),
    "too many pages": (member("zarr.json", edit(*TOLD, "num_pages", value=10**12)), "tokens/c.0.0 is not of"),
    "no sizes": (member("zarr.json", edit(*TOLD, "pages", "num_layers", value=10**9)), "describes no exported cache"),
    "not described": (member("zarr.json", edit(*TOLD, value=7)), "describes no exported cache"),
    "later format": (member("zarr.json", edit(*TOLD, "format", value=2)), "format 2 and this distkv reads format 1"),
    "other weights": (member("zarr.json", edit(*TOLD, "pages", "fingerprint", value="f" * 64)), "weights differ"),
    "other kernels": (
        member("zarr.json", lambda path: [edit(*TOLD, "pages", field, value="f" * 64)(path)
                                          for field in ("fingerprint", "kernels")]),
        "kernels is f* in the file and  here",
    ),
    "a session's name": (member("zarr.json", edit(*TOLD, "sessions", value={"../x": {}})), "session is '../x'"),
    "a response's name": (
        member("zarr.json", edit(*TOLD, "sessions", value={"resp_" + "a" * 32: {}})), "the name of a server's response",
    ),
    "a session's content": (member("zarr.json", edit(*TOLD, "sessions", value={"x": {"version": 1}})), "is damaged"),
    "a long dtype": (member("zarr.json", edit(*TOLD, "pages", "dtype", value=LONG)), "describes no exported cache"),
    "a long type of node": (member("tokens/zarr.json", edit("node_type", value=LONG)), "metadata of tokens"),
    "a long name of kernels": (
        member("zarr.json", lambda path: [edit(*TOLD, "pages", field, value=LONG)(path)
                                          for field in ("fingerprint", "kernels", "model")]),
        "kernels is",
    ),
    "a long field of a session": (member("zarr.json", edit(*TOLD, "sessions", value={"x": {LONG: 1}})), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "book"), [*zip(FAULTS, cycle(["book.zarr", "book.zarr.zip"]), strict=False)], indirect=["book"]
)
def test_a_file_that_cannot_be_used_changes_nothing(book: Path, target: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(book)
    before = pages_of(target / NAME)
    error = refused("import", book, "--cache-dir", target)
    assert re.search(message, error), error
    assert len(error) < 1000 and "\x1b" not in error, "what a file says is not told at length, and moves no terminal"
    assert pages_of(target / NAME) == before
    assert distkv("verify", "--cache-dir", target) == (0, "1 pages read, all whole")


@pytest.mark.parametrize("book", ["book.zarr.zip"], indirect=True)
def test_zip_files_that_are_none_of_ours(book: Path, target: Path) -> None:
    folder = book.with_suffix(".folder")
    zipfile.ZipFile(book).extractall(folder)
    with zipfile.ZipFile(book, "w", zipfile.ZIP_DEFLATED) as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder))
    assert "compressed" in refused("import", book, "--cache-dir", target)
    cut_short(book)
    assert "no whole zip file" in refused("import", book, "--cache-dir", target)


@pytest.mark.parametrize("book", ["book.zarr"], indirect=True)
def test_a_link_in_a_folder_is_not_followed(book: Path, target: Path) -> None:
    chunk = book / "pages" / "c.0.0.0.0.0.0"
    chunk.rename(book / "elsewhere")
    chunk.symlink_to(book / "elsewhere")
    assert "no plain file" in refused("import", book, "--cache-dir", target)


def test_a_cache_in_use(cache: Path, book: Path, target: Path, tmp_path: Path) -> None:
    """It can be read, and not changed."""
    lock = FolderLock(target / NAME)
    assert "in use by process" in refused("import", book, "--cache-dir", target)
    lock.release()
    lock = FolderLock(cache / NAME)
    assert distkv("export", tmp_path / "beside.zarr", "--cache-dir", cache, "--all")[0] == 0
    lock.release()


def test_a_full_disk(cache: Path, book: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half written is left on either side."""
    before = pages_of(target / NAME)
    write = import_module.replace_file

    def limited(path: Path, content: bytes) -> None:
        if len(list(path.parent.glob("c.*"))) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(import_module, "replace_file", limited)
        assert "No space left on device), and none was taken in" in refused("import", book, "--cache-dir", target)
    with file_size_limit(SPEC.page_bytes_in(Tier.DISK) // SPEC.num_kv_heads - 1):
        out = tmp_path / f"again{book.suffix}"
        assert "cannot be written" in refused("export", out, "--cache-dir", cache, "--all")
    assert not [path for path in tmp_path.iterdir() if "again" in path.name]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * SPEC.page_bytes - 1))
    assert f"take {5 * SPEC.page_bytes} bytes" in refused("import", book, "--cache-dir", target)
    assert pages_of(target / NAME) == before
    assert distkv("verify", "--cache-dir", target) == (0, "1 pages read, all whole")


@pytest.mark.parametrize("book", ["book.zarr.zip"], indirect=True)
def test_an_import_that_is_killed(book: Path, target: Path) -> None:
    """While it writes pages: the cache has what it had, and the next import clears up and takes all in."""
    before = pages_of(target / NAME)
    result = run_code(KILLED, book, target)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert pages_of(target / NAME) == before and len(list((target / NAME / ARRAY).glob("c.*"))) > 2
    assert distkv("import", book, "--cache-dir", target)[0] == 0
    assert distkv("verify", "--cache-dir", target) == (0, "6 pages read, all whole")


KILLED = """
import sys
from support.kill_points import kill_at
from distkv.cache_folders import import_cache as import_module
from distkv.commands.main import app
kill_at("os.rename", 8)
app(["cache", "import", sys.argv[1], "--cache-dir", sys.argv[2]])
"""


def test_what_cannot_be_exported(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "book.zarr.zip"
    assert "nothing was chosen" in refused("export", out, "--cache-dir", cache)
    assert "ends neither in .zarr" in refused("export", tmp_path / "book.tar", "--cache-dir", cache, "--all")
    assert "no page of that" in refused("export", out, "--cache-dir", cache, "--all", "--cache-salt", "other")
    flip_bit(cache / NAME / ARRAY / "c.1.0.0.0.0.0")
    assert "verify --repair" in refused("export", out, "--cache-dir", cache, "--all")
    assert not out.exists()
    out.write_text("mine")
    assert "is there already" in refused("export", out, "--cache-dir", cache, "--all")
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["book.zarr", "book.zarr.zip"])
def test_of_two_exports_to_one_place_the_first_to_end_is_there(tmp_path: Path, name: str) -> None:
    """Both by one process, as by processes of containers, whose numbers are the same."""
    out = tmp_path / name
    with pytest.raises(ConfigError, match=f"{name}' is there already"), new_store(out) as put:
        put("pages/x", b"of the first")
        with new_store(out) as other:
            other("pages/x", b"of the second")
        put("pages/y", b"of the first")
    with open_store(out) as store:
        assert store.read("pages/x") == b"of the second"
    assert list(tmp_path.iterdir()) == [out]
    assert out.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["book.zarr", "book.zarr.zip"])
def test_an_export_that_is_killed_stops_no_other(tmp_path: Path, name: str) -> None:
    """Though the next process may have its number."""
    out = tmp_path / name
    for is_dir in (True, False):
        left = tmp_path / f".{name}.{os.getpid()}.partial"
        left.mkdir() if is_dir else left.touch()
        with new_store(out) as put:
            put("pages/x", b"content")
        assert left.exists() and out.exists()
        left.rmdir() if is_dir else left.unlink()
        shutil.rmtree(out) if out.is_dir() else out.unlink()


@pytest.mark.parametrize("name", ["book.zarr", "book.zarr.zip"])
def test_an_export_that_cannot_be_moved_to_its_place_leaves_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StoreError, match="cannot be written: Input/output error"), new_store(tmp_path / name) as put:
        put("pages/x", b"content")
    assert not list(tmp_path.iterdir())


def test_another_models_pages_are_refused(talker: Path, book: Path, tmp_path: Path) -> None:
    """By the weights' own digest; nothing is made in the cache folder."""
    error = refused("import", book, "--cache-dir", tmp_path / "new", "--model", talker)
    assert "num_layers is 3 in the file and 2 here" in error and not (tmp_path / "new").exists()
