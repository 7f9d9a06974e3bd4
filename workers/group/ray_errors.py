"""What Ray's errors say of why a rank's call failed."""

import os
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

TOKENS_DIFFER = (
    "the cluster has been started without tokens and this process uses one (RAY_AUTH_MODE is 'token'; Ray sets that "
    "for a process that has had a cluster of its own, or that found a token in ~/.ray); start the cluster again, or "
    "run this with RAY_AUTH_MODE=disabled"
)


def failure_of(ref: Any) -> Exception | None:
    """What a finished call ended with, or None when it returned."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def cause_of(error: BaseException) -> str:
    """What is known of why a call failed, in a line."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not isinstance(error, ActorDiedError):
        return lines[-1]
    # Ray's own account, without its list of common causes
    known = next((line for line in lines if line.startswith("The actor is dead")), lines[0])
    return known.partition(" Some common causes")[0].rstrip(".")


def tokens_differ(error: BaseException) -> bool:
    """Whether an actor never ran since the cluster sends no token with its calls and this process wants one: Ray takes
    the process for dead then, and all that it owns for unused."""
    unused = "all references to the actor were removed" in str(error) or "never ran" in str(error)
    return isinstance(error, ActorDiedError) and unused and os.environ.get("RAY_AUTH_MODE") == "token"
