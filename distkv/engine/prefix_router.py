"""Which of several engines is to answer a request: the one that knows its beginning, as long as that has room."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from distkv.storage.ledger.prefix_index import page_keys, root_key

MOST_KEYS = 2**18  # that are remembered; the oldest are forgotten


def prefix_keys(token_ids: Sequence[int], page_size: int, cache_salt: str | None) -> list[bytes]:
    """A key for each full page of a prompt that may be found, which stands for all tokens up to its end, and for whom
    the pages are shared with. The last token is computed in any case."""
    root = root_key("", cache_salt)
    return [key.digest for key in page_keys(root, token_ids[:-1], page_size)]


class PrefixRouter:
    """Remembers which engine was sent which beginnings, and takes the least of two costs together: the share of the
    prompt that the engine has to compute, and the share of its slots that are taken.

    So a known beginning is worth as much as an engine that is empty instead of full. What is remembered is a guess: an
    engine may have dropped pages since.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, dict[str, None]] = OrderedDict()  # the engines by key, last used last
        self._num_keys: dict[str, int] = {}  # by engine

    def choose(self, keys: Sequence[bytes], loads: Mapping[str, float]) -> str:
        """The engine for a prompt, which is taken to know it from now on.

        Args:
            keys: of the prompt, see `prefix_keys`.
            loads: the share of its slots that requests have taken, by engine that may be chosen; above 1 some wait.
        """
        found = self._num_found(keys, loads)
        # what costs the same evens out what engines have, and else goes by name, in which all routers agree
        chosen = min(
            loads, key=lambda name: (loads[name] - found[name] / max(1, len(keys)), self._num_keys.get(name, 0), name)
        )
        self._note(keys, chosen)
        return chosen

    def forget(self, engine: str) -> None:
        """Takes an engine for one that knows nothing: it has ended."""
        if self._num_keys.pop(engine, 0):
            for key in [key for key, engines in self._known.items() if engine in engines]:
                del self._known[key][engine]
                if not self._known[key]:
                    del self._known[key]

    def _num_found(self, keys: Sequence[bytes], engines: Mapping[str, float]) -> dict[str, int]:
        """How many pages of a prompt each engine knows."""
        found = dict.fromkeys(engines, 0)
        left = set(engines)
        for count, key in enumerate(keys, 1):
            left &= self._known.get(key, {}).keys()
            if not left:
                break
            found |= dict.fromkeys(left, count)
        return found

    def _note(self, keys: Sequence[bytes], engine: str) -> None:
        for key in reversed(keys):  # so that the end of a chain is forgotten before its beginning
            engines = self._known.setdefault(key, {})
            if engine not in engines:
                engines[engine] = None
                self._num_keys[engine] = self._num_keys.get(engine, 0) + 1
            self._known.move_to_end(key)
        while len(self._known) > MOST_KEYS:
            _, engines = self._known.popitem(last=False)
            for name in engines:
                self._num_keys[name] -= 1
