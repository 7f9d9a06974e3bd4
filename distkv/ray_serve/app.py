"""A model as a Serve application: replicas of an engine, and the server in front of them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from distkv.config import EngineConfig, EngineOptions
from distkv.errors import ConfigError
from distkv.launch.launch import check_config
from distkv.models.fetch import MODELS, fetch_model
from distkv.option_checks import settle_path
from distkv.ray_serve.config import check_names, parse_arguments
from distkv.ray_serve.ingress import HEALTH_CHECK_SECONDS, Ingress
from distkv.ray_serve.replica import EngineReplica
from distkv.server.options import QUEUED_REQUESTS, ServerOptions

ENGINES, INGRESS = "engines", "ingress"  # names of the deployments
SAVE_SECONDS = 600.0  # for a replica to save its cache when its last answer has ended
NO_LIMIT = 10**6  # requests at a time: the server itself refuses what is too much
WITHOUT_END = 10.0 * 365 * 86400  # seconds
# Serve's code and ours in one event loop: each hop of a token between threads costs more than what it protects from
ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
ELSEWHERE_GIVEN = dict.fromkeys(("host", "port", "uvicorn_log_level"), "HTTP is Serve's; see its http_options") | {
    "name": "it is that of the application",
    "max_queued_requests": "it is a field of engine_kwargs",
}
OWN_OPTIONS = ("name", "request_router_config", "user_config", "placement_group_bundles")
ROUTER = f"{__package__}.routing.PrefixRequestRouter"


@dataclass(frozen=True)
class Deployments:
    """Options of `serve.deployment` for both."""

    engines: dict[str, Any] = field(default_factory=dict)
    ingress: dict[str, Any] = field(default_factory=dict)


def build_openai_app(args: dict[str, Any]) -> Application:
    """The builder for `serve run`, `serve deploy` and a RayService: `import_path: distkv.ray_serve:build_openai_app`.

    Raises ConfigError for arguments that cannot be used; see docs/ray_serve.md for what there is.
    """
    serving = parse_arguments(args)
    [llm] = serving.llm_configs
    loading = llm.model_loading_config
    config = EngineConfig(find_model(loading.model_source or loading.model_id), **_engine_options(llm.engine_kwargs))
    deployments = Deployments(llm.deployment_config, serving.ingress_deployment_config)
    return build_app(config, serving.server_kwargs, [loading.model_id], deployments)


def build_app(config: EngineConfig, server: dict[str, Any], names: list[str], deployments: Deployments) -> Application:
    """The application.

    Args:
        server: fields of `ServerOptions`.
        names: that clients call the model by, unless `server` says otherwise.

    Raises ConfigError or CapacityError for what can be known before a replica starts.
    """
    options = _server_options(server)
    _check_engine(config)
    engine_options = _checked("deployment_config", deployments.engines)
    ingress_options = _checked("ingress_deployment_config", deployments.ingress)
    if "health_check_period_s" in ingress_options:
        raise ConfigError("ingress_deployment_config.health_check_period_s is distkv's own to give; leave it out")
    queued = config.max_queued_requests
    to_end = WITHOUT_END if options.shutdown_timeout is None else float(options.shutdown_timeout)
    common = {
        "ray_actor_options": {"num_cpus": 0, "runtime_env": _runtime_env()},
        "health_check_period_s": HEALTH_CHECK_SECONDS, "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": 3,
    }  # fmt: skip
    routing: dict[str, Any] = {
        "request_router_class": ROUTER,
        "request_router_kwargs": {"page_size": config.plan_page_size, "max_num_seqs": config.max_num_seqs},
    }
    of_engines: Any = serve.deployment(EngineReplica)
    engines = of_engines.options(
        **common
        | {
            "max_ongoing_requests": NO_LIMIT if queued is None else config.max_num_seqs + queued,
            "graceful_shutdown_timeout_s": to_end + SAVE_SECONDS,
        }
        | engine_options
        | {"name": ENGINES, "request_router_config": RequestRouterConfig(**routing)}
    )
    of_ingress: Any = serve.deployment(Ingress)
    ingress = of_ingress.options(
        **common
        | {"max_ongoing_requests": NO_LIMIT, "graceful_shutdown_timeout_s": to_end}
        | ingress_options
        | {"name": INGRESS}
    )
    scaling = engines._deployment_config.autoscaling_config  # as Serve has understood it
    most = scaling.max_replicas if scaling is not None else engines.num_replicas
    return ingress.bind(engines.bind(config), config, server, options.served_model_name or names, most)


def find_model(model: str) -> Path:
    """The folder of a model given as a path or as the name of one that can be fetched."""
    folder = settle_path("model_source", model)
    return fetch_model(model) if model in MODELS and not folder.exists() else folder


def _engine_options(given: dict[str, Any]) -> dict[str, Any]:
    if "ray_address" in given:
        raise ConfigError(
            "engine_kwargs.ray_address would have no effect: engines run on Serve's cluster; leave it out"
        )
    check_names("engine_kwargs", given, EngineOptions.__annotations__)
    return {"max_queued_requests": QUEUED_REQUESTS, **given, "ray_address": "auto"}


def _check_engine(config: EngineConfig) -> None:
    for name, is_refused, why in (
        ("trace", config.trace is not None, "several engines would write it at once"),
        ("data_parallel_size", config.data_parallel_size > 1, "the number of engines is that of the replicas"),
        ("max_rank_failures", config.max_rank_failures is not None, "Serve replaces a replica that has lost a rank"),
    ):
        if is_refused:
            raise ConfigError(f"{name} cannot be used with replicas: {why}; leave it out")
    check_config(config)


def _server_options(given: dict[str, Any]) -> ServerOptions:
    for name in ELSEWHERE_GIVEN:
        if name in given:
            raise ConfigError(f"server_kwargs.{name} would have no effect: {ELSEWHERE_GIVEN[name]}")
    check_names("server_kwargs", given, (one.name for one in fields(ServerOptions)))
    return ServerOptions(**given)


def _checked(place: str, given: dict[str, Any]) -> dict[str, Any]:
    """Options of a deployment that a user has given."""
    for name in OWN_OPTIONS:
        if name in given:
            raise ConfigError(f"{place}.{name} is distkv's own to give; leave it out")
    actor = given.get("ray_actor_options") or {}
    if actor.get("num_gpus"):
        raise ConfigError(
            f"{place}.ray_actor_options.num_gpus would hold GPUs that nothing runs on: each rank takes one itself; "
            "leave it out"
        )
    if "ray_actor_options" in given:
        env = actor.get("runtime_env", {})
        env = _runtime_env() | env | {"env_vars": ENVIRONMENT | env.get("env_vars", {})}
        given = given | {"ray_actor_options": {"num_cpus": 0} | actor | {"runtime_env": env}}
    if given.get("num_replicas") not in (None, "auto") and given.get("autoscaling_config") is not None:
        raise ConfigError(f"{place} has num_replicas and autoscaling_config; leave one of them out")
    return given


def _runtime_env() -> dict[str, Any]:
    """That of this job with `ENVIRONMENT` in it: what a deployment says takes the place of all of it."""
    here = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return here | {"env_vars": here.get("env_vars", {}) | ENVIRONMENT}
