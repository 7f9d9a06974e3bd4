"""`distkv serve --replicas`: deploys an application, stays with it, and takes it down in the end."""

import logging
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from distkv.client.card import http_url
from distkv.client.serve_app import application_url, serve_details
from distkv.config import EngineConfig, EngineOptions
from distkv.errors import CapacityError, ConfigError, DistKVError
from distkv.ray_serve.app import Deployments, build_app
from distkv.ray_serve.options import ReplicaOptions
from distkv.server.options import ServerOptions
from distkv.server.serve import warn_if_open
from distkv.workers.backend import KINDS
from distkv.workers.group.ray_cluster import connect, disconnect

log = logging.getLogger(__name__)

DEFAULT_NAME = "distkv"  # of the application
POLL_SECONDS = 0.3
SILENCE_SECONDS = 30.0  # in which an application that runs is to answer
LOOK_SECONDS = 2.0  # between two looks at an application that runs
PROXY_ENVIRONMENT = {"RAY_SERVE_PROXY_USE_GRPC": "1"}  # an object of Ray for each piece of a stream costs more
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SERVER_FIELDS = ("api_key", "max_queued_requests", "max_body_bytes", "shutdown_timeout", "served_model_name")
OWN_ERROR = re.compile(r"\bdistkv(?:\.[\w.]+)?\.(\w+): (.+)")
NO_MODULE = "No module named 'distkv"


def serve_replicas(
    model: str, folder: Callable[[], Path], options: ServerOptions, engine: EngineOptions, how: ReplicaOptions,
    ready: Callable[[str], None],
) -> None:  # fmt: skip
    """Serves a model by replicas until SIGTERM or SIGINT, then has what runs end and deletes the application.

    Args:
        model: what clients call it, unless `options` says otherwise.
        folder: finds the model's folder, which must be there on every node; it may take its time.
        ready: called with the server's URL as soon as requests are answered.

    Raises ConfigError or CapacityError when the application cannot run, DistKVError when it has failed since,
    KeyboardInterrupt after SIGINT.
    """
    assert how.replicas is not None
    _check_effects(options)
    address = engine.get("ray_address")
    on_ray: EngineOptions = {**engine, "ray_address": "auto"}
    config = EngineConfig(folder(), **on_ray)
    signals = _Signals()
    with signals.handled():
        connect(address, how.replicas * config.tensor_parallel_size)
        signals.handle()
        try:
            _check_room(how.replicas, config)
            _serve(model, options, config, how, ready, signals)
        finally:
            disconnect()
    if signals.is_interrupted:
        raise KeyboardInterrupt


def _serve(
    model: str, options: ServerOptions, config: EngineConfig, how: ReplicaOptions, ready: Callable[[str], None],
    signals: "_Signals",
) -> None:  # fmt: skip
    name = options.name or DEFAULT_NAME
    server = {one: getattr(options, one) for one in SERVER_FIELDS}
    application = build_app(config, server, [model], Deployments({"num_replicas": how.replicas}))
    is_own = _get_global_client(raise_if_no_controller_running=False) is None
    try:
        url = _start_http(options, is_own) + how.route_prefix.rstrip("/")
        _check_free(name, how.route_prefix)
        if signals.num_come:
            return
        serve.run_many(
            [serve.RunTarget(application, name, how.route_prefix)], wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )  # fmt: skip
        try:
            found = _await_running(name, url, signals)
            if found is not None:
                ready(found)
                _stay(name, signals)
        finally:
            _delete(name, signals)
    finally:
        if is_own and not serve.status().applications:
            serve.shutdown()


