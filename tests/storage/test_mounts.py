"""Which file system a folder lies on, whatever the name of the place where it is mounted."""

import os
from pathlib import Path

import pytest

from distkv.storage.disk import mounts


@pytest.mark.parametrize(
    "name", ["a b", "a\tb", "a\nb", "a\\b", "a\\040b", "a\xa0b", "a\fb", "a\x85b\u2028", os.fsdecode(b"a\xffb")]
)
def test_a_network_mount_of_any_name_is_not_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    escaped = "".join(f"\\{ord(one):03o}" if one in " \t\n\\" else one for one in name)  # as the kernel does
    table = tmp_path / "mountinfo"
    table.write_bytes(
        os.fsencode(
            "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
            f"23 22 0:5 / {tmp_path}/{escaped} rw - nfs4 server:/x rw\n"
            f"24 22 0:6 / {tmp_path}/other rw - tmpfs  rw\n"
        )
    )
    monkeypatch.setattr(mounts, "MOUNTS", table)
    assert mounts.file_system(tmp_path / name / "kv") == "nfs4"
    assert not mounts.is_local(tmp_path / name) and mounts.is_local(tmp_path)
