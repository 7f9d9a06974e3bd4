"""Text to tokens and back."""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterable
from functools import cached_property, lru_cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from distkv.errors import ConfigError, RequestError
from distkv.frontend.chat_pieces import text_around_answers
from distkv.frontend.chat_template import ChatTemplate, TemplateOptions
from distkv.frontend.messages import Message, plain_messages

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
CACHED_TEXTS = 8192  # of single tokens
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenLimit(NamedTuple):
    """How many tokens a prompt may have, and the option that says so."""

    option: str
    most: int


class Tokenizer:
    """The tokenizer and chat template of a model folder, through transformers. For use by several threads."""

    def __init__(self, folder: Path, eos_token_ids: Iterable[int] = (), limit: TokenLimit | None = None):
        """Loads it, and runs no code that the folder may hold.

        Args:
            eos_token_ids: tokens that end an answer by what else the folder says.
            limit: of prompts; texts that are too long for it are not encoded.

        Raises ConfigError when the folder has no tokenizer that can be loaded.
        """
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"{str(folder)!r} has no tokenizer files, so prompts must be token ids and answers have no text; "
                "add tokenizer.json for text"
            )
        from transformers import AutoTokenizer  # takes seconds

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library has no class for its own
            cause = "it needs code of the folder's own, which is not run" if "custom code" in str(error) else error
            raise ConfigError(
                f"the tokenizer in {str(folder)!r} cannot be loaded ({cause}), so prompts must be token ids and "
                "answers have no text; mend its files for text"
            ) from error
        vocabulary = self._tokenizer.get_vocab()
        added = self._tokenizer.added_tokens_decoder.items()
        self.special_tokens = {token.content: index for index, token in added if token.special}
        """The tokens that `decode` leaves out, by their text."""
        self._text_ids = frozenset(vocabulary.values()).difference(self.special_tokens.values())
        self._limit = limit
        self._longest_token = max(map(len, vocabulary), default=1)  # characters, or more than it has
        self._byte_ids = frozenset(index for token, index in vocabulary.items() if BYTE_TOKEN.fullmatch(token))
        own = self._tokenizer.eos_token_id
        self.end_token_ids = frozenset(eos_token_ids) | (frozenset() if own is None else {own})
        """The tokens that end an answer: its own, and those that it was told."""
        self._template = ChatTemplate(self._tokenizer)
        self._text_of_one = lru_cache(CACHED_TEXTS)(lambda token_id: self._decode([token_id]))
        self._any_text_of_one = lru_cache(CACHED_TEXTS)(lambda token_id: str(self._tokenizer.decode([token_id])))
        self._lock = threading.Lock()  # of encoding, before which transformers sets truncation in place
        self._warned = False  # that answers cannot be repeated by their tokens

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a plain prompt, with the tokens that the model puts before any text unless `special` is False;
        raises RequestError when it is empty, not Unicode, or longer than any that the model could take."""
        if not text:
            raise RequestError("the prompt is empty; give some text")
        self._check_length([text])
        _check_unicode(text)
        with self._lock:
            return self._tokenizer.encode(text, add_special_tokens=special)

    def encode_chat(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a conversation up to where the assistant answers, by the model's chat template, which is given
        `tools` and the variables of `chat_template_kwargs`.

        Answers that carry `token_ids` come out as these, so that the tokens begin with those of the turn before, whose
        KV pages may be cached. Where the template rewrites earlier answers, their text is encoded instead, and the
        first time a warning is logged.

        Raises ConfigError when the model has no template, RequestError when the messages are none that a template could
        take, or it refuses them, or does nothing with tools or variables that were given, or their text is longer than
        any that the model could take.
        """
        messages, options = plain_messages(messages), TemplateOptions.of(tools, chat_template_kwargs)
        self._template.check(messages, options)
        render = partial(self._render, options)
        sampled = [message["token_ids"] for message in messages if message.get("token_ids") is not None]
        texts = text_around_answers(render, self._end_texts, messages) if sampled else None
        if texts is None:
            if sampled and not self._warned:
                log.warning(
                    "the chat template rewrites earlier answers, so they are encoded from their text, and their cached "
                    "KV pages may not be found again"
                )
                self._warned = True
            sampled, texts = [], [render(messages)]
        self._check_length(texts)
        with self._lock:
            pieces = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return list(chain.from_iterable(chain(*zip_longest(pieces, sampled, fillvalue=[]))))

    @cached_property
    def with_special_tokens(self) -> "TextOfAllTokens":
        """The same, with special tokens as parts of text."""
        return TextOfAllTokens(self)

    @cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers whose token ids mean the same."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._text_of_one(token_ids[0]) if len(token_ids) == 1 else self._decode(token_ids)

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at the token: it is known, and not special."""
        return token_id in self._text_ids

    def special_token_id(self, text: str) -> int | None:
        """The special token that has this text, but for blanks around it."""
        return self.special_tokens.get(text, self.special_tokens.get(text.strip()) if text.strip() else None)

    def can_spell(self, text: str) -> bool:
        """Whether tokens that `decode` looks at may add up to this text, which may be that of a special token."""
        with self._lock:
            token_ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return text in self.decode(token_ids)

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is a single byte for which the vocabulary has nothing better."""
        return token_id in self._byte_ids

    def token_text(self, token_id: int) -> str:
        """Text of a single token, special or not."""
        return self._any_text_of_one(token_id)

    def decode_all(self, token_ids: list[int]) -> str:
        """Text of tokens, special ones too."""
        return self._decode(token_ids, skips=False)

    def describe(self) -> dict[str, Any]:
        """What programs that make prompts want to know: the class, the special tokens by their roles, the chat
        template."""
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            **{
                role: str(token) for role, token in self._tokenizer.special_tokens_map.items() if isinstance(token, str)
            },
            "chat_template": self._tokenizer.chat_template,
        }

    def _decode(self, token_ids: list[int], skips: bool = True) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False))

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        return tuple(text for token_id in self.end_token_ids if (text := self.token_text(token_id)))

    def _check_length(self, texts: list[str]) -> None:
        """Refuses what cannot fit however it is encoded: encoding takes seconds for megabytes, and others wait."""
        if self._limit is None:
            return
        option, most = self._limit
        length = sum(map(len, texts))
        if length > most * self._longest_token:
            raise RequestError(
                f"the prompt has {length} characters, and {option} is {most} tokens of at most {self._longest_token}; "
                f"shorten the prompt or raise {option}"
            )

    def _render(self, options: TemplateOptions, messages: list[Message]) -> str:
        text = self._template.render(messages, options)
        _check_unicode(text)
        return text


class TextOfAllTokens:
    """Decodes as its tokenizer does, but for special tokens, which are parts of text."""

    def __init__(self, tokenizer: Tokenizer):
        self._special_ids = frozenset(tokenizer.special_tokens.values())
        self._tokenizer = tokenizer
        self.encode, self.decode, self.is_byte = tokenizer.encode, tokenizer.decode_all, tokenizer.is_byte

    def has_text(self, token_id: int) -> bool:
        """Whether the token is known."""
        return token_id in self._special_ids or self._tokenizer.has_text(token_id)


def _check_unicode(text: str) -> None:
    """Refuses lone surrogates, which stand for bytes that were not UTF-8 on a command line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode at character {error.start}; convert it to UTF-8") from None
