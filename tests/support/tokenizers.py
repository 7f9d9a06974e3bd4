"""Small tokenizers of each kind that models have, made with the tokenizers library."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = ["▁", "▁Hello", "▁the", "▁world", "▁user", "Hello", "the", "world", "abc", "a", "b", "é", "漢", ".", "▁▁"]
SPECIALS = ["<s>", "</s>", "<special>"]


def sentencepiece() -> Tokenizer:
    """Of Llama-2's kind: words with "▁" before them, bytes for what has no token, and a decoder that strips the first
    space."""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((word, -5.0) for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """The same words, and a decoder that leaves out the space of the first token."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -5.0) for word in WORDS)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def byte_level() -> Tokenizer:
    """Of GPT-2's kind: each token is bytes; some of them begin in one character and end in another."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = dict(zip(_bytes_in_order(alphabet), alphabet, strict=True))
    words = ["Hello", " world", " the", "é", "漢", "🙂", " user"]
    parts = [word.encode() for word in words] + ["漢".encode()[1:] + "漢".encode()[:1], "🙂".encode()[2:] + b"a"]
    vocabulary = [*alphabet, *("".join(of_bytes[byte] for byte in part) for part in parts)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece() -> Tokenizer:
    """Of BERT's kind: spaces go between words."""
    words = ["[UNK]", "hello", "world", "##s", "##ing", ".", "'", "é"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS = {"sentencepiece": sentencepiece, "metaspace": metaspace, "byte level": byte_level, "word piece": word_piece}


def save_tokenizer(folder: Path, kind: str = "sentencepiece", **config: Any) -> Path:
    """Writes a tokenizer of that kind into a model's folder, with special tokens and one that is added and is none.

    `config` are fields of tokenizer_config.json, a chat template, say.
    """
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def _bytes_in_order(alphabet: list[str]) -> list[int]:
    """The byte that each letter of the alphabet stands for: printable ones stand for themselves, and the others have
    the letters from U+0100 on, in their order."""
    others = iter(byte for byte in range(256) if chr(byte) not in alphabet)
    return [ord(letter) if ord(letter) < 256 else next(others) for letter in alphabet]
