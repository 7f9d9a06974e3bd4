"""A conversation with the model: its messages, and the tokens of its answers."""

import logging
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec.structs import replace

from distkv.errors import DistKVError, RequestError
from distkv.frontend.messages import Message, plain_messages
from distkv.frontend.seen_tokens import decoded_text, seen_tokens
from distkv.frontend.tokenizer import Tokenizer
from distkv.outputs import CompletionOutput

log = logging.getLogger(__name__)


class StoredMessage(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A message; `token_ids` are what the model sampled for it, without the end token."""

    role: str
    content: str
    token_ids: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None


class Turn(NamedTuple):
    """A prompt that waits for its answer."""

    asked: list[StoredMessage]  # what is new in it
    tokenizer: Tokenizer
    token_ids: list[int]


class Conversation:
    """A conversation that lasts as long as this object; `Session` is one that is kept.

    Answers are kept as the tokens that were sampled, so that each prompt repeats those of the turn before and finds
    their KV pages, even where the text of an answer would be encoded otherwise.
    """

    title = "the conversation"  # what errors call it

    def __init__(self, messages: Sequence[StoredMessage] = (), tokenizer: str = ""):
        """`tokenizer` is the fingerprint of the one that the tokens of the messages belong to."""
        self._messages, self._tokenizer = list(messages), tokenizer
        self._turn: Turn | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; answers have `token_ids`, as `Tokenizer.encode_chat` takes them."""
        return [msgspec.to_builtins(message) for message in self._messages]

    def go_on_from(self, other: "Conversation") -> None:
        """Has been what another one has been so far, and goes its own way from there."""
        self._messages, self._tokenizer = [replace(message) for message in other._messages], other._tokenizer

    def save(self) -> None:
        """Keeps the conversation as it stands where it is kept; raises StoreError when that fails."""
        self._save(self._messages)

    def check(self, new_messages: list[Message]) -> list[StoredMessage]:
        """What new messages add to the conversation: all but the system message that it began with.

        Raises RequestError when they are malformed or have another system message.
        """
        try:
            new = msgspec.convert(plain_messages(new_messages) if new_messages != [] else [], list[StoredMessage])
        except (RequestError, msgspec.ValidationError) as error:
            raise RequestError(
                f"a session takes messages such as {{'role': 'user', 'content': 'Hello'}}, of text alone: {error}"
            ) from None
        if self._messages and new and new[0].role == "system":
            if new[0] != self._messages[0]:
                raise RequestError(
                    f"{self.title} did not begin with this system message; leave it out, or begin a session under "
                    "another name"
                )
            return new[1:]
        return new

    def prompt(
        self,
        tokenizer: Tokenizer,
        new_messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of the conversation and the new messages, up to where the assistant answers.

        They begin with the last prompt, the tokens of its answer and the end token, where the chat template allows. The
        system message may be given again. With another tokenizer than before, earlier answers are encoded from their
        text. The new messages become part of the conversation with their answer; until then another prompt takes the
        place of this one. `tools` and `chat_template_kwargs` are those of `Tokenizer.encode_chat`, and are not kept.

        Raises RequestError as `check` does, as `Tokenizer.encode_chat` does, and when nothing is new, and CapacityError
        when there is no room to keep the turn.
        """
        self._turn = None
        asked = self.check(new_messages)
        if not asked:
            raise RequestError(f"messages has nothing that is new in {self.title}; give what is to be answered")
        if self._tokenizer != tokenizer.fingerprint:
            if self._messages:
                log.warning(
                    "%s was written with another tokenizer; its answers are encoded from their text", self.title
                )
            for message in self._messages:
                message.token_ids = None
            self._tokenizer = tokenizer.fingerprint
        messages = [*self.messages, *map(msgspec.to_builtins, asked)]
        token_ids = tokenizer.encode_chat(messages, tools, chat_template_kwargs)
        turn = Turn(asked, tokenizer, token_ids)
        self._check_turn(turn)
        self._turn = turn
        return token_ids

    def add_answer(self, text: str, token_ids: list[int] | None) -> None:
        """Adds the last prompt's messages and the answer to them.

        Args:
            text: of the answer, finished or not.
            token_ids: what the model sampled for it, without the end token; None has the text encoded.
        """
        answer = StoredMessage("assistant", text, None if token_ids is None else list(token_ids))
        grown = [*self._messages, *self._open_turn().asked, answer]
        self._save(grown)
        self._messages, self._turn = grown, None

    def add_output(self, answer: CompletionOutput) -> None:
        """Adds an answer as `add_answer` does, finished or not; of its tokens those that its text shows. The token that
        ended it is no part of either, whether its text was shown or not; special tokens in it may be, or not."""
        _, tokenizer, prompt = self._open_turn()
        token_ids, text, reason = answer.token_ids, answer.text, answer.stop_reason
        by_token = answer.finish_reason == "stop" and (
            not isinstance(reason, str) or token_ids[-1] == tokenizer.special_token_id(reason)
        )
        token_ids = token_ids[:-1] if by_token else token_ids
        for decoder in (tokenizer, tokenizer.with_special_tokens):
            shown = decoded_text(decoder, prompt, token_ids) if by_token else text
            seen = seen_tokens(decoder, prompt, token_ids, shown) if text.startswith(shown) else None
            if seen is not None:
                text = shown
                break
        self.add_answer(text, seen)

    def _open_turn(self) -> Turn:
        if self._turn is None:
            raise DistKVError(f"{self.title} has no prompt without an answer; call prompt() first")
        return self._turn

    def _check_turn(self, turn: Turn) -> None:
        """Called before a turn begins; when it raises, it does not."""

    def _save(self, messages: list[StoredMessage]) -> None:
        """Called before the messages become these; when it raises, they do not."""
