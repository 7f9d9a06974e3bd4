"""A running engine's pages go to a file and come from one, while requests run."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.damage import flip_bit
from support.llms import PAGE_BYTES, PAGE_SIZE, idle_engine, tiered
from support.servers import save_talker

from distkv import LLM, CapacityError, ConfigError, RequestError, SamplingParams, StoreError
from distkv.cache_folders.import_cache import ExportedCache
from distkv.engine import cache_import
from distkv.engine.client import EngineClient
from distkv.frontend import live_cache

GREEDY = SamplingParams(max_tokens=4, temperature=0)
BOOK = [5 + index % 90 for index in range(10 * PAGE_SIZE)]
OTHER = [7 + index % 60 for index in range(6 * PAGE_SIZE)]


@pytest.fixture
def book(tiny_model: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A file with all pages of BOOK, and the answer to it of the engine that wrote it."""
    with tiered(tiny_model, (16, 16, 64), tmp_path / "one") as llm:
        [answer] = llm.generate([BOOK], GREEDY, use_tqdm=False)
        exported = llm.export_cache(tmp_path / "book.zarr", [BOOK, OTHER])
        assert [one.num_exported for one in exported.prompts] == [len(BOOK), 0] and exported.num_pages == 10
        with pytest.raises(RequestError, match="no page of that"):
            llm.export_cache(tmp_path / "other.zarr", BOOK, cache_salt="salt")
    return tmp_path / "book.zarr", answer


@pytest.mark.parametrize("part_pages", [1, 4, 100])
def test_a_running_engine_takes_pages_in(
    tiny_model: Path, tmp_path: Path, book: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, part_pages: int
) -> None:
    """In parts between steps of other requests; it and later engines find them."""
    path, expected = book
    monkeypatch.setattr(cache_import, "PART_BYTES", part_pages * PAGE_BYTES)
    with tiered(tiny_model, (16, 16, 64), tmp_path / "two") as llm:
        busy = threading.Thread(target=lambda: busy_with(llm))
        busy.start()
        imported = llm.import_cache(path, cache_salt="mine")
        busy.join()
        assert (imported.num_pages, imported.num_new) == (10, 10)
        assert llm.import_cache(path, cache_salt="mine").num_new == 0
        [unsalted] = llm.generate([BOOK], GREEDY, use_tqdm=False)
        [answer] = llm.generate([BOOK], GREEDY, cache_salt="mine", use_tqdm=False)
        assert unsalted.num_cached_tokens == 0 and answer.num_cached_tokens == len(BOOK) - PAGE_SIZE
        assert answer.outputs[0].token_ids == expected.outputs[0].token_ids
        idle_engine(llm).integrity_check()
    with tiered(tiny_model, (16, 16, 64), tmp_path / "two") as llm:
        [answer] = llm.generate([[*BOOK, 3]], GREEDY, cache_salt="mine", use_tqdm=False)
        assert answer.num_cached_tokens == len(BOOK)


def busy_with(llm: LLM) -> None:
    for _ in range(3):
        llm.generate([OTHER], SamplingParams(max_tokens=20), use_tqdm=False)


