"""The text of an answer, token by token."""

from typing import Protocol

KEPT_TOKENS = 8  # that a window is cut to, and that it begins with; see `IncrementalDecoder`
MOST_TOKENS = 12  # of a window before it is cut to these

UNFINISHED = "\ufffd"


class TokenDecoder(Protocol):
    """What is asked of a tokenizer."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, special ones left out."""

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at the token: it is known, and not special."""

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is a single byte for which the vocabulary has nothing better."""


class IncrementalDecoder:
    """Decodes an answer token by token: text is given out once no later token can change it, and in all it is the text
    of prompt and answer decoded as a whole, behind as many characters as the prompt has.

    A window of the last tokens is decoded at a time, so that a token costs as much in any answer. It begins with tokens
    whose text was given out, by which the first new one keeps its leading space. Two things let text change later:

    - A character may lack some of its bytes. It then is one U+FFFD at the end of the text, which waits for the next
      token. Four bytes make a character, so the last `KEPT_TOKENS` tokens always hold one that was given out.
    - Byte tokens in a row are decoded together: one that fits none of them may undo all. They wait for the token behind
      them, and are not decoded until then.
    """

    def __init__(self, tokenizer: TokenDecoder, prompt_token_ids: list[int]):
        self._tokenizer = tokenizer
        self._window = _end_of(prompt_token_ids, tokenizer)
        self._text = tokenizer.decode(self._window) if self._window else ""
        self._is_behind = False  # the text: bytes at the end of the window wait for the token behind them
        self._num_given = len(self._text)  # characters of it
        self._num_whole = 0 if self._text.endswith(UNFINISHED) else len(self._window)  # tokens before the last ones

    @property
    def is_waiting(self) -> bool:
        """Whether text waits for the next token."""
        return self._is_behind or self._num_given < len(self._text)

    def add(self, token_id: int) -> str:
        """The text that this token completes."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._window.append(token_id)
        self._is_behind = self._tokenizer.is_byte(token_id)
        if self._is_behind:
            return ""
        self._text = self._tokenizer.decode(self._window)
        if self._text.endswith(UNFINISHED):
            given = self._give(len(self._text) - 1)
            is_cut = False
        else:
            given = self._give(len(self._text))
            last, self._num_whole = self._window[self._num_whole :], len(self._window)
            is_cut = self._cut(last)
        if not is_cut and len(self._window) > MOST_TOKENS:
            self._cut(self._window[-KEPT_TOKENS:])
        return given

    def finish(self) -> str:
        """What is left at the end: the replacement character for a character that was never completed."""
        if self._is_behind:
            self._text, self._is_behind = self._tokenizer.decode(self._window), False
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        """The text up to there, but for what was given out before."""
        given = self._text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return given

    def _cut(self, window: list[int]) -> bool:
        """Goes on with the end of the window, if that has a character that was given out, and all behind it."""
        text, num_waiting = self._tokenizer.decode(window), len(self._text) - self._num_given
        if not self._num_given or not text.endswith(self._text[self._num_given - 1 :]):
            return False
        self._num_whole = max(0, self._num_whole - len(self._window) + len(window))
        self._window, self._text, self._num_given = window, text, len(text) - num_waiting
        return True


def _end_of(prompt_token_ids: list[int], tokenizer: TokenDecoder) -> list[int]:
    """The last tokens of a prompt that have text, from one on that is no byte."""
    found: list[int] = []
    for token_id in reversed(prompt_token_ids):
        if tokenizer.has_text(token_id):
            found.append(token_id)
            if len(found) >= KEPT_TOKENS and not tokenizer.is_byte(token_id):
                break
    return found[::-1]
