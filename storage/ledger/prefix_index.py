"""Finds full pages by their content: the chain of keys over all tokens up to a page's end.

A key is SHA-256 over the key of the page before and the page's tokens. The first page's parent is a root, which stands
for everything else that keys and values depend on, and for the tenant.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

from distkv.storage.ledger.page import Page, PageKey


def root_key(fingerprint: str, cache_salt: str | None) -> bytes:
    """The parent of first pages: `fingerprint` names model and KV format, and pages of different salts never meet."""
    salt = b"" if cache_salt is None else b"salt" + cache_salt.encode()
    return sha256(fingerprint.encode() + b"\0" + salt).digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> PageKey:
    """The key of the full page with these tokens that follows page `parent`."""
    values = array("I", token_ids)
    if sys.byteorder == "big":
        values.byteswap()
    tokens = values.tobytes()
    return PageKey(sha256(parent + tokens).digest(), parent, tokens)


def page_keys(root: bytes, token_ids: Sequence[int], page_size: int) -> Iterator[PageKey]:
    """The keys of all full pages of a sequence, in order."""
    parent = root
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        key = page_key(parent, token_ids[start : start + page_size])
        yield key
        parent = key.digest


class PrefixIndex:
    """The pages that have a key, each under it."""

    def __init__(self) -> None:
        self.num_changes = 0  # after which a search may find something else
        self._pages: dict[bytes, Page] = {}
        self._followers: dict[bytes, dict[Page, None]] = {}  # of each parent

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Page]:
        return iter(list(self._pages.values()))

    def has(self, digest: bytes) -> bool:
        """Whether a page has this key."""
        return digest in self._pages

    def add(self, page: Page, key: PageKey) -> Page:
        """Enters a page under a key; returns the page that has this key then, which may be another one that was there
        before."""
        known = self._pages.setdefault(key.digest, page)
        if known is page:
            self.num_changes += 1
            page.key = key
            self._followers.setdefault(key.parent, {})[page] = None
        return known

    def remove(self, page: Page) -> list[Page]:
        """Takes a page out, which loses its key; returns the pages that follow it, which nobody can find any more."""
        self.num_changes += 1
        key, page.key = page.key, None
        assert key is not None
        del self._pages[key.digest]
        siblings = self._followers[key.parent]
        del siblings[page]
        if not siblings:
            del self._followers[key.parent]
        return list(self._followers.get(key.digest, ()))

    def get(self, key: PageKey) -> Page | None:
        """The page that has a key, None without one. Tokens are compared, not keys alone."""
        page = self._pages.get(key.digest)
        return page if page is not None and page.key == key else None

    def longest(self, keys: Iterable[PageKey]) -> list[Page]:
        """The pages of the longest known prefix of a chain."""
        found = []
        for key in keys:
            page = self.get(key)
            if page is None:
                break
            found.append(page)
        return found
