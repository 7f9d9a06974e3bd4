"""Words that answers are kept from, as tokens."""

from distkv.errors import RequestError
from distkv.frontend.tokenizer import Tokenizer


def bad_words_token_ids(words: list[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """What each word is encoded to, by itself and behind a blank, where that differs. Raises RequestError without a
    tokenizer."""
    if not words:
        return []
    if tokenizer is None:
        raise RequestError("bad_words need text, and the model has no tokenizer; use allowed_token_ids or logit_bias")
    found: list[list[int]] = []
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            token_ids = tokenizer.encode(text, special=False)
            if token_ids not in found:
                found.append(token_ids)
    return found
