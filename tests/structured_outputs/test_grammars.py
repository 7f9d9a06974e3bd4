"""Answers stay within their grammar, and what is none is refused."""

import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizers import save_tokenizer

from distkv import RequestError, SamplingParams, StructuredOutputsParams
from distkv.frontend.tokenizer import Tokenizer
from distkv.structured_outputs import grammars
from distkv.structured_outputs.grammars import make_grammar
from distkv.workers.sampling.grammar import Grammar

VOCAB_SIZE = 300  # more than the tokenizer has
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b\n", None]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "yes, no", 'a "b" \\ {c}', "漢🙂\n\x01é\x7f"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("model"), "byte level")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def grammar_of(folder: Path, tokenizer: Tokenizer, **params: Any) -> Grammar:
    ends = frozenset(tokenizer.end_token_ids)
    return make_grammar(str(folder), VOCAB_SIZE, StructuredOutputsParams(**params), ends)


def members(bits: np.ndarray | None) -> list[int]:
    assert bits is not None
    return np.nonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))[0].tolist()


def walk(grammar: Grammar, tokenizer: Tokenizer, rng: random.Random, most: int) -> tuple[list[int], bool]:
    """Tokens that are drawn from what is allowed, without the end, and whether the end came."""
    tokens: list[int] = []
    new: list[int] = []
    while len(tokens) < most:
        allowed = members(grammar.allowed(new))
        assert allowed and max(allowed) < VOCAB_SIZE
        new = [rng.choice(allowed)]
        if new[0] in tokenizer.end_token_ids:
            assert grammar.allowed(new) is None, "behind the end nothing is limited"
            return tokens, True
        assert tokenizer.has_text(new[0])
        tokens += new
    return tokens, False


