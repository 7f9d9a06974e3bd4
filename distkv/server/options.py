"""The options of a server, checked in one place."""

import os
from dataclasses import dataclass, field

from distkv.errors import ConfigError
from distkv.option_checks import check_choice, check_name, check_whole, parse_bytes
from distkv.option_help import explained

KEY_VARIABLE = "DISTKV_API_KEY"
QUEUED_REQUESTS = 1024  # `EngineConfig.max_queued_requests` of a server, unless it is given
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@explained
@dataclass(frozen=True)
class ServerOptions:
    """Options of `distkv serve` beside the engine's; raises ConfigError when one is out of range."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """Port to listen on; 0 for one that is free."""
    served_model_name: list[str] | None = None
    """Name that clients call the model by; may be given several times.

    Answers carry the first one. None takes the model as it was given.
    """
    name: str | None = None
    """Name by which `Client.attach` finds the server on a Ray cluster.

    The cluster is the one that ray_address names, or else RAY_ADDRESS, or the one of this machine; the engine need not
    run there. One server at a time has a name.
    """
    api_key: str | None = field(default=None, repr=False)
    """Key that clients must send; better given as DISTKV_API_KEY.

    It guards all but /health and /livez, and comes as `Authorization: Bearer KEY` or `x-api-key: KEY`; a browser asks
    for a name, which may be any, and for the key as the password. None takes the environment's, if that has one.
    """
    max_stored_responses: int = 1024
    """Most responses of /v1/responses that are stored, to be gone on from.

    The oldest are dropped beyond them. With 0 none is stored.
    """
    max_body_bytes: int | str = "64MiB"
    """Most bytes of a request's body."""
    cache_transfer_bytes: int | str | None = None
    """Largest file of KV pages that clients may send to /cache/import.

    It allows /cache/export too; None allows neither. There must be a key, since whoever may import can have pages used
    that are not those of their tokens, and whoever may export reads what others have said.
    """
    shutdown_timeout: int | None = None
    """Most seconds for what runs to end after SIGTERM.

    None waits for all of it. A second signal ends at once.
    """
    uvicorn_log_level: str = "warning"
    """What the HTTP server logs: error, warning, info (each request), debug or trace."""

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host.strip():
            raise ConfigError(f"host is {self.host!r}; give an address such as 127.0.0.1")
        self._set("port", check_whole("port", self.port, 0, 65535))
        names = self.served_model_name or None
        if names is not None and not all(isinstance(name, str) and name.strip() for name in names):
            raise ConfigError(f"served_model_name is {names!r}; give names that are not empty")
        self._set("served_model_name", names)
        if self.name is not None:
            check_name("name", self.name)
        key = os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key
        if key is not None and (not key.strip() or not key.isascii() or not key.isprintable()):
            raise ConfigError(
                f"the API key is empty or has other than printable ASCII characters; give another one in "
                f"{KEY_VARIABLE}, or none at all"
            )
        self._set("api_key", key)
        self._set("max_stored_responses", check_whole("max_stored_responses", self.max_stored_responses, 0))
        self._set("max_body_bytes", parse_bytes("max_body_bytes", self.max_body_bytes))
        if self.cache_transfer_bytes is not None:
            self._set("cache_transfer_bytes", parse_bytes("cache_transfer_bytes", self.cache_transfer_bytes))
            if key is None:
                raise ConfigError(
                    f"cache_transfer_bytes allows what only those may do who have the key; set one in {KEY_VARIABLE}"
                )
        if self.shutdown_timeout is not None:
            self._set("shutdown_timeout", check_whole("shutdown_timeout", self.shutdown_timeout))
        check_choice("uvicorn_log_level", self.uvicorn_log_level, LOG_LEVELS)

    def _set(self, name: str, value: object) -> None:
        """What a user has given as the one type that all of the server reads."""
        object.__setattr__(self, name, value)
