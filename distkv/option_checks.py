"""Options as users give them, of any of the types that mean the same, made one type. What cannot be used raises
ConfigError, with the name of the option and what it may be."""

import operator
import os
import re
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

from distkv.errors import ConfigError
from distkv.values import plain, shown

UNITS = {"": 1, "B": 1}
UNITS |= {letter + end: 1000**power for power, letter in enumerate("KMGT", 1) for end in ("", "B")}
UNITS |= {letter + end: 1024**power for power, letter in enumerate("KMGT", 1) for end in ("I", "IB")}
MOST_BYTES = 2**63 - 1
MOST = 2**31 - 1  # of tokens, sequences and the like
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


def check_whole(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """A whole number from `least` to `most`, numpy's included."""
    number = _whole(value)
    if number is None or not least <= number <= most:
        raise ConfigError(f"{name} is {shown(value)}; it must be an integer from {least} to {most}")
    return number


def check_name(name: str, value: Any) -> str:
    """A name that may be a file's too."""
    if not isinstance(value, str) or NAME.fullmatch(value) is None:
        raise ConfigError(
            f"{name} is {shown(value)}; use up to 64 letters, digits and '-', '_' or '.', with no dot at the beginning"
        )
    return value


def raise_to(name: str, value: int) -> str:
    """What to do, for an error: from Python and on the command line."""
    return f"raise {name} to {value} (--{name.replace('_', '-')} {value})"


def check_ray_address(address: Any) -> None:
    """None, or a text that is not blank."""
    if address is not None and not (isinstance(address, str) and address.strip()):
        raise ConfigError(f"ray_address is {shown(address)}; give a text such as 'auto'")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of these texts."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} is {shown(value)}; use one of {', '.join(choices)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """True or False, or 1 or 0, numpy's included."""
    found = plain(value)
    if not isinstance(found, int) or found not in (0, 1):
        raise ConfigError(f"{name} is {shown(value)}; use True or False")
    return bool(found)


def check_share(name: str, value: Any) -> float:
    """A number above 0 and at most 1."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ConfigError(f"{name} is {shown(value)}; use a share above 0 and at most 1")
    return float(value)


def check_share_or(name: str, value: Any, words: tuple[str, ...]) -> float | str:
    """A number above 0 and at most 1, as a text too, or one of these words."""
    if isinstance(value, str) and value in words:
        return value
    try:
        return check_share(name, float(value) if isinstance(value, str) else value)
    except (ConfigError, ValueError):
        raise ConfigError(
            f"{name} is {shown(value)}; use {', '.join(words)} or a share above 0 and at most 1"
        ) from None


def check_amount(name: str, value: Any) -> float:
    """A finite number above 0."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {shown(value)}; use a finite number above 0")
    return float(value)


def parse_bytes(name: str, size: Any, least: int = 1) -> int:
    """Bytes of a whole number, 4e9 among them, or of a text such as "512MB", "1.5 GiB", "4Gi" or "4096", at least so
    many. Units with an i are powers of 1024, the others of 1000."""
    found = plain(size)
    number = int(found) if isinstance(found, float) and found.is_integer() else _whole(size)
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-zA-Z]*)\s*", size)
        if match is not None and match[2].upper() in UNITS:
            number = int(Fraction(match[1]) * UNITS[match[2].upper()])
            if not number and Fraction(match[1]):  # less than a byte is not the same as none
                number = None
    if number is None or not least <= number <= MOST_BYTES:
        raise ConfigError(
            f"{name} is {shown(size)}; give bytes as a positive whole number or a text such as 512MB or 4GiB"
            + (", or 0 for none" if not least else "")
        )
    return number


def settle_path(name: str, path: Any) -> Path:
    """The absolute path of a file or folder, with ~ as the home folder: it stays the same when the process goes to
    another folder."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ConfigError(f"{name} is {shown(path)}; give the path of a file or folder, or '.' for the current one")
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # nobody of that name has a home, or the current folder has been removed
        raise ConfigError(f"{name} is {shown(path)}, which leads nowhere: {error}; give an absolute path") from error


def _whole(value: Any) -> int | None:
    """Any integer as Python's; None for all else, True and False among them."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