def test_pages_used_longest_ago_make_room(
    tiny_model: Path, tmp_path: Path, book: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the book that are there already do not, though they are older; of the book the last ones go first."""
    path, _ = book
    monkeypatch.setattr(cache_import, "PART_BYTES", PAGE_BYTES)
    with tiered(tiny_model, (16, 16, 12), tmp_path / "two") as llm:
        llm.generate([BOOK[: 3 * PAGE_SIZE]], GREEDY, use_tqdm=False)
        llm.generate([OTHER], GREEDY, use_tqdm=False)
    with tiered(tiny_model, (16, 16, 12), tmp_path / "two") as llm:
        assert llm.stats().disk_pages == 9
        assert llm.import_cache(path).num_new == 7
        assert llm.stats().disk_pages == 12
        llm.generate([[*range(40, 40 + 3 * PAGE_SIZE)]], GREEDY, use_tqdm=False)
        idle_engine(llm).integrity_check()
        [answer] = llm.generate([[*BOOK, 3]], GREEDY, use_tqdm=False)
        assert answer.num_cached_tokens == len(BOOK) - PAGE_SIZE


def test_a_disk_tier_that_is_too_small(tiny_model: Path, tmp_path: Path, book: tuple[Path, Any]) -> None:
    with tiered(tiny_model, (16, 16, 9), tmp_path / "small") as llm:
        with pytest.raises(CapacityError, match=f"10 pages and .* holds 9; raise disk_kv_bytes to {10 * PAGE_BYTES}"):
            llm.import_cache(book[0])
        assert llm.stats().disk_pages == 0


def test_a_file_is_opened_once_for_all_of_its_parts(
    tiny_model: Path, tmp_path: Path, book: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And closed after them, or when one fails."""
    num_open, num_opened, open_exported = 0, 0, cache_import.open_exported

    @contextmanager
    def count(path: Path) -> Iterator[Any]:
        nonlocal num_open, num_opened
        num_open, num_opened = num_open + 1, num_opened + 1
        try:
            with open_exported(path) as exported:
                yield exported
        finally:
            num_open -= 1

    monkeypatch.setattr(cache_import, "PART_BYTES", PAGE_BYTES)
    monkeypatch.setattr(cache_import, "open_exported", count)
    with tiered(tiny_model, (16, 16, 64), tmp_path / "two") as llm:
        assert llm.import_cache(book[0]).num_new == 10
        assert (num_open, num_opened) == (0, 1)
        engine = idle_engine(llm)
        with monkeypatch.context() as patch:
            patch.setattr(ExportedCache, "copy", None)
            with pytest.raises(TypeError):
                engine.import_pages(str(book[0]), "salt", 0)
        assert (num_open, num_opened) == (0, 2)
        engine.import_pages(str(book[0]), "salt", 0)
        assert (num_open, num_opened) == (1, 3), "of which nobody takes more"
    assert num_open == 0


def test_a_file_that_becomes_shorter_ends_an_import(
    tiny_model: Path, tmp_path: Path, book: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has put a shorter one in its place, which shows when another import comes between."""
    path, import_part, starts = book[0], live_cache._import_part, []

    def shorten_and_import(name: str, cache_salt: str | None, start: int, engine: EngineClient) -> tuple[int, int]:
        assert start not in starts, "it goes round"
        starts.append(start)
        if start == 4:
            shutil.rmtree(path)
            engine.import_pages(str(tmp_path / "short.zarr"), None, 0)
            (tmp_path / "short.zarr").rename(path)
        return import_part(name, cache_salt, start, engine)

    monkeypatch.setattr(cache_import, "PART_BYTES", PAGE_BYTES)
    monkeypatch.setattr(live_cache, "_import_part", shorten_and_import)
    with tiered(tiny_model, (16, 16, 64), tmp_path / "one") as llm:
        llm.export_cache(tmp_path / "short.zarr", [BOOK[: 3 * PAGE_SIZE]])
    with tiered(tiny_model, (16, 16, 64), tmp_path / "two") as llm:
        with pytest.raises(StoreError, match=r"book.zarr' has changed while it was taken in; import it again"):
            llm.import_cache(path)
        idle_engine(llm).integrity_check()


FAULTS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "damaged": (lambda path: flip_bit(path / "pages" / "c.9.0.0.1.0.0"), StoreError),
    "missing": (lambda path: (path / "pages" / "c.8.0.0.0.0.0").unlink(), StoreError),
    "not there": (lambda path: path.rename(path.with_name("elsewhere")), ConfigError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_of_a_damaged_file_is_taken_in(
    tiny_model: Path, tmp_path: Path, book: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path, _ = book
    monkeypatch.setattr(cache_import, "PART_BYTES", PAGE_BYTES)
    damage, error = FAULTS[fault]
    damage(path)
    with tiered(tiny_model, (16, 16, 64), tmp_path / "two") as llm:
        with pytest.raises(error):
            llm.import_cache(path)
        assert llm.stats().disk_pages == 0
        [answer] = llm.generate([BOOK], GREEDY, use_tqdm=False)
        assert answer.num_cached_tokens == 0


def test_engines_that_cannot(tiny_model: Path, tmp_path: Path, book: tuple[Path, Any]) -> None:
    path, _ = book
    with tiered(tiny_model, (16, 16, 0)) as llm:
        for call in (lambda: llm.import_cache(path), lambda: llm.export_cache(tmp_path / "no.zarr", BOOK)):
            with pytest.raises(ConfigError, match="set cache_dir"):
                call()
    talker = save_talker(tmp_path / "talker")
    with LLM(
        talker, cache_dir=tmp_path / "two", page_size=PAGE_SIZE, device_kv_bytes="1MiB", host_kv_bytes="1MiB"
    ) as llm:
        llm.generate([BOOK], GREEDY, use_tqdm=False)
        with pytest.raises(ConfigError, match=r"of no use .*: their weights differ"):
            llm.import_cache(path)
        with pytest.raises(RequestError, match="nothing was chosen; name prompts"):
            llm.export_cache(tmp_path / "no.zarr")
    assert not (tmp_path / "no.zarr").exists()


def test_a_session_goes_on_elsewhere_within_the_limits_there(tmp_path: Path) -> None:
    talker = save_talker(tmp_path / "talker")
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "device_kv_bytes": "1MiB", "host_kv_bytes": "1MiB"}

    def ask(llm: LLM, name: str, text: str) -> Any:
        [output] = llm.chat([{"role": "user", "content": text}], GREEDY, session=name, use_tqdm=False)
        return output

    with LLM(talker, cache_dir=tmp_path / "one", **sizes) as llm:
        ask(llm, "trip", "Let us plan a trip to Peru.")
        exported = llm.export_cache(tmp_path / "trip.zarr", sessions=["trip"])
        expected = ask(llm, "trip", "And if it rains?")
    assert exported.num_pages > 2 and exported.prompts[0].name == "session trip"
    with LLM(talker, cache_dir=tmp_path / "two", max_sessions=1, **sizes) as llm:
        ask(llm, "own", "Hello")
        with pytest.raises(CapacityError, match="max_sessions"):
            llm.import_cache(tmp_path / "trip.zarr")
        (tmp_path / "two" / "sessions" / "own.json").unlink()
        llm.import_cache(tmp_path / "trip.zarr")
        answer = ask(llm, "trip", "And if it rains?")
        assert answer.num_cached_tokens >= exported.num_tokens
        assert answer.prompt_token_ids == expected.prompt_token_ids and answer.outputs == expected.outputs
        with pytest.raises(ConfigError, match="there is another session trip"):
            llm.import_cache(tmp_path / "trip.zarr")
