"""Where an application of Ray Serve answers, for `Client.attach`."""

from importlib import import_module
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from distkv.client.card import http_url, is_loopback
from distkv.errors import ConfigError, DistKVError

CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"  # asked itself, as `serve.status` knows no addresses
ANSWER_SECONDS = 30.0
HOST, PORT = "127.0.0.1", 8000  # unless Ray Serve is told otherwise
ANY = ("0.0.0.0", "::")


def serve_details() -> dict[str, Any]:
    """What Ray Serve tells of itself, by the names of its REST API; nothing where it does not run.

    Raises ConfigError where its part of Ray is not installed, DistKVError when it does not answer.
    """
    try:
        controller: Any = ray.get_actor(CONTROLLER, NAMESPACE)
    except ValueError:
        return {"applications": {}}
    try:
        import_module("ray.serve.schema")  # of which the answer is made

        details: dict[str, Any] = ray.get(controller.get_serve_instance_details.remote(), timeout=ANSWER_SECONDS)
        return details
    except ImportError as error:
        raise ConfigError(
            f"the cluster runs Ray Serve, whose part of Ray is not installed here ({error}); pip install 'ray[serve]'"
        ) from error
    except (GetTimeoutError, RayError) as error:
        raise DistKVError(f"the controller of Ray Serve does not answer ({error}); see whether it is up") from error


def application_url(name: str, details: dict[str, Any], node_id: str) -> str:
    """The URL of an application, by way of the proxy on this node, or else of any one that is well.

    Raises ConfigError when it has none that can be reached from here.
    """
    application, options = details["applications"][name], details.get("http_options") or {}
    prefix = application.get("route_prefix")
    if prefix is None:
        state = getattr(application["status"], "value", application["status"])
        raise ConfigError(
            f"the Ray Serve application {name!r} has no route ({state}); wait until it runs, or give it a route_prefix"
        )
    healthy = {key: one["node_ip"] for key, one in details["proxies"].items() if one["status"] == "HEALTHY"}
    if not healthy:
        raise ConfigError(f"Ray Serve has no proxy for HTTP that is well, and so {name!r} cannot be reached")
    host = options.get("host", HOST)
    if is_loopback(host) and node_id not in healthy:
        raise ConfigError(
            f"Ray Serve listens on {host} alone, and has no proxy on this node; start it with --host 0.0.0.0, in a "
            "config file with the http option 'host: 0.0.0.0'"
        )
    if host in ANY:
        host = healthy.get(node_id) or next(iter(healthy.values()))
    url = http_url(host, options.get("port", PORT))
    if options.get("ssl_certfile"):
        url = url.replace("http://", "https://", 1)
    return url + prefix.rstrip("/")
