"""Which Ray cluster is joined, as far as that is decided before Ray is asked."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from distkv.errors import ConfigError
from distkv.workers.group import ray_cluster
from distkv.workers.group.ray_cluster import _choose


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray's note of a cluster that answers."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        yield note


def test_the_choice_and_its_reason(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = note.read_text()
    assert _choose("10.0.0.1:6379") == ("10.0.0.1:6379", False, "ray_address says so")
    for address in (None, "auto"):
        found, is_noted, reason = _choose(address)
        assert found == noted and is_noted and str(note) in reason
    assert _choose("local") == (None, False, "ray_address is 'local'")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    for address in (None, "auto"):
        assert _choose(address) == ("10.0.0.2:6379", False, "RAY_ADDRESS says so")
    assert _choose("local")[0] is None
    monkeypatch.delenv("RAY_ADDRESS")
    note.write_text("127.0.0.1:1")
    assert _choose(None)[0] is None
    with pytest.raises(ConfigError, match="ray start --head"):
        _choose("auto")


def test_a_cluster_of_another_user_is_not_joined_unasked(
    note: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can write to /tmp would run our code, or have us run theirs."""
    monkeypatch.setattr(os, "geteuid", lambda: note.stat().st_uid + 1)
    assert _choose(None)[0] is None
    assert "another user's" in caplog.text
    assert _choose("auto")[0] == note.read_text()


def test_a_process_that_is_connected_joins_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(gcs_address="127.0.0.1:6379")
    fake = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setattr(ray_cluster, "ray", fake)
    monkeypatch.setattr(ray_cluster._Connection, "users", 1)
    for address in (None, "auto", "127.0.0.1:6379", "localhost:6379"):
        ray_cluster.connect(address, 2)
    for elsewhere in ("127.0.0.1:6380", "198.51.100.1:6379"):
        with pytest.raises(ConfigError, match=r"connected to the Ray cluster at 127\.0\.0\.1:6379"):
            ray_cluster.connect(elsewhere, 2)
    assert ray_cluster._Connection.users == 5
    context.gcs_address = f"{socket.gethostbyname(socket.gethostname())}:6379"  # what Ray says of a cluster here
    ray_cluster.connect("127.0.0.1:6379", 2)
