"""Sizes and times as people read them, and contexts as they write them."""

import math
import re
from fractions import Fraction
from typing import Any

from distkv.errors import ConfigError
from distkv.option_checks import check_whole
from distkv.planner.request import MOST_TOKENS
from distkv.values import shown

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def parse_tokens(name: str, value: Any) -> int:
    """Tokens of a number, or of a text such as "4096", "4k", "1.5k" or "1M", where k is 1024 and M is 1024 of these."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kKmM]?)\s*", value)
        if match is not None:
            tokens = Fraction(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]
            if tokens.denominator == 1 and 1 <= tokens <= MOST_TOKENS:
                return int(tokens)
        raise ConfigError(f"{name} is {shown(value)}; give whole tokens such as 4096, 4k, 128k or 1M (k is 1024)")
    return check_whole(name, value, most=MOST_TOKENS)


def shown_tokens(count: int) -> str:
    """The same the other way round: "128k" for 131072, "1M" for 1048576."""
    for unit, size in (("M", 1024**2), ("k", 1024)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def option_bytes(count: int) -> str:
    """Exactly, as options take it: "512GiB", or plain bytes where no unit goes in whole."""
    unit = max((power for power in range(5) if count and count % 1024**power == 0), default=0)
    return f"{count // 1024**unit}{BYTE_UNITS[unit]}" if unit else str(count)


def rounded_up(count: int) -> int:
    """To a whole number of the unit that people would name it in, or of its eighths where these are few."""
    unit = 1024 ** min(4, max(0, (count.bit_length() - 1) // 10))
    step = unit if count >= 8 * unit else max(1, unit // 8)
    return -(-count // step) * step


def shown_bytes(count: float) -> str:
    """With a unit of 1024's power and three figures or so."""
    size, unit = abs(float(count)), 0
    while size >= 1024 and unit < len(BYTE_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    digits = 0 if unit == 0 or size >= 100 else 1 if size >= 10 else 2
    return f"{'-' if count < 0 else ''}{size:.{digits}f} {BYTE_UNITS[unit]}"


def shown_count(count: int) -> str:
    """Of parameters: in millions, or in billions of 10**9."""
    return f"{_three(count / 1e9)} billion" if count >= 1e9 else f"{_three(count / 1e6)} million"


def shown_seconds(seconds: float) -> str:
    """In ms below ten seconds, then in s, min or h."""
    if seconds < 10:
        return f"{_three(1e3 * seconds)} ms"
    if seconds < 600:
        return f"{_three(seconds)} s"
    return f"{_three(seconds / 60)} min" if seconds < 36000 else f"{_three(seconds / 3600)} h"


def shown_bandwidth(rate: float) -> str:
    """Of bytes per second, in GB."""
    return f"{rate / 1e9:.3g} GB/s"


def shown_share(share: float) -> str:
    """In percent."""
    return f"{_three(100 * share)} %"


def shown_rate(rate: float) -> str:
    """Per second, without an exponent."""
    return f"{rate:,.0f}" if rate >= 100 else _three(rate)


def _three(value: float) -> str:
    """Three figures, never with an exponent."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
