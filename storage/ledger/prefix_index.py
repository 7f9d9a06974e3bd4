"""Finds full pages by their content: the chain of keys over all tokens up to a page's end.

A key is SHA-256 over the key of the page before and the page's tokens. The first page's parent is a root, which stands
for everything else that keys and values depend on, and for the tenant.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

from distkv.storage.ledger.page import Page, PageName


def root_key(fingerprint: str, cache_salt: str | None) -> bytes:
    """The parent of first pages: `fingerprint` names model and KV format, and pages of different salts never meet."""
    salt = b"" if cache_salt is None else b"salt" + cache_salt.encode()
    return sha256(fingerprint.encode() + b"\0" + salt).digest()


def page_name(parent: bytes, token_ids: Sequence[int]) -> PageName:
    """The name of the full page with these tokens that follows page `parent`."""
    values = array("I", token_ids)
    if sys.byteorder == "big":
        values.byteswap()
    tokens = values.tobytes()
    return PageName(sha256(parent + tokens).digest(), parent, tokens)


def page_names(root: bytes, token_ids: Sequence[int], page_size: int) -> Iterator[PageName]:
    """The names of all full pages of a sequence, in order."""
    parent = root
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        name = page_name(parent, token_ids[start : start + page_size])
        yield name
        parent = name.key


class PrefixIndex:
    """Named pages, each under its key."""

    def __init__(self) -> None:
        self._pages: dict[bytes, Page] = {}
        self._followers: dict[bytes, dict[Page, None]] = {}  # of each parent

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Page]:
        return iter(list(self._pages.values()))

    def add(self, page: Page, name: PageName) -> Page:
        """Enters a page under a name; returns the page that has this key then, which may be another one that was there
        before."""
        known = self._pages.setdefault(name.key, page)
        if known is page:
            page.name = name
            self._followers.setdefault(name.parent, {})[page] = None
        return known

    def remove(self, page: Page) -> list[Page]:
        """Takes a page out, which loses its name; returns the pages that follow it, which nobody can find any more."""
        name, page.name = page.name, None
        assert name is not None
        del self._pages[name.key]
        siblings = self._followers[name.parent]
        del siblings[page]
        if not siblings:
            del self._followers[name.parent]
        return list(self._followers.get(name.key, ()))

    def longest(self, names: Iterable[PageName]) -> list[Page]:
        """The pages of the longest known prefix of a chain. Tokens are compared, not keys alone."""
        found = []
        for name in names:
            page = self._pages.get(name.key)
            if page is None or page.name != name:
                break
            found.append(page)
        return found
