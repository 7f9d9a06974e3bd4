"""This process's connection to a Ray cluster: one that runs already, or one that is started for it."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from distkv.storage.process_limits import usable_cores
from distkv.workers.errors import ConfigError
from distkv.workers.group.ray_errors import cause_of

log = logging.getLogger(__name__)

REACH_TIMEOUT = 10.0  # seconds to wait for the cluster's head to take a connection


class _Connection:
    """This process's connection to Ray, which all its groups share: whether distkv made it, and how many use it."""

    made_here = False
    users = 0


def connect(address: str | None, size: int) -> None:
    if not ray.is_initialized():
        _init(address or os.environ.get("RAY_ADDRESS"), size)
        _Connection.made_here = True
    _Connection.users += 1


def disconnect() -> None:
    """Ends the connection with its last user, unless it was there before."""
    _Connection.users -= 1
    if not _Connection.users and _Connection.made_here:
        _Connection.made_here = False
        ray.shutdown()


def _init(address: str | None, size: int) -> None:
    found = _running_cluster() if address in (None, "auto") else address
    if found is None and address == "auto":
        raise ConfigError("no Ray cluster runs on this machine; start one with `ray start --head`")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if found in (None, "local"):
        log.info("starting a Ray cluster on this machine for this process")
        ray.init(address="local", num_cpus=max(size, usable_cores()), include_dashboard=False, **quiet)
        return
    assert found is not None
    _check_reachable(found)
    try:
        ray.init(address=found, **quiet)
    except (RayError, RuntimeError, ValueError, ConnectionError) as error:
        raise ConfigError(
            f"the Ray cluster at {found!r} cannot be joined ({cause_of(error)}); "
            "is it running, and is its token in ~/.ray/auth_token here?"
        ) from error


def _running_cluster() -> str | None:
    """The cluster that `ray start` began last on this machine, if it still answers.

    Ray notes its address in a file that outlives a killed cluster, and would itself try that address for minutes.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        address = Path(folder, "ray", "ray_current_cluster").read_text().strip()
        _check_reachable(address)
    except (OSError, ConfigError):
        return None
    return address


def _check_reachable(address: str) -> None:
    """Raises ConfigError when nothing listens at `host:port`; Ray itself would go on trying for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray_address {address!r} is a Ray client's, and distkv must run inside the cluster's network; "
            "run it on a node with ray_address='auto', or as a job with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"ray_address is {address!r}; give host:port, 'auto' or 'local'")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at ray_address {address!r} ({error}); is it running?") from error
