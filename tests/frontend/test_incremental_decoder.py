"""Text that comes token by token is that of all tokens decoded as a whole, at a cost that does not grow."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import KINDS, SPECIALS, save_tokenizer

from distkv.frontend.incremental_decoder import IncrementalDecoder
from distkv.frontend.tokenizer import Tokenizer

UNKNOWN = 10_000  # a token id that a model may have and its tokenizer not
made: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    made.update((kind, Tokenizer(save_tokenizer(tmp_path_factory.mktemp("model"), kind))) for kind in KINDS)


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    vocabulary = tokenizer._tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def streamed(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, prompt)
    return [*map(decoder.add, answer), decoder.finish()]


def whole(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    return tokenizer.decode(prompt + answer)[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(st.data())
def test_any_tokens_streamed_are_those_decoded_as_a_whole(kind: str, data: st.DataObject) -> None:
    """Of all tokens, and of few that repeat, so that incomplete characters, spaces and special tokens come in rows."""
    tokenizer = made[kind]
    size = len(tokenizer._tokenizer)
    words = st.integers(max(0, size - 20), size - 1)  # and special ones
    everything = st.sampled_from([*range(size), UNKNOWN]) | words
    few = st.sampled_from(data.draw(st.lists(everything, min_size=1, max_size=3), "few"))
    tokens = st.lists(data.draw(st.sampled_from([everything, few]), "kind of tokens"), max_size=20)
    prompt, answer = data.draw(tokens, "prompt"), data.draw(tokens, "answer")
    assert "".join(streamed(tokenizer, prompt, answer)) == whole(tokenizer, prompt, answer)


@pytest.mark.parametrize(
    ("prompt", "answer", "pieces"),
    [
        ([], ["▁Hello", "▁the", "<special>", "▁world"], ["Hello", " the", "", " world", ""]),
        ([], ["▁Hello", "</s>", "<special>", "▁world"], ["Hello", "", "", " world", ""]),
        (["▁Hello", *["<special>"] * 5], ["▁the", "▁world"], [" the", " world", ""]),
        (["<s>"], ["▁the", "▁", "the"], ["the", " ", "the", ""]),
        (["<s>"], ["▁the", "<0xC3>", "<special>", "<0xA9>", "b"], ["the", "", "", "", "éb", ""]),
        (["<s>"], ["a", "<0x0A>", "<0xFF>", "b", "<0x0A>"], ["a", "", "", "\ufffd\ufffdb", "", "\n"]),
    ],
)
def test_tokens_without_text_leave_the_space_of_the_next_one(
    prompt: list[str], answer: list[str], pieces: list[str]
) -> None:
    tokenizer = made["sentencepiece"]
    assert streamed(tokenizer, ids(tokenizer, *prompt), ids(tokenizer, *answer)) == pieces


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("byte level", ["\u0122"]),  # 0x80
        ("byte level", ["\u0122", "a"]),
        ("byte level", ["æ", "\u0122"]),  # a character that lacks its last byte
        ("byte level", ["¼¢æ"]),  # the end of one and the beginning of the next
        ("sentencepiece", ["<0x80>"]),
        ("sentencepiece", ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]),
        ("sentencepiece", ["▁"]),
        ("sentencepiece", ["<unk>"]),
    ],
)
def test_a_token_costs_as_much_in_any_answer(
    kind: str, tokens: list[str], special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made[kind]
    decode, decoded = tokenizer.decode, 0

    def counting(token_ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(token_ids)

    monkeypatch.setattr(tokenizer, "decode", counting)
    row = ids(tokenizer, *tokens, *(SPECIALS if special else []))
    answer = (row * 1000)[:1000]
    text = "".join(streamed(tokenizer, answer[:100], answer))
    assert decoded < 25 * len(answer)
    assert text == whole(tokenizer, answer[:100], answer)
