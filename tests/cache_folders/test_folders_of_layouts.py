"""What looks after cache folders, where layouts with stages and parts of pages have written there."""

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support.damage import flip_bit
from support.layouts import SPEC, page_of, shares, start
from torch import Tensor
from typer.testing import CliRunner

from distkv.commands.main import app
from distkv.storage.disk.cache_folder import DESCRIPTION
from distkv.storage.disk.catalogue import Catalogue, Entry
from distkv.storage.ledger.prefix_index import page_keys, root_key
from distkv.storage.page_spec import PageSpec

NAME = "0123456789abcdef"


def distkv(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    return result.exit_code, result.output


def keep(folder: Path, spec: PageSpec, num_parts: int, layouts: list[tuple[int, int]]) -> dict[int, Tensor]:
    """A prefix of which each layout, by numbers of stages and of ranks, has written a page; its pages by slot."""
    keys = page_keys(root_key(NAME * 4, None), list(range(len(layouts) * 16 * num_parts)), 16 * num_parts)
    pages: dict[int, Tensor] = {}
    entries: dict[int, bytes] = {}
    for slot, ((stages, size), key) in enumerate(zip(layouts, keys, strict=True)):
        ranks = start(folder, shares(spec, stages, size, num_parts), spec)
        ranks.adopt(entries)
        pages[slot] = page_of(spec, slot, num_parts)
        entries[slot] = ranks.write(slot, pages[slot])
        ranks.close()
        with closing(Catalogue(folder)) as catalogue:
            catalogue.update([], [Entry(slot, key.digest, key.parent, key.tokens, entries[slot], 1.0, slot)])
    return pages


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_export_makes_whole_files_of_all_layouts(tmp_path: Path, codec: str, num_parts: int) -> None:
    """And whoever imports them reads them with any layout."""
    spec = replace(SPEC, disk_codec=codec)
    pages = keep(tmp_path / "one" / NAME, spec, num_parts, [(2, 1), (1, 3), (3, 2)])
    code, text = distkv("export", tmp_path / "book.zarr", "--cache-dir", tmp_path / "one", "--all")
    assert code == 0 and f"{len(pages)} pages ({len(pages) * 16 * num_parts} tokens" in text, text
    group: Any = zarr.open_group(tmp_path / "book.zarr", mode="r")
    for slot, page in pages.items():
        whole = np.concatenate([*page.reshape(num_parts, *spec.page_shape).numpy()], axis=3)
        assert group["pages"][slot].tobytes() == whole.tobytes()
    keep(tmp_path / "two" / NAME, spec, num_parts, [(2, 1)])
    code, text = distkv("import", tmp_path / "book.zarr", "--cache-dir", tmp_path / "two")
    assert code == 0, text
    with closing(Catalogue(tmp_path / "two" / NAME, read_only=True)) as catalogue:
        entries = {entry.slot: entry for entry in catalogue.entries()}
    ranks = start(tmp_path / "two" / NAME, shares(spec, 3, 1, num_parts), spec)
    assert ranks.adopt({slot: entry.crc32c for slot, entry in entries.items()}) == set(entries)
    for slot, entry in entries.items():
        ranks.read(slot, pages[entry.index])
    ranks.close()


def test_verify_reads_the_files_of_all_layouts(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    keep(folder, SPEC, 2, [(2, 1), (1, 1), (3, 1)])
    code, text = distkv("verify", "--cache-dir", tmp_path)
    assert code == 0 and "3 pages read, all whole" in text, text
    (folder / DESCRIPTION).unlink()
    code, text = distkv("verify", "--cache-dir", tmp_path)
    assert code == 0 and "3 pages read" in text, text
    flip_bit(folder / "kv.layers-2-3.zarr" / "c.2.0.0.1.1.0")
    (folder / "kv.layers-3-5.zarr" / "zarr.json").write_text("{")
    (folder / "kv.layers-0-2.zarr" / "c.7.0.0.1.1.0").write_bytes(b"not listed")
    code, text = distkv("verify", "--cache-dir", tmp_path)
    assert code == 1 and "c.2.0.0.1.1.0 is damaged" in text and "c.7.0.0.1.1.0" in text, text
    assert "kv.layers-3-5.zarr' cannot be read" in text, text
    assert distkv("verify", "--repair", "--cache-dir", tmp_path)[0] == 1
    code, text = distkv("verify", "--cache-dir", tmp_path)
    assert code == 0 and "2 pages read, all whole" in text, text
    code, text = distkv("prune", "--max-bytes", "0", "--cache-dir", tmp_path)
    assert code == 0 and "2 pages given up" in text and not list(folder.glob("*.zarr/c.*")), text


def test_verify_leaves_what_lies_on_the_disks_of_other_nodes(tmp_path: Path) -> None:
    """Of two stages the first one has its disk here, and of two pages the second one is damaged."""
    layouts = [(2, 1), (2, 1)]
    keep(tmp_path / "both" / NAME, SPEC, 1, layouts)
    shutil.rmtree(tmp_path / "both" / NAME / "kv.layers-3-5.zarr")
    code, text = distkv("verify", "--cache-dir", tmp_path / "both")
    assert code == 0 and "lie on the disks of other nodes, or are lost" in text and "2 pages read" in text, text
    flip_bit(tmp_path / "both" / NAME / "kv.layers-0-2.zarr" / "c.1.0.0.2.0.0")
    code, text = distkv("verify", "--repair", "--cache-dir", tmp_path / "both")
    assert code == 1 and "1 pages taken out" in text, text
