"""The tokens of an answer as its reader saw it, of which a stop string may have cut the text."""

from distkv.frontend.incremental_decoder import IncrementalDecoder
from distkv.frontend.tokenizer import TextOfAllTokens, Tokenizer

MOST_WAITING = 8  # tokens before the cut that are tried one by one, for text that waited for the token that was cut
MOST_REPLACED = 16  # places before the cut from which on the text is encoded anew


def decoded_text(tokenizer: Tokenizer | TextOfAllTokens, prompt_token_ids: list[int], token_ids: list[int]) -> str:
    """The text of tokens behind a prompt."""
    decoder = IncrementalDecoder(tokenizer, prompt_token_ids)
    return "".join(map(decoder.add, token_ids)) + decoder.finish()


def seen_tokens(
    tokenizer: Tokenizer | TextOfAllTokens, prompt_token_ids: list[int], token_ids: list[int], text: str
) -> list[int] | None:
    """Tokens behind the prompt that decode to `text`, the beginning of what `token_ids` decode to: these as far as they
    agree, and then what is seen of a token that was cut, encoded anew. None where no encoding gives that text."""
    decoder, end = IncrementalDecoder(tokenizer, prompt_token_ids), 0
    agreed = [(0, 0)]  # tokens and characters
    num_read = 0
    for token_id in token_ids:
        piece = decoder.add(token_id)
        if not text.startswith(piece, end):
            break
        num_read, end = num_read + 1, end + len(piece)
        if end > agreed[-1][1] and not decoder.is_waiting:
            agreed.append((num_read, end))
    else:
        if text[end:] == decoder.finish():
            return list(token_ids)

    def decoded(kept: list[int], more: list[int]) -> str:
        return decoded_text(tokenizer, prompt_token_ids + kept, more)

    num_agreed, end = agreed[-1]
    for count in range(num_read, max(num_agreed, num_read - MOST_WAITING), -1):
        waited = decoded(token_ids[:num_agreed], token_ids[num_agreed:count])
        if waited and text.startswith(waited, end):
            agreed.append((count, end + len(waited)))
            break
    for count, end in agreed[: -MOST_REPLACED - 1 : -1]:
        kept, rest = token_ids[:count], text[end:]
        if not rest:
            return kept
        for spelling in {rest, rest.removeprefix(" ")} - {""}:  # a tokenizer may put a space before any text
            more = tokenizer.encode(spelling, special=False)
            if decoded(kept, more) == rest:
                return kept + more
    return None
