"""Things that are described by hand, such as "memory=48GiB,bandwidth=900GB"."""

from collections.abc import Collection, Iterator

from distkv.errors import ConfigError
from distkv.values import shown


def split_pairs(what: str, text: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Keys and values, each key one of the known ones and given once. Raises ConfigError.

    Args:
        what: of what they are, as a user calls it.
    """
    seen = set()
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in known or key in seen:
            listed = ", ".join(f"{one}=..." for one in known)
            raise ConfigError(f"{shown(part)} in {what} {shown(text)} is not one of {listed}, each given once")
        seen.add(key)
        yield key, value.strip()
