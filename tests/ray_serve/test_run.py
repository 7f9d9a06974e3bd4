"""Where replicas listen, what they need, and what a script reads from stdout: without Serve around it."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from distkv import ConfigError, DistKVError
from distkv.commands import serve as command
from distkv.ray_serve import run
from distkv.ray_serve.options import ReplicaOptions
from distkv.server import serve as plain
from distkv.server.options import ServerOptions


def listening(monkeypatch: pytest.MonkeyPatch, host: str, port: int) -> None:
    """Serve runs already and listens there."""
    client = SimpleNamespace(http_config=SimpleNamespace(host=host, port=port))
    monkeypatch.setattr(run, "_get_global_client", lambda: client)


@pytest.mark.parametrize(
    "options, is_told", [({"port": 0}, False), ({"port": 8123}, False), ({}, True), ({"host": "::1", "port": 0}, True)]
)
def test_an_address_that_is_not_used_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, options: dict[str, Any], is_told: bool
) -> None:
    listening(monkeypatch, "127.0.0.1", 8123)
    assert run._start_http(ServerOptions(**options), is_own=False) == "http://127.0.0.1:8123"
    assert bool(caplog.messages) == is_told


def test_an_address_that_cannot_be_listened_on_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, or on another node, of which Serve alone knows."""

    def start(http_options: dict[str, Any], **_: Any) -> None:
        raise RayError(f"Traceback\nRuntimeError: Failed to bind to address '{http_options['host']}'.")

    monkeypatch.setattr(run.serve, "start", start)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"'127.0.0.1', port {port}, cannot be listened on .*in use.*--port"):
            run._start_http(ServerOptions(port=port), is_own=True)
    with pytest.raises(ConfigError, match="on a node of the cluster: RuntimeError: Failed to bind"):
        run._start_http(ServerOptions(port=port), is_own=True)
    for options in ServerOptions(host="300.1.1.1"), ServerOptions(host="300.1.1.1", port=0):
        with pytest.raises(ConfigError, match=r"'300\.1\.1\.1', port .*, cannot be listened on"):
            run._start_http(options, is_own=True)


def test_serve_that_does_not_start_for_another_reason_blames_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        raise RayError("the controller is gone")

    monkeypatch.setattr(run.serve, "start", start)
    with pytest.raises(DistKVError, match=r"Ray Serve does not start .the controller is gone") as told:
        run._start_http(ServerOptions(port=8123), is_own=True)
    assert not isinstance(told.value, ConfigError)


def test_the_error_for_a_name_that_is_taken_says_how_to_end_what_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.serve, "status", lambda: SimpleNamespace(applications={"app": None}))
    monkeypatch.setattr(run.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    with pytest.raises(ConfigError, match=r"ray\.init\('10.0.0.1:6379'\); ray\.serve\.delete\('app'\)"):
        run._check_free("app", "/")


def test_replicas_without_room_at_the_moment_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = SimpleNamespace(device="cpu", num_ranks=2, tensor_parallel_size=2, pipeline_parallel_size=1)
    monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(run.ray, "available_resources", lambda: {"CPU": 4.0})
    run._check_room(2, config)
    assert caplog.messages == []
    monkeypatch.setattr(run.ray, "available_resources", lambda: {"CPU": 2.0})
    run._check_room(2, config)
    assert "need 4 CPUs, and 2 are free" in caplog.messages[0]


@pytest.mark.parametrize("replicas", [None, 2])
def test_stdout_has_the_url_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], replicas: int | None
) -> None:
    """Ray prints on it what it says of the deaths of workers, whosever they are."""

    def serve(model: str, folder: Any, *options: Any) -> None:
        print("(raylet) a worker died")
        options[-1]("http://here")
        print("(raylet) and another one")

    monkeypatch.setattr(plain, "serve", serve)
    monkeypatch.setattr(run, "serve_replicas", serve)
    how: Any = command.serve
    getattr(how, "__wrapped__", how)(
        "m",
        replicas=ReplicaOptions(replicas),
        server=ServerOptions(),
        options={"max_rank_failures": 0, "max_queued_requests": None},
    )
    told = capsys.readouterr()
    assert told.out == "distkv serves m at http://here\n"
    assert told.err.count("raylet") == 2
