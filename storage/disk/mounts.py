"""Which kind of file system a folder lies on."""

from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = ("tmpfs", "ramfs")
LOCAL = (
    "ext2", "ext3", "ext4", "xfs", "btrfs", "bcachefs", "f2fs", "zfs", "jfs", "overlay", "ntfs3", "exfat", "vfat",
    *IN_MEMORY,
)  # fmt: skip
"""Those of one node, whose kernel sees all that happens there."""


def file_system(folder: Path) -> str:
    """The kind of the file system that a folder lies on, as `mount` names it; "unknown" where nothing says so."""
    place, found, longest = folder.resolve(), "unknown", -1
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4].replace("\\040", " "))
        if place.is_relative_to(mount) and len(mount.parts) >= longest:  # of two at one place the later one counts
            found, longest = right.split()[0], len(mount.parts)
    return found


def is_local(folder: Path) -> bool:
    """Whether a folder is known to lie on a file system of this node alone."""
    return file_system(folder) in LOCAL
