"""Grammars over a model's vocabulary, by llguidance. It is loaded when the first request asks for one."""

import json
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distkv.errors import RequestError
from distkv.structured_outputs.params import StructuredOutputsParams
from distkv.workers.sampling.grammar import Grammar
from distkv.workers.sampling.row_edits import token_bits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 64  # grammars that are kept for other requests

_lock = threading.Lock()  # so that nothing is made twice; the engine takes it too, and nothing is compiled under it


def make_grammar(
    model: str, vocab_size: int, params: StructuredOutputsParams, end_token_ids: frozenset[int]
) -> Grammar:
    """The grammar that `params` ask for, at its beginning.

    Args:
        model: the folder with the tokenizer.
        end_token_ids: the tokens that end an answer.

    Raises RequestError for what is no schema, expression or grammar, or is one that the library does not know; without
    a tokenizer that it can use; and where no token ends an answer.
    """
    if not end_token_ids:
        raise RequestError(
            "structured_outputs needs a token that ends the answer; leave ignore_eos out, or give stop_token_ids"
        )
    value = getattr(params, params.kind)
    with _lock:
        vocabulary, end = _vocabulary(model, vocab_size)
        compilation = _compilation(
            vocabulary, params.kind, tuple(value) if isinstance(value, list) else value, params.disable_any_whitespace
        )
    return Grammar(compilation.matcher().deep_copy, end, token_bits(sorted(end_token_ids), vocab_size))


class _Compilation:
    """A grammar that the first one to need it compiles; who needs another does not wait for it."""

    def __init__(self, vocabulary: "LLTokenizer", source: Callable[[], str], kind: str):
        self._vocabulary, self._source, self._kind = vocabulary, source, kind
        self._lock = threading.Lock()
        self._matcher: LLMatcher | None = None

    def matcher(self) -> "LLMatcher":
        """A matcher at the beginning of the grammar, to be copied. Raises RequestError for what the library cannot
        use."""
        from llguidance import LLMatcher

        with self._lock:
            if self._matcher is not None:
                return self._matcher
            try:
                matcher = LLMatcher(self._vocabulary, self._source(), log_level=0)
            except Exception as error:  # of the library's: it reads some kinds at once, GBNF by Python code
                reason = " ".join(str(error).split())[:300]
                raise RequestError(f"structured_outputs cannot be used: {reason}; mend its {self._kind}") from error
            matcher.compute_bitmask()  # what is done at the first place is done for all copies
            if matcher.is_error():
                reason = " ".join(matcher.get_error().split())
                reason = reason.partition(" <state>")[0].partition(" 1 | %llguidance")[0]  # its own, and our first line
                raise RequestError(f"structured_outputs cannot be used: {reason[:300]}; mend it")
            self._matcher = matcher
            return matcher


@lru_cache(MAX_COMPILED)
def _compilation(vocabulary: "LLTokenizer", kind: str, value: Any, compact: bool) -> _Compilation:
    """What the grammar is compiled by; `kind`, `value` and `compact` are of the params."""
    return _Compilation(vocabulary, lambda: _unforced(_source(kind, value, compact)), kind)


def _source(kind: str, value: Any, compact: bool) -> str:
    """What the library is given."""
    from llguidance import LLMatcher, grammar_from

    match kind:
        case "json" | "json_object":
            schema = value if kind == "json" else '{"type": "object"}'
            if not compact:
                return LLMatcher.grammar_from_json_schema(schema)
            return LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            )
        case "choice":
            words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
            return "start: CHOICE\nCHOICE: " + words.replace("\x7f", r"\u007f")  # one terminal, which may be large
        case "regex":
            return LLMatcher.grammar_from_regex(value)
        case _:
            return grammar_from("grammar", value)


def _unforced(source: str) -> str:
    """A grammar in Lark's syntax that leaves each token to the model. The library would otherwise write texts that have
    no alternative by itself, and a text that is also the name of a special token as that token."""
    if source.startswith("{"):  # how the library writes expressions and schemas
        [one] = json.loads(source)["grammars"]
        source = one.get("lark_grammar") or f"start: %json {json.dumps(one['json_schema'])}"
    body = source.removeprefix("%llguidance {}").lstrip()
    return body if body.startswith("%llguidance") else '%llguidance {"no_forcing": true}\n' + body


@lru_cache(4)
def _vocabulary(model: str, vocab_size: int) -> "tuple[LLTokenizer, int]":
    """The texts of a model's tokens, and the token that stands for the end: some special one."""
    from llguidance import LLTokenizer

    source = _tokenizer_json(Path(model))
    content = json.loads(source)
    added = content.get("added_tokens") or []
    special = [token["id"] for token in added if token.get("special") and token["id"] < vocab_size]
    num_known = max(len(content["model"]["vocab"]), *(1 + token["id"] for token in added), vocab_size)
    if not special:
        raise RequestError("structured_outputs needs a tokenizer with special tokens, and the model's has none")
    try:
        return LLTokenizer(source, n_vocab=num_known, eos_token=special[0]), special[0]
    except Exception as error:  # of the library's
        raise RequestError(
            f"structured_outputs cannot be used with the model's tokenizer ({str(error)[:200]}); leave it out, or use "
            "a model whose tokenizer is of the byte-level or the SentencePiece kind"
        ) from error


def _tokenizer_json(folder: Path) -> str:
    """The tokenizer as the tokenizers library writes it."""
    path = folder / "tokenizer.json"
    if path.is_file():  # in a third of a second, and without transformers
        return path.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        raise RequestError(f"structured_outputs needs the tokenizer of {str(folder)!r} ({error})") from error
