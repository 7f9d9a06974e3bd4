"""The options of `distkv serve` for replicas."""

from dataclasses import dataclass

from distkv.errors import ConfigError
from distkv.option_checks import check_whole
from distkv.option_help import explained


@explained
@dataclass(frozen=True)
class ReplicaOptions:
    """Options of `distkv serve` beside the server's and the engine's; raises ConfigError when one is out of range."""

    replicas: int | None = None
    """Engines behind one address, as an application of Ray Serve.

    Each has tensor_parallel_size ranks. None serves from this process.
    """
    route_prefix: str = "/"
    """Path below which the application answers; with replicas.

    Two applications on one cluster need different ones.
    """

    def __post_init__(self) -> None:
        if self.replicas is not None:
            check_whole("replicas", self.replicas)
        elif self.route_prefix != "/":
            raise ConfigError("route_prefix would have no effect without replicas; leave it out, or set replicas")
        if not self.route_prefix.startswith("/") or (self.route_prefix != "/" and self.route_prefix.endswith("/")):
            raise ConfigError(f"route_prefix is {self.route_prefix!r}; give a path such as /chat, or / alone")
