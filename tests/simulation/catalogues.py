"""The catalogue of a simulated disk: the real one, in SQLite, which may be locked, damaged or left in any state."""

import zlib
from array import array
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation.disk import Disk
from simulation.model import VALUE_BYTES, PlainModel
from simulation.world import World

from distkv.engine import catalogue_writer, request_meter, saving, scheduler
from distkv.errors import StoreError
from distkv.storage.disk import catalogue as catalogue_module
from distkv.storage.disk.cache_folder import CATALOGUE, DamagedError
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.ledger.prefix_index import page_key

if TYPE_CHECKING:
    from simulation.node import Node


class SimulatedCatalogue(Catalogue):
    """Is written while its process lives."""

    def __init__(self, node: "Node", folder: Path, read_only: bool = False, wait: float = 0.0):
        assert node.process is not None
        self._node, self._process = node, node.process
        self._process.point("opening the catalogue")
        super().__init__(folder, read_only, wait)
        self._process.at_death.append(self.close)

    def update(self, *arguments: Any) -> None:
        """Takes some entries out and others in; a process may end before and after."""
        self._process.point("before the catalogue is written")
        if self._node.is_locked:
            self._node.is_true = False
            self._node.world.count("catalogue locked")
            raise StoreError(f"the catalogue in {self._folder} cannot be written: database is locked")
        super().update(*arguments)
        self._process.point("after the catalogue is written")

    def wait(self, seconds: float) -> None:
        """Nobody waits in earnest."""


def check_catalogue(folder: Path, disk: Disk, model: PlainModel, is_true: bool) -> int:
    """Looks whether a catalogue that a process has left, however it ended, lists nothing but pages that are there.
    Returns how many.

    Args:
        is_true: it could always be written, so that no entry may have outlived its page.
    """
    try:
        with closing(Catalogue(folder, read_only=True)) as catalogue:
            entries = catalogue.entries()
    except DamagedError:
        return 0
    tokens: dict[bytes, list[int]] = {}
    size = model.page_size * 4
    for entry in sorted(entries, key=lambda entry: entry.index):
        own = [int.from_bytes(entry.tokens[first : first + 4], "little") for first in range(0, size, 4)]
        is_behind = entry.index == 0 or entry.parent in tokens
        if not is_behind or entry.key != page_key(entry.parent, own).digest:
            assert not is_true, "a key that nobody has made, or one behind it"
            continue  # nobody finds that one, and of those behind it nobody knows from here what all their tokens are
        tokens[entry.key] = (tokens[entry.parent] if entry.index else []) + own
        files = [disk.files.get((entry.slot, head)) for head in range(model.num_heads)]
        crcs = array("I", [0 if content is None else zlib.crc32(content) for content in files]).tobytes()
        if crcs != entry.crc32c:
            assert not is_true or entry.slot in disk.spoilt, f"the checksums of slot {entry.slot} are not those of it"
            continue  # whoever reads it finds that out
        values = model.page_values(tokens[entry.key])
        assert files == [whole[-model.page_size * VALUE_BYTES :] for whole in values], (
            f"the catalogue lists slot {entry.slot}, which does not hold that page"
        )
    return len(entries)


def break_catalogue(world: World, folder: Path) -> None:
    """Damages the file, somewhere."""
    path: Any = folder / CATALOGUE
    if not path.exists() or not path.stat().st_size:
        return
    content = bytearray(path.read_bytes())
    kind = world.rng.choice(["flips", "cut", "nothing", "text"])
    if kind == "flips":
        for _ in range(world.rng.choice([1, 20, 500])):
            content[world.rng.randrange(len(content))] ^= 1 << world.rng.randrange(8)
    elif kind == "cut":
        del content[world.rng.randrange(len(content)) :]
    elif kind == "nothing":
        content.clear()
    else:
        content[:] = b"no catalogue " * 100
    path.write_bytes(content)
    world.count(f"catalogue damaged: {kind}")


def patches(world: World, nodes: "list[Node]") -> list[tuple[Any, str, Any]]:
    """What of which module is to be replaced: (module, name, replacement)."""

    def open_catalogue(folder: Path, read_only: bool = False, wait: float = 0.0) -> Catalogue:
        node = next(node for node in nodes if node.folder == folder)
        return SimulatedCatalogue(node, folder, read_only, wait)

    return [
        (catalogue_writer, "Catalogue", open_catalogue),
        *((module, "time", world.time) for module in (catalogue_writer, request_meter, saving, scheduler)),
        (catalogue_module, "LOCK_WAIT", 0.0),
    ]
