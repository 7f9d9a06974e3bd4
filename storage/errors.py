"""The errors that the cache raises on purpose. Every message says what is wrong and what to do about it."""

from typing import Any


class DistKVError(Exception):
    """Base of all errors below; catching it catches every error distkv raises on purpose.

    Attributes:
        output: the `RequestOutput` of a request that had begun and could not go on, with what there is of it; None
            with all other errors.
    """

    output: Any = None


class ConfigError(DistKVError, ValueError):
    """An engine option, a model folder or a checkpoint that cannot be used; names the field and what is supported."""


class CapacityError(DistKVError):
    """The memory that was configured cannot hold what was asked for; states both sizes and the option to change."""


class StoreError(DistKVError):
    """Stored data could not be fetched, written or verified; names what and why."""
