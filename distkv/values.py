"""Values as callers give them, numpy's and torch's beside Python's own; a check raises nothing but RequestError."""

import numbers
import reprlib
import sys
from typing import Any

from distkv.errors import RequestError

MOST_QUOTED = 300  # characters of a file or an error

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def plain(value: Any) -> Any:
    """A scalar or an array of numpy, torch and the like as Python's numbers and lists; all else as it is."""
    convert = getattr(value, "tolist", None)
    if convert is None or isinstance(value, type):
        return value
    try:
        return convert()
    except Exception:  # then it is none of them, and is refused as what it is
        return value


def shown(value: Any) -> str:
    """A value as an error shows it: shortened, and whatever its own repr may do."""
    try:
        return _REPR.repr(value)
    except Exception:  # an integer of more digits than Python prints, say
        return f"an unprintable {type(value).__name__}"


def quoted(value: Any) -> str:
    """Text of a file that anybody may have made, or of an error about it: shortened, on one line and without control
    characters, which a terminal would follow."""
    text = str(value)
    short = text if len(text) <= MOST_QUOTED else text[:MOST_QUOTED] + "..."
    return "".join(one if one.isprintable() else " " for one in short)


def integer(name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """A value as an integer within these limits. Raises RequestError with the name for another one."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
        raise RequestError(f"{name} is {shown(value)}; it must be an integer from {low} to {high}")
    return int(found)


def number(name: str, value: Any, low: float, high: float = sys.float_info.max, low_open: bool = False) -> int | float:
    """A value as a finite number within these limits. Raises RequestError with the name for another one."""
    found = plain(value)
    is_number = isinstance(found, numbers.Real) and not isinstance(found, bool)
    if not is_number or not low <= found <= high or (low_open and found == low):
        above = f"above {low}" if low_open else f"of at least {low}"
        limits = f"finite number {above}" if high == sys.float_info.max else f"number {above} and at most {high}"
        raise RequestError(f"{name} is {shown(value)}; it must be a {limits}")
    return found if isinstance(found, int) else float(found)


def flag(name: str, value: Any) -> bool:
    """A value as True or False. Raises RequestError with the name for another one."""
    found = plain(value)
    if not isinstance(found, bool):
        raise RequestError(f"{name} is {shown(value)}; it must be True or False")
    return found


def text(value: Any) -> str | None:
    """A value as a text of Unicode, without the lone surrogates that stand for bytes of other encodings, else None."""
    found = plain(value)
    try:
        return str(found) if isinstance(found, str) and found.encode() is not None else None
    except UnicodeEncodeError:
        return None


def listed(value: Any) -> list[Any] | None:
    """A list, tuple, range or array as a list with Python's numbers; None for all else, a text among it."""
    found = plain(value)
    if not isinstance(found, list | tuple | range):
        return None
    return [plain(one) for one in found]
