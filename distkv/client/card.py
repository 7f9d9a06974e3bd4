"""What a named server tells those who look for it at a Ray cluster, where a named actor holds it."""

from ipaddress import ip_address

import msgspec

NAMESPACE = "distkv"
"""Ray's, of the actors that are named after servers."""


class Card(msgspec.Struct, frozen=True):
    """Where a server is reached. Whoever may join the cluster may read it, the key too."""

    url: str
    node_id: str  # Ray's, of the node that it runs on
    version: str
    api_key: str | None = None


def http_url(host: str, port: int) -> str:
    """The URL of what listens there; `host` may be an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is reached from its own machine alone."""
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
