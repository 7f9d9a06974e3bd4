"""The text of an answer, token by token, up to a stop string."""

from distkv.frontend.tokenizer import IncrementalDecoder


class AnswerText:
    """Decodes tokens and looks for stop strings. Of a text that goes on, the last characters are held back as long as
    they might be the beginning of one."""

    def __init__(self, decoder: IncrementalDecoder | None, stops: list[str]):
        """Without a decoder the text is empty."""
        self._decoder = decoder
        self._stops = stops
        self._num_held_back = max((len(stop) - 1 for stop in stops), default=0)
        self._held_back = ""
        self.stopped_by: str | None = None

    def add(self, token_id: int, ends_here: bool, is_text: bool) -> str:
        """The text that the next token makes certain.

        Args:
            ends_here: the answer ends with this token.
            is_text: False for an end token, which is not part of the text.
        """
        if self._decoder is None:
            return ""
        new = self._decoder.add(token_id) if is_text else ""
        if ends_here:
            new += self._decoder.finish()
        text = self._held_back + new
        # a stop string that was there before would have ended the answer
        found = [
            (place, stop)
            for stop in self._stops
            if (place := text.find(stop, max(0, len(text) - len(new) - len(stop) + 1))) >= 0
        ]
        if found:
            place, self.stopped_by = min(found)
            self._held_back = ""
            return text[:place]
        if ends_here:
            self._held_back = ""
            return text
        certain = max(0, len(text) - self._num_held_back)
        self._held_back = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, when the answer ends where it stands."""
        held_back, self._held_back = self._held_back, ""
        return held_back