def is_person(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["name", "age", "kind"]
        and len(found["name"]) <= 6
        and type(found["age"]) is int
        and 0 <= found["age"] <= 150
        and found["kind"] in ("a", "b\n", None)
    )


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "schema": ({"json": SCHEMA, "disable_any_whitespace": True}, is_person),
    "schema as text": ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, is_person),
    "regex": ({"regex": r"[ab]{2,4}(é|[0-9]+)?-漢?"}, re.compile(r"[ab]{2,4}(é|[0-9]+)?-漢?").fullmatch),
    "choice": ({"choice": CHOICES}, CHOICES.__contains__),
    "grammar": ({"grammar": 'root ::= "a" ("b" | "é")+ "d"'}, re.compile("a(b|é)+d").fullmatch),
    "lark": ({"grammar": 'start: "a" start "b" | "c"'}, lambda text: re.fullmatch("a*cb*", text)),
}


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_is_drawn_keeps_to_it(folder: Path, tokenizer: Tokenizer, kind: str, seed: int) -> None:
    params, holds = KINDS[kind]
    tokens, has_ended = walk(grammar_of(folder, tokenizer, **params), tokenizer, random.Random(seed), 120)
    if has_ended:
        assert holds(tokenizer.decode(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_texts_are_allowed_to_their_end(folder: Path, tokenizer: Tokenizer, kind: str) -> None:
    own = {
        "schema": ['{"name": "a\\"", "age": 150, "kind": null}'],
        "schema as text": ['{"name": "", "age": 0, "kind": "a"}'],
        "regex": ["ab-", "aaaaé-漢", "bb17-"], "choice": CHOICES, "grammar": ["abéd"], "lark": ["c", "aacbb"],
    }[kind]  # fmt: skip
    for text in own:
        grammar = grammar_of(folder, tokenizer, **KINDS[kind][0])
        new: list[int] = []
        for token in tokenizer.encode(text, special=False):
            assert token in members(grammar.allowed(new)), text
            new = [token]
        assert tokenizer.end_token_ids <= set(members(grammar.allowed(new))), text


@given(seed=st.integers(0, 2**32 - 1), cuts=st.sets(st.integers(0, 40)))
def test_masks_are_a_function_of_the_tokens(folder: Path, tokenizer: Tokenizer, seed: int, cuts: set[int]) -> None:
    """However many of them are told at a time, and whatever other answers of the grammar have come to."""
    first = grammar_of(folder, tokenizer, json_object=True)
    tokens, _ = walk(first, tokenizer, random.Random(seed), 40)
    again, other = first.fresh(), grammar_of(folder, tokenizer, json_object=True)
    masks = [members(again.allowed([] if place == 0 else [tokens[place - 1]])) for place in range(len(tokens))]
    told = 0
    for cut in sorted(cuts):
        if told <= cut < len(tokens):
            assert members(other.allowed(tokens[told:cut])) == masks[cut]
            told = cut


def test_every_end_token_may_end_it_and_no_other_special_token_comes(folder: Path, tokenizer: Tokenizer) -> None:
    ends = frozenset({tokenizer.special_tokens["</s>"], 5})
    grammar = make_grammar(str(folder), VOCAB_SIZE, StructuredOutputsParams(regex="a?"), ends)
    [a] = tokenizer.encode("a", special=False)
    assert set(members(grammar.allowed([]))) == ends | {a}
    assert set(members(grammar.allowed([a]))) == ends
    assert grammar.allowed([5]) is None


def test_nobody_waits_for_the_grammar_of_another(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread looks grammars up, too."""
    grammar_of(folder, tokenizer, choice=["known"])
    begun, goes_on = threading.Event(), threading.Event()
    read = grammars._source

    def slow(kind: str, value: Any, compact: bool) -> str:
        if value == "slow":
            begun.set()
            assert goes_on.wait(60)
        return read(kind, value, compact)

    monkeypatch.setattr(grammars, "_source", slow)
    with ThreadPoolExecutor() as threads:
        first, second = (threads.submit(grammar_of, folder, tokenizer, regex="slow") for _ in range(2))
        assert begun.wait(60)
        try:
            for others in ({"choice": ["known"]}, {"regex": "new"}):
                assert threads.submit(grammar_of, folder, tokenizer, **others).result(60)
            assert not first.done() and not second.done()
        finally:
            goes_on.set()
        assert members(first.result().allowed([])) == members(second.result().allowed([]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "structured_outputs has nothing; it must be one of json, regex"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs has regex and choice; it must be one of"),
        ({"json": "{"}, "json is '{'; it must be a JSON schema"),
        ({"json": {"a": {1}}}, "json is .*; it must be a JSON schema"),
        ({"json": [1]}, "json is .*; it must be a JSON schema"),
        ({"choice": []}, r"choice is \[\]; it must be a list of 1 to"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": "ab"}, "choice is 'ab'; it must be a list"),
        ({"regex": "a\udcff"}, "regex is .*; it must be a text"),
        ({"regex": "a" * 131073}, "regex has 131073 characters; it must be of at most 131072"),
        ({"grammar": "a" * 131073}, "grammar has 131073 characters"),
        ({"json": {"const": "a" * 131073}}, "json has 131086 characters"),
        ({"choice": ["a" * 65536, "b" * 65537]}, "choice has 131073 characters"),
        ({"json_object": 1}, "json_object is 1; it must be True or False"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace must be left out beside regex"),
    ],
)
def test_values_that_are_none_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regex": "(a"}, "structured_outputs cannot be used: .*unclosed group.*; mend it"),
        ({"json": {"type": "arr"}}, "structured_outputs cannot be used: .*arr; mend it"),
        ({"json": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: .*"uniqueItems".*; mend it'),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable schema"),
        ({"json": '{"const": NaN}', "disable_any_whitespace": True}, "expected value at .*; mend its json"),
        ({"json": '{"a":' * 200 + "1" + "}" * 200, "disable_any_whitespace": True}, "recursion limit.*; mend its json"),
        ({"json": {"const": 10**400}, "disable_any_whitespace": True}, "cannot be used: .*; mend its json"),
        ({"json": '{"const": "\\ud800"}', "disable_any_whitespace": True}, "cannot be used: .*; mend its json"),
        ({"json": '{"const": NaN}'}, "cannot be used: .*; mend"),
        ({"grammar": "root ::= (("}, "structured_outputs cannot be used: .*; mend"),
        ({"grammar": "start: nothing"}, "structured_outputs cannot be used: .*; mend it"),
    ],
)
def test_what_the_library_cannot_use_is_refused(
    folder: Path, tokenizer: Tokenizer, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as error:
        grammar_of(folder, tokenizer, **values)
    assert len(str(error.value)) < 500


def test_a_model_that_cannot_have_one_is_told_why(tmp_path: Path) -> None:
    params = StructuredOutputsParams(regex="a")
    with pytest.raises(RequestError, match="structured_outputs needs a token that ends the answer"):
        make_grammar(str(tmp_path), VOCAB_SIZE, params, frozenset())
    with pytest.raises(RequestError, match=r"structured_outputs needs the tokenizer of .*/no"):
        make_grammar(str(tmp_path / "no"), VOCAB_SIZE, params, frozenset({2}))
    folder = save_tokenizer(tmp_path / "words", "word piece")
    with pytest.raises(RequestError, match="structured_outputs cannot be used with the model's tokenizer"):
        make_grammar(str(folder), VOCAB_SIZE, params, frozenset({2}))
    with pytest.raises(RequestError, match="ignore_eos is True beside structured_outputs"):
        SamplingParams(structured_outputs=params, ignore_eos=True)
    with pytest.raises(RequestError, match=r"structured_outputs is .*; it must be a StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_choices_may_be_many(folder: Path, tokenizer: Tokenizer) -> None:
    choices = [f"w{index}" for index in range(10000)]
    grammar = grammar_of(folder, tokenizer, choice=choices)
    tokens, ended = walk(grammar, tokenizer, random.Random(0), 8)
    assert ended and tokenizer.decode_all(tokens) in choices


@pytest.mark.parametrize(
    "params",
    [
        {"choice": ["<|im_start|>x"]},
        {"regex": r"<\|im_start\|>/x"},
        {"json": {"const": "<|im_start|>"}},
        {"json": {"const": "<|im_start|>"}, "disable_any_whitespace": True},
        {"grammar": 'start: "<|im_start|>x"'},
        {"grammar": 'root ::= "<|im_start|>x"'},
    ],
)
def test_a_text_that_names_a_special_token_is_written_out(demo_model: Path, params: dict[str, Any]) -> None:
    """The token of that name would end the answer, or tell the model of another turn."""
    tokenizer = Tokenizer(demo_model)
    grammar = make_grammar(str(demo_model), 49152, StructuredOutputsParams(**params), frozenset([2]))
    rng, tokens = random.Random(1), list[int]()
    for _ in range(30):
        allowed = members(grammar.allowed(tokens[-1:]))
        assert allowed and 1 not in allowed
        if 2 in allowed:
            break
        tokens.append(rng.choice(allowed))
    assert "<|im_start|>" in tokenizer.decode_all(tokens)
