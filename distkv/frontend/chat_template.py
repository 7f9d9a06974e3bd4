"""A model's chat template: messages to text."""

from typing import Any

from distkv.errors import ConfigError, RequestError
from distkv.frontend.messages import Message, extra_fields
from distkv.values import shown


class ChatTemplate:
    """The template that a tokenizer came with."""

    def __init__(self, tokenizer: Any):
        """Takes transformers' tokenizer."""
        self._tokenizer = tokenizer

    def check(self, messages: list[Message]) -> None:
        """Raises ConfigError when the model has no template, RequestError when it would pass over a field of the
        messages, `tool_calls`, say: when the text is the same without that field."""
        if not self._tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template; use generate() with a plain prompt")
        extra = dict.fromkeys(field for message in messages for field in extra_fields(message))
        unused = [field for field in extra if self._passes_over(field, messages)]
        if unused:
            raise RequestError(
                f"a message has {', '.join(map(shown, unused))}, which the model's chat template leaves out; put it "
                "into the content, leave it out, or use a model that knows it"
            )

    def render(self, messages: list[Message]) -> str:
        """Text of a conversation up to where the assistant answers.

        Content that is None is the template's business where it knows of it, and else empty. Raises RequestError when
        the template refuses the messages or fails.
        """
        plain = [{key: value for key, value in message.items() if key != "token_ids"} for message in messages]
        if all(message["content"] is not None for message in plain):
            return self._apply(plain)
        empty = [message | {"content": message["content"] or ""} for message in plain]
        without = self._apply(empty)
        try:
            text = self._apply(plain)
        except RequestError:
            return without
        return text if text.count("None") <= without.count("None") else without

    def _apply(self, messages: list[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # whatever a template may do
            raise RequestError(
                f"the chat template fails on these messages ({type(error).__name__}: {error}); see whether it allows "
                "their roles and contents"
            ) from error

    def _passes_over(self, field: str, messages: list[Message]) -> bool:
        text = self.render(messages)
        try:
            return text == self.render([{key: one[key] for key in one if key != field} for one in messages])
        except RequestError:  # it needs the field
            return False
