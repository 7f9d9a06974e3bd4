"""Stop strings in text that comes piece by piece."""


class StopStrings:
    """Looks for stop strings in a text that grows, wherever the borders of its pieces lie.

    Its last characters are held back as long as they might be the beginning of one.
    """

    def __init__(self, stops: list[str], keeps: bool = False):
        """
        Args:
            keeps: whether the text ends behind the stop string, not before it.
        """
        self._stops = stops
        self._keeps = keeps
        self._most_held = max((len(stop) - 1 for stop in stops), default=0)  # characters
        self._held = ""
        self.found: str | None = None  # the one that ended the text

    def add(self, piece: str, looks: bool = True) -> str:
        """Takes the next piece; returns the text that it sets free, which ends at the earliest stop string that it
        completes.

        Args:
            looks: whether a stop string that this piece completes counts.
        """
        num_held, text = len(self._held), self._held + piece
        found = []
        for stop in self._stops if looks else ():
            index = text.find(stop, max(0, num_held - len(stop) + 1))
            if index >= 0:
                found.append((index, stop))
        if found:
            end, self.found = min(found)
            end += len(self.found) * self._keeps
            self._held = ""
        else:
            end = max(0, len(text) - self._most_held)
            self._held = text[end:]
        return text[:end]

    def release(self) -> str:
        """Returns what was held back, once the text has ended; nothing where a stop string ended it."""
        held, self._held = self._held, ""
        return held
