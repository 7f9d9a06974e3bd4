"""This process's connection to a Ray cluster: one that runs already, or one that is started for it."""

import atexit
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    lock = threading.Lock()  # held while that changes, and while it is being made


def connect(address: str | None, size: int) -> None:
    """Joins a cluster, or starts one with a core for each of `size` ranks, unless this process has a connection.

    Args:
        address: "host:port"; "auto" for RAY_ADDRESS or the cluster that `ray start` began last on this machine; "local"
            for one of our own; None as "auto", but for a cluster of another user, or else one of our own.

    Raises ConfigError when it cannot be joined, or this process is connected to another.
    """
    with _Connection.lock:
        if ray.is_initialized():
            _check_is_connected_to(address)
        else:
            _init(address, size)
            _Connection.made_here = True
        _Connection.users += 1


def disconnect() -> None:
    """Ends the connection with its last user, unless it was there before."""
    with _Connection.lock:
        _Connection.users -= 1
        if not _Connection.users and _Connection.made_here:
            _Connection.made_here = False
            ray.shutdown()


def _disown() -> None:
    """In a forked process: Ray's own end of the interpreter would wait for threads that are not there, and end the
    cluster of the parent."""
    if _Connection.users:
        atexit.unregister(ray.shutdown)


os.register_at_fork(after_in_child=_disown)


def _init(address: str | None, size: int) -> None:
    found, is_noted, reason = _choose(address)
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if found is None:
        log.info("starting a Ray cluster on this machine for this process: %s", reason)
        with _without_remark_on_signals():
            ray.init(address="local", num_cpus=max(size, usable_cores()), include_dashboard=False, **quiet)
        return
    log.info("joining the Ray cluster at %s: %s", found, reason)
    _check_reachable(found)
    try:
        with _without_remark_on_signals():
            # for "auto" alone does Ray use the token in ~/.ray, as the `ray start` that made the note has done
            ray.init(address="auto" if is_noted else found, **quiet)
    except (RayError, RuntimeError, ValueError, ConnectionError) as error:
        raise ConfigError(
            f"the Ray cluster at {found!r} cannot be joined ({cause_of(error)}); is it running? If it asks for a "
            "token, have that in ~/.ray/auth_token and set RAY_AUTH_MODE=token"
        ) from error


def _choose(address: str | None) -> tuple[str | None, bool, str]:
    """The address of the cluster to join, None to start one; whether `ray start` noted it here; and why."""
    given, name = address, "ray_address"
    if given in (None, "auto") and (inherited := os.environ.get("RAY_ADDRESS")):
        given, name = inherited, "RAY_ADDRESS"
    if given == "local":
        return None, False, f"{name} is 'local'"
    if given not in (None, "auto"):
        return given, False, f"{name} says so"
    note = _note()
    running, owner = _running_cluster(note)
    if given == "auto":
        if running is None:
            raise ConfigError("no Ray cluster runs on this machine; start one with `ray start --head`")
        return running, True, f"{name} is 'auto', and {note} names it"
    if running is None:
        return None, False, f"{name} is not set, and {note} names none that answers"
    if owner != os.geteuid():
        log.warning(
            "the Ray cluster at %s, which %s names, is another user's and is not joined; ray_address='auto' joins it",
            running, note,
        )  # fmt: skip
        return None, False, f"the cluster that {note} names is another user's"
    return running, True, f"`ray start` noted it in {note}; ray_address='local' starts one for this process alone"


def _note() -> Path:
    """Where `ray start` notes the address of the cluster that it began last on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")


def _running_cluster(note: Path) -> tuple[str | None, int]:
    """The cluster that is noted, if it still answers, and whose note it is. The note outlives a killed cluster, and Ray
    itself would try its address for minutes."""
    try:
        address, owner = note.read_text().strip(), note.stat().st_uid
        _check_reachable(address)
    except (OSError, ConfigError):
        return None, -1
    return address, owner


def _check_is_connected_to(address: str | None) -> None:
    """Raises ConfigError when this process uses another cluster than is asked for: it cannot use two."""
    current = ray.get_runtime_context().gcs_address
    log.info("using the Ray cluster at %s, to which this process is connected", current)
    if address in (None, "auto", "local"):
        return
    if not _same_address(address, current):
        raise ConfigError(
            f"ray_address is {address!r}, and this process is connected to the Ray cluster at {current}; call "
            "ray.shutdown() first, or leave ray_address out"
        )


def _same_address(one: str, other: str) -> bool:
    """Whether they name one place: Ray calls a cluster of this machine by the machine's address, whatever name led
    there."""
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    return port == other_port and (
        _resolved(host) == _resolved(other_host) or (_is_here(host) and _is_here(other_host))
    )


def _resolved(host: str) -> str:
    with suppress(OSError):
        return socket.gethostbyname(host)
    return host


def _is_here(host: str) -> bool:
    """Whether it is an address of this machine, which alone can be listened at."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


@contextmanager
def _without_remark_on_signals() -> Iterator[None]:
    """Ray remarks that it leaves SIGTERM alone in a thread that is not the main one."""
    logger = logging.getLogger("ray._private.worker")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


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
