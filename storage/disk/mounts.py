"""Which kind of file system a folder lies on."""

from pathlib import Path

from distkv.storage.proc_files import read_mounts

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
    for mount in read_mounts(MOUNTS):
        if place.is_relative_to(mount.point) and len(mount.point.parts) >= longest:  # the later one hides the earlier
            found, longest = mount.kind, len(mount.point.parts)
    return found


def is_local(folder: Path) -> bool:
    """Whether a folder is known to lie on a file system of this node alone."""
    return file_system(folder) in LOCAL
