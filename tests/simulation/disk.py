"""The disk of a node, which outlives the processes that use it: chunk files may be late, refused, damaged or gone."""

import zlib
from collections.abc import Iterable

from simulation.world import Process, World

from distkv.errors import StoreError

LATE = 0.002  # seconds that a transfer of a page takes at most on a disk that is well


class Disk:
    """Files by slot and KV head."""

    def __init__(self, world: World):
        self.world = world
        self.files: dict[tuple[int, int], bytes] = {}
        self.room: int | None = None  # files that it takes; None for any number
        self.read_faults = self.write_faults = 0.0  # how often it fails
        self.slowness = 1.0
        self.num_damages = 0
        self.spoilt: set[int] = set()  # slots of which a file was changed behind the back of those who wrote it

    def seconds(self) -> float:
        """How long a transfer takes."""
        return self.world.rng.random() * LATE * self.slowness

    def write(self, slot: int, heads: Iterable[tuple[int, bytes]], process: Process) -> None:
        """Replaces the files of a page, one after the other, as `DiskPool` does: what lay there goes first. Raises
        StoreError, having left nothing, when the disk does not take them."""
        heads = list(heads)
        process.point("before a page's files are removed")
        self.remove(slot, [head for head, _ in heads])
        for head, content in heads:
            process.point("before a file of a page is written")
            if self.world.chance(self.write_faults) or (self.room is not None and len(self.files) >= self.room):
                self.remove(slot, [head for head, _ in heads])
                self.world.count("disk full")
                raise StoreError("a KV page cannot be written: no space left on device; make room on the disk")
            self.files[slot, head] = content
        process.point("after a page's files are written")

    def read(self, slot: int, head: int, crc: int, size: int) -> bytes:
        """The content of a file. Raises StoreError when that is not what was written there."""
        content = self.files.get((slot, head))
        if content is None:
            raise StoreError(f"chunk {slot}.{head} cannot be read: no such file")
        if self.world.chance(self.read_faults):
            self.world.count("read error")
            raise StoreError(f"chunk {slot}.{head} cannot be read: input/output error")
        if len(content) != size:
            raise StoreError(f"chunk {slot}.{head} is cut short")
        if zlib.crc32(content) != crc:
            self.world.count("wrong checksum")
            raise StoreError(f"chunk {slot}.{head} is damaged")
        return content

    def remove(self, slot: int, heads: Iterable[int]) -> None:
        for head in heads:
            self.files.pop((slot, head), None)

    # --- what befalls it ---

    def damage(self) -> None:
        """Something happens to a file."""
        if not self.files:
            return
        rng = self.world.rng
        place = rng.choice(sorted(self.files))
        content = self.files[place]
        kind = rng.choice(["flip", "flip", "cut", "lose", "swap", "zeros"])
        if kind == "flip" and content:
            index = rng.randrange(len(content))
            self.files[place] = content[:index] + bytes([content[index] ^ 1 << rng.randrange(8)]) + content[index + 1 :]
        elif kind == "cut":
            self.files[place] = content[: rng.randrange(len(content) + 1)]
        elif kind == "lose":
            del self.files[place]
        elif kind == "swap":
            self.files[place] = self.files[rng.choice(sorted(self.files))]
        elif kind == "zeros":
            self.files[place] = bytes(len(content))
        self.num_damages += 1
        self.spoilt.add(place[0])
        self.world.note("damage", kind, place)
        self.world.count(f"file damaged: {kind}")

    def change(self) -> None:
        """It becomes full, unreliable or slow, or well again."""
        rng = self.world.rng
        kind = rng.choice(["full", "full", "unreliable", "slow", "well", "well"])
        self.world.count(f"disk is {kind}")
        if kind == "full":  # somebody else takes the room that is left
            self.room = max(0, len(self.files) - rng.choice([0, 0, 1, 3]))
        elif kind == "unreliable":
            self.read_faults, self.write_faults = rng.choice([0.0, 0.03, 0.3]), rng.choice([0.0, 0.03, 0.3])
        elif kind == "slow":
            self.slowness = rng.choice([10.0, 1000.0])
        else:
            self.heal()

    def heal(self) -> None:
        """All is well again, but for what is lost."""
        self.room, self.read_faults, self.write_faults, self.slowness = None, 0.0, 0.0, 1.0
