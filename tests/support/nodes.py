"""Nodes that share a file system, as processes of one machine. For code that `support.processes` starts, too."""

from pathlib import Path
from typing import IO

import pytest

from distkv.storage.disk import file_lock, mounts

BEAT = 0.05


def enter_node(node: str, locks: str, patch: pytest.MonkeyPatch | None = None) -> None:
    """Has this process be on a node of its own, whose folders lie on a file system of several.

    Args:
        locks: "none" have an effect there, those "of the node" are kept to each node, and those "of all" are not.
        patch: undoes it.
    """
    patch = patch or pytest.MonkeyPatch()
    patch.setattr(file_lock, "_kernel", lambda: node)
    patch.setattr(mounts, "file_system", lambda folder: "lustre")
    patch.setattr(file_lock, "BEAT_SECONDS", BEAT)
    patch.setattr(file_lock, "SILENCE_SECONDS", 60.0)  # which ends with the first sign of life
    patch.setattr(file_lock, "CLAIM_SECONDS", 2 * BEAT)
    if locks == "none":
        patch.setattr(file_lock, "_take", lambda file: None)
        patch.setattr(file_lock, "_let_go", lambda file: None)
        patch.setattr(file_lock, "_is_taken", lambda path: False)
    elif locks == "of the node":
        take, let_go, is_taken = file_lock._take, file_lock._let_go, file_lock._is_taken
        of_node: dict[int, IO[str]] = {}

        def here(path: Path) -> Path:
            return path.with_name(f"{path.name} on {node}")

        def take_here(file: IO[str]) -> None:
            of_node[id(file)] = open(here(Path(file.name)), "a+")  # noqa: SIM115
            take(of_node[id(file)])

        def let_go_here(file: IO[str]) -> None:
            let_go(of_node.pop(id(file)))

        patch.setattr(file_lock, "_take", take_here)
        patch.setattr(file_lock, "_let_go", let_go_here)
        patch.setattr(file_lock, "_is_taken", lambda path: is_taken(here(path)))
