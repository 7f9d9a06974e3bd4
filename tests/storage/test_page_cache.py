"""What the system tells about its memory of files, and what it is asked."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.page_cache import forget, is_held, refuse_fadvise, tell_nothing

from distkv.storage.disk import page_cache

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Of 100 pages; the fourth one is read, the others are on disk alone."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100 * PAGE))
    forget(path)
    descriptor = os.open(path, os.O_RDONLY)
    page_cache.read_nothing_ahead(descriptor)
    os.pread(descriptor, 10, 4 * PAGE)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("tells", [True, False])
def test_whether_a_part_is_held(file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tells: bool) -> None:
    """By a read that does not wait, which has a fast disk bring some of what is asked about; and where there is none,
    by a look that changes nothing."""
    if is_held(tmp_path / "file", 50 * PAGE):
        pytest.skip("this file system forgets no files")
    if not tells:
        tell_nothing(monkeypatch)
    for offset in (4 * PAGE, 4 * PAGE + 7, 5 * PAGE - 1, 100 * PAGE, 200 * PAGE + 1):
        assert page_cache.is_held(file, offset), offset
    on_disk = [page * PAGE - 1 for page in range(1, 5)] + [page * PAGE for page in range(5, 100)]
    for offset in on_disk:
        assert not page_cache.is_held(file, offset) or (tells and is_held(tmp_path / "file", offset)), offset


def test_large_parts_are_asked_for_bit_by_bit(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole pages of the system, which drops the end of a large request without a word."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, size, advice: asked.append((offset, size)))
    size = page_cache.REQUEST_BYTES
    page_cache.bring(file, PAGE + 7, 2 * size + 5)
    assert asked == [(PAGE, size), (PAGE + size, size), (PAGE + 2 * size, 12)]
    page_cache.bring(file, 98 * PAGE, 2**60)
    assert asked[3:] == [(98 * PAGE, 2 * PAGE)]


def test_a_refusal_is_no_error(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fadvise(monkeypatch)
    page_cache.bring(file, 0, 10)
    page_cache.read_nothing_ahead(file)
