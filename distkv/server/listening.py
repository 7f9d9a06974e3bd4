"""Where a server listens."""

import logging
import socket

from distkv.client.card import is_loopback
from distkv.errors import ConfigError
from distkv.server.options import KEY_VARIABLE

log = logging.getLogger(__name__)

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the first address of a host; raises ConfigError where none can."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(BACKLOG)  # whoever finds the server by its name may come before it answers
            return found
        except BaseException:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        raise cannot_listen(host, port, str(error)) from error


def cannot_listen(host: str, port: int, why: str) -> ConfigError:
    """The error to raise for an address."""
    return ConfigError(f"{host!r}, port {port}, cannot be listened on ({why}); give another --host or --port")


def warn_if_open(host: str, api_key: str | None) -> None:
    """Warns of a server that anybody can use who reaches its machine."""
    if api_key is None and not is_loopback(host):
        log.warning(
            "distkv listens on %s without an API key: whoever reaches this port can use it; set %s, or listen "
            "on 127.0.0.1", host, KEY_VARIABLE,
        )  # fmt: skip
