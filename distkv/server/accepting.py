"""Connections, as many as the process has open files for: without a file that it can open nothing works, neither pages
on disk nor imports. More of them wait until others end. (asyncio's own server takes all it can, and logs a
traceback for each place in the queue, over and over.)"""

import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterable

from distkv.errors import ConfigError
from distkv.server.http_connection import HttpConnection

log = logging.getLogger(__name__)

SHARE = 5 / 8  # of the open files that a process may have; the disk tier takes a quarter, see `MAX_OPEN`
LEAST_FILES = 40
PAUSE = 0.1  # seconds after which it is looked for room again
PATIENCE = 1.0  # seconds for which a connection may be silent while others wait
WARN_SECONDS = 60.0  # between two warnings


def raise_file_limit() -> None:
    """Lets this process have as many files open as the system has it. Raises ConfigError when that is too few."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= most < LEAST_FILES:
        raise ConfigError(f"{most} files may be open, and a server needs {LEAST_FILES}; raise that first (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def accept(
    listener: socket.socket, make: Callable[[], HttpConnection], connections: Iterable[HttpConnection]
) -> None:
    """Accepts connections until it is cancelled.

    Args:
        make: makes the protocol of one.
        connections: those that there are.
    """
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    last_warning = -WARN_SECONDS
    while True:
        try:
            if _has_room(listener):
                connection, _ = await loop.sock_accept(listener)
                await loop.connect_accepted_socket(make, connection)
                continue
        except OSError as error:  # this one has gone again, or the system has no room
            log.debug("a connection was not accepted: %s", error)
        if time.monotonic() - last_warning >= WARN_SECONDS:
            last_warning = time.monotonic()
            log.warning(
                "connections wait: no more than %d files may be open; raise that before the start (ulimit -n)", _limit()
            )
        for one in list(connections):
            one.give_way(PATIENCE)
        await asyncio.sleep(PAUSE)


def _has_room(listener: socket.socket) -> bool:
    """Whether there are files left for more than the connections. Raises OSError when there are none at all."""
    lowest = os.dup(listener.fileno())  # the system gives the lowest number that is free
    os.close(lowest)
    return lowest < SHARE * _limit()


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
