"""What a check has to say."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How much is wrong."""

    OK = "ok"
    WARNING = "warning"  # it runs, and slower or with less than the machine could give
    PROBLEM = "problem"  # something does not run


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    said: str
    cure: str = ""  # where something is wrong


def fine(what: str, said: str) -> Finding:
    """Nothing is wrong with it."""
    return Finding(what, State.OK, said)


def warning(what: str, said: str, cure: str) -> Finding:
    """It could be better."""
    return Finding(what, State.WARNING, said, cure)


def problem(what: str, said: str, cure: str) -> Finding:
    """It does not work."""
    return Finding(what, State.PROBLEM, said, cure)