class _Signals:
    """The first SIGTERM or SIGINT has what runs end by itself, the second leaves that to Serve."""

    def __init__(self) -> None:
        self.num_come = 0
        self.is_interrupted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles signals for as long as this lasts."""
        before = self.handle()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self) -> dict[int, Any]:
        """Begins to handle them, or begins again when Ray has put a handler of its own in place, which aborts the
        process three seconds after SIGTERM."""
        return {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, _: FrameType | None) -> None:
        signal.alarm(0)  # which Ray's handler sets, if it was there
        self.num_come += 1
        self.is_interrupted |= number == signal.SIGINT

    def sleep(self, seconds: float) -> None:
        """Sleeps, but no longer than until the next signal."""
        num_before, end = self.num_come, time.monotonic() + seconds
        while self.num_come == num_before and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def _check_effects(options: ServerOptions) -> None:
    given = {one.name: one.default for one in fields(ServerOptions)}
    if options.uvicorn_log_level != given["uvicorn_log_level"]:
        raise ConfigError("uvicorn_log_level has no effect with replicas, since HTTP is Serve's; leave it out")


def _check_room(replicas: int, config: EngineConfig) -> None:
    """Raises CapacityError where the cluster never has room for all ranks."""
    total = ray.cluster_resources()
    device = ("cuda" if total.get("GPU", 0) >= 1 else "cpu") if config.device == "auto" else config.device
    kind, wanted = KINDS[device].resource, replicas * config.tensor_parallel_size
    if wanted > total.get(kind, 0):
        raise CapacityError(
            f"replicas {replicas} of tensor_parallel_size {config.tensor_parallel_size} need {wanted} {kind}s and the "
            f"cluster has {int(total.get(kind, 0))}; use fewer, or add nodes (`ray start --num-{kind.lower()}s=N` says "
            "how many a node offers)"
        )


def _start_http(options: ServerOptions, is_own: bool) -> str:
    """Has Serve listen, unless it does already; returns where."""
    if is_own:
        serve.start(
            http_options={"host": options.host, "port": options.port or _free_port(options.host)},
            controller_options={"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
        )
    client = _get_global_client()
    assert client is not None
    http = client.http_config
    if not is_own and (http.host, http.port) != (options.host, options.port):
        log.warning(
            "Ray Serve runs on this cluster already and listens on %s, port %d; host %s and port %d are not used",
            http.host, http.port, options.host, options.port,
        )  # fmt: skip
    warn_if_open(http.host, options.api_key)
    return http_url(http.host, http.port)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        return int(found.getsockname()[1])


def _check_free(name: str, route_prefix: str) -> None:
    """Raises ConfigError when the name or the path is another application's."""
    if name in serve.status().applications:
        raise ConfigError(f"an application {name!r} runs on this cluster already; give another --name")
    client = _get_global_client()
    assert client is not None
    details = client.get_serve_details()["applications"]
    taken = [other for other, one in details.items() if one.get("route_prefix") == route_prefix]
    if taken:
        raise ConfigError(
            f"the application {taken[0]!r} answers at {route_prefix} already; give another --route-prefix"
        )


def _await_running(name: str, url: str, signals: _Signals) -> str | None:
    """Waits until requests are answered; returns where they are, at this node's proxy or at another one, or None when
    somebody has sent a signal. Raises as `serve_replicas`."""
    runs_since = 0.0  # monotonic time
    while not signals.num_come:
        found = serve.status().applications.get(name)
        if found is None:
            raise DistKVError(f"the application {name!r} was deleted while it started")
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise _failure(found)
        if found.status == ApplicationStatus.RUNNING:
            if _answers(url):
                return url
            runs_since = runs_since or time.monotonic()
            if time.monotonic() - runs_since > SILENCE_SECONDS:  # it may be that no proxy listens on this node
                details = serve_details()
                if name in details["applications"]:
                    url = application_url(name, details, ray.get_runtime_context().get_node_id())
        signals.sleep(POLL_SECONDS)
    return None


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def _stay(name: str, signals: _Signals) -> None:
    """Waits for a signal; raises DistKVError when the application is gone or cannot go on."""
    before = ApplicationStatus.RUNNING
    while not signals.num_come:
        signals.sleep(LOOK_SECONDS)
        found = serve.status().applications.get(name)
        if found is None:
            raise DistKVError(f"the application {name!r} was deleted; serve it anew to go on")
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise _failure(found)
        if found.status != before:
            log.warning("the application %r is %s now", name, found.status.value.lower())
            before = found.status


def _delete(name: str, signals: _Signals) -> None:
    """Takes the application down and waits until nothing of it is left, or for one more signal."""
    num_before = max(1, signals.num_come)
    serve.delete(name, _blocking=False)
    while name in serve.status().applications:
        if signals.num_come > num_before:
            log.warning("the application %r is being deleted; what runs there ends as Serve has it", name)
            return
        signals.sleep(POLL_SECONDS)


def _failure(found: ApplicationStatusOverview) -> DistKVError:
    """Why an application cannot run, as one line where distkv has said it."""
    texts = [one.message for one in found.deployments.values() if one.message] + [found.message]
    for text in texts:
        if NO_MODULE in text:
            return ConfigError(
                "Serve's replicas cannot import distkv; install it on every node, or submit with `ray job submit "
                "--working-dir` from a checkout"
            )
        if own := OWN_ERROR.findall(text):
            kind, message = own[-1]
            known: Any = {"ConfigError": ConfigError, "CapacityError": CapacityError}.get(kind, DistKVError)
            return known(message)
    last = (texts[0].strip().splitlines() or ["no reason is known"])[-1]
    return DistKVError(f"the application failed to start: {last}; `serve status` has more")
