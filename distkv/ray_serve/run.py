"""`distkv serve --replicas`: deploys an application, stays with it, and takes it down in the end."""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client

from distkv.client.card import http_url
from distkv.config import EngineConfig, EngineOptions
from distkv.errors import CapacityError, ConfigError, DistKVError
from distkv.ray_serve.app import ENGINES, INGRESS, Deployments, build_app
from distkv.ray_serve.options import ReplicaOptions
from distkv.ray_serve.signals import Signals
from distkv.ray_serve.watch import POLL_SECONDS, Watch
from distkv.server.listening import cannot_listen, listen, warn_if_open
from distkv.server.options import ServerOptions
from distkv.workers.group.ray_cluster import connect, disconnect
from distkv.workers.group.ray_errors import cause_of
from distkv.workers.kinds import KINDS

log = logging.getLogger(__name__)

DEFAULT_NAME = "distkv"  # of the application
PROXY_ENVIRONMENT = {
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # an object of Ray for each piece of a stream costs more
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a proxy is dead after three; by default that takes half a minute
}
SERVER_FIELDS = ("api_key", "max_stored_responses", "max_body_bytes", "shutdown_timeout", "served_model_name")


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
    signals = Signals()
    with signals.handled():
        connect(address, how.replicas * config.num_ranks)
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
    signals: Signals,
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
            watch = Watch(name, url, {ENGINES: how.replicas or 1, INGRESS: 1}, signals)
            found = watch.await_answer()
            if found is not None:
                ready(found)
                watch.stay()
        finally:
            _delete(name, signals)
    finally:
        if is_own and not serve.status().applications:
            serve.shutdown()


def _check_effects(options: ServerOptions) -> None:
    given = {one.name: one.default for one in fields(ServerOptions)}
    if options.uvicorn_log_level != given["uvicorn_log_level"]:
        raise ConfigError("uvicorn_log_level has no effect with replicas, since HTTP is Serve's; leave it out")
    if options.cache_transfer_bytes is not None:
        raise ConfigError("cache_transfer_bytes has no effect with replicas, which have a cache each; leave it out")


def _check_room(replicas: int, config: EngineConfig) -> None:
    """Raises CapacityError where the cluster never has room for all ranks; says so where it has none at the moment."""
    total = ray.cluster_resources()
    device = ("cuda" if total.get("GPU", 0) >= 1 else "cpu") if config.device == "auto" else config.device
    kind, wanted = KINDS[device].resource, replicas * config.num_ranks
    if wanted > total.get(kind, 0):
        raise CapacityError(
            f"replicas {replicas} of {_ranks(config)} need {wanted} {kind}s and the "
            f"cluster has {int(total.get(kind, 0))}; use fewer, or add nodes (`ray start --num-{kind.lower()}s=N` says "
            "how many a node offers)"
        )
    free = ray.available_resources().get(kind, 0)
    if wanted > free:
        log.warning(
            "replicas %d of %s need %d %ss, and %d are free at the moment; those without room wait for it",
            replicas, _ranks(config), wanted, kind, free,
        )  # fmt: skip


def _ranks(config: EngineConfig) -> str:
    """How many a replica has, by the options that say it."""
    names = ["tensor_parallel_size", *(["pipeline_parallel_size"] if config.pipeline_parallel_size > 1 else [])]
    return " and ".join(f"{name} {getattr(config, name)}" for name in names)


def _start_http(options: ServerOptions, is_own: bool) -> str:
    """Has Serve listen, unless it does already; returns where. Raises ConfigError where nothing can listen."""
    host, port = options.host, options.port
    if is_own:
        if not port:
            with closing(listen(host, 0)) as found:
                port = found.getsockname()[1]
        try:
            serve.start(
                http_options={"host": host, "port": port},
                controller_options={"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
            )
        except RayError as error:
            if "Failed to bind" not in str(error):
                raise DistKVError(f"Ray Serve does not start ({cause_of(error)}); its logs may have more") from error
            with closing(listen(host, port)):  # which knows why, where it cannot either
                raise cannot_listen(host, port, f"on a node of the cluster: {cause_of(error)}") from error
    client = _get_global_client()
    assert client is not None
    http = client.http_config
    if not is_own and (http.host, http.port) != (host, port or http.port):
        log.warning(
            "Ray Serve runs on this cluster already and listens on %s, port %d; host %s and port %d are not used",
            http.host, http.port, host, port,
        )  # fmt: skip
    warn_if_open(http.host, options.api_key)
    return http_url(http.host, http.port)


def _check_free(name: str, route_prefix: str) -> None:
    """Raises ConfigError when the name or the path is another application's."""
    if name in serve.status().applications:
        address = ray.get_runtime_context().gcs_address
        raise ConfigError(
            f"an application {name!r} runs on this cluster already; give another --name, or end that one, if nobody "
            f"else does: python -c \"import ray, ray.serve; ray.init('{address}'); ray.serve.delete({name!r})\""
        )
    client = _get_global_client()
    assert client is not None
    details = client.get_serve_details()["applications"]
    taken = [other for other, one in details.items() if one.get("route_prefix") == route_prefix]
    if taken:
        raise ConfigError(
            f"the application {taken[0]!r} answers at {route_prefix} already; give another --route-prefix"
        )


def _delete(name: str, signals: Signals) -> None:
    """Takes the application down and waits until nothing of it is left, or for one more signal."""
    num_before = max(1, signals.num_come)
    serve.delete(name, _blocking=False)
    while name in serve.status().applications:
        if signals.num_come > num_before:
            log.warning("the application %r is being deleted; what runs there ends as Serve has it", name)
            return
        signals.sleep(POLL_SECONDS)
