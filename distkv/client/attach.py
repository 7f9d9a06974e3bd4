"""Finds a server by its name at a Ray cluster."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import list_named_actors

from distkv import __version__
from distkv.client.card import NAMESPACE, Card, is_loopback
from distkv.client.serve_app import application_url, serve_details
from distkv.errors import ConfigError, DistKVError
from distkv.option_checks import check_name, check_ray_address
from distkv.workers.group.ray_cluster import connect, disconnect
from distkv.workers.group.ray_errors import TOKENS_DIFFER, tokens_differ

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # after which what holds a name is given up


class Found(NamedTuple):
    """Where a server answers, and the key that it wants, as far as that is known."""

    url: str
    api_key: str | None


def find(name: str, ray_address: str | None) -> Found:
    """The server that has registered this name, or else the Ray Serve application of this name; see `Client.attach`.
    This process is connected to the cluster meanwhile, unless it is already."""
    check_name("name", name)
    check_ray_address(ray_address)
    with ThreadPoolExecutor(1) as thread:  # since in the main thread Ray would take SIGTERM over, for good
        return thread.submit(_find, name, ray_address).result()


def _find(name: str, ray_address: str | None) -> Found:
    connect(ray_address, None)
    try:
        card = _card(name)
        if card is not None:
            return _check(name, card)
        details = serve_details()
        if name in (found := details["applications"]):
            return Found(application_url(name, details, ray.get_runtime_context().get_node_id()), None)
        names = [one["name"] for one in list_named_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]
        raise ConfigError(
            f"no server is called {name!r} at the Ray cluster at {ray.get_runtime_context().gcs_address}, and no "
            f"application of Ray Serve; there are {', '.join(sorted({*names, *found})) or 'none'}. Start one with "
            f"'distkv serve MODEL --name {name}'"
        )
    finally:
        disconnect()


def _card(name: str) -> Card | None:
    """What the server of this name has registered; None where there is none."""
    try:
        actor: Any = ray.get_actor(name, NAMESPACE)
        return msgspec.json.decode(ray.get(actor.card.remote(), timeout=ANSWER_SECONDS), type=Card)
    except ValueError:
        return None
    except GetTimeoutError as error:
        raise DistKVError(
            f"the Ray cluster did not say within {ANSWER_SECONDS:.0f} s where {name!r} is; see whether its node is up"
        ) from error
    except RayActorError as error:
        if tokens_differ(error):
            raise ConfigError(TOKENS_DIFFER) from error
        return None  # it has just ended


def _check(name: str, card: Card) -> Found:
    """Raises ConfigError for a server that cannot be reached from here."""
    is_here = card.node_id == ray.get_runtime_context().get_node_id()
    if not is_here and is_loopback(urlsplit(card.url).hostname or ""):
        raise ConfigError(
            f"{name!r} runs on another node than this and listens at {card.url}, which only its own node reaches; "
            "start it with --host 0.0.0.0"
        )
    if card.version != __version__:
        log.warning("%r is a server of distkv %s, and this is %s", name, card.version, __version__)
    return Found(card.url, card.api_key)
