"""A node: a disk with its catalogue."""

from pathlib import Path

from simulation.catalogues import break_catalogue, check_catalogue
from simulation.disk import Disk
from simulation.model import PlainModel
from simulation.world import Process, World


class Node:
    """What outlives the engines on it."""

    def __init__(self, world: World, folder: Path):
        self.world, self.folder = world, folder
        self.disk = Disk(world)
        self.is_locked = False  # whether the catalogue cannot be written
        self.is_true = True  # whether the catalogue could always be written, and was left in peace
        self.process: Process | None = None  # that uses the folder

    def restart(self, process: Process, keeps: bool, chance_of_damage: float) -> None:
        """A process takes over what lies here; it `keeps` pages of other processes."""
        self.process = process
        if not keeps:
            self.disk.files.clear()
        if self.world.chance(chance_of_damage):
            break_catalogue(self.world, self.folder)
            self.is_true = False

    def heal(self) -> None:
        """All is well again, but for what is lost."""
        self.disk.heal()
        self.is_locked = False

    def check(self, model: PlainModel) -> int:
        """See `check_catalogue`."""
        return check_catalogue(self.folder, self.disk, model, self.is_true)
