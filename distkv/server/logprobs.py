"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distkv.outputs import CompletionOutput, Logprob

Table = Mapping[int, Logprob]
LEAST = -9999.0  # what JSON has no word for, as vLLM writes it


@dataclass(frozen=True)
class Echo:
    """A prompt that its answers begin with. Its first token, which nothing comes before, has no log-probability."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Table | None]  # as many, where answers have them
    first_token: str


def completion_logprobs(answer: CompletionOutput, offset: int, echo: Echo | None = None) -> dict[str, Any] | None:
    """Of an answer, or a part of one, for `/v1/completions`; None where they were not asked for.

    Args:
        offset: characters of the answer's tokens before this part, each token's text by itself.
        echo: the prompt, where its tokens come first.
    """
    if answer.logprobs is None:
        return None
    entries: list[tuple[int, Table | None]] = list(zip(answer.token_ids, answer.logprobs, strict=True))
    if echo is not None:
        entries = [*zip(echo.token_ids, echo.logprobs, strict=True), *entries]
    tokens, offsets = [], []
    for token_id, table in entries:
        if table is None:
            assert echo is not None
            tokens.append(echo.first_token)
        else:
            tokens.append(_text(token_id, table))
        offsets.append(offset)
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": [None if table is None else _value(table[one]) for one, table in entries],
        "top_logprobs": [None if table is None else _by_text(table) for _, table in entries],
        "text_offset": offsets,
    }


def chat_logprobs(answer: CompletionOutput, num_top: int) -> dict[str, Any] | None:
    """Of an answer, or a part of one, for `/v1/chat/completions`, with so many of the likeliest tokens."""
    if answer.logprobs is None:
        return None
    content = []
    for token_id, table in zip(answer.token_ids, answer.logprobs, strict=True):
        top = [_entry(one, table) for one in table if table[one].rank <= num_top]
        content.append(_entry(token_id, table) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _by_text(table: Table) -> dict[str, float]:
    """Where several tokens have one text, as parts of characters do, the likeliest counts."""
    found: dict[str, float] = {}
    for token_id in table:
        found.setdefault(_text(token_id, table), _value(table[token_id]))
    return found


def _entry(token_id: int, table: Table) -> dict[str, Any]:
    text = _text(token_id, table)
    return {"token": text, "logprob": _value(table[token_id]), "bytes": list(text.encode())}


def _text(token_id: int, table: Table) -> str:
    text = table[token_id].decoded_token
    return f"token_id:{token_id}" if text is None else text


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, LEAST)
