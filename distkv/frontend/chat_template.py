"""A model's chat template: messages to text."""

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from distkv.errors import ConfigError, RequestError
from distkv.frontend.messages import Message, extra_fields
from distkv.values import shown

MOST_EXTRA_FIELDS = 16


@dataclass(frozen=True)
class TemplateOptions:
    """What a chat template is given beside the messages. Raises RequestError for what is no such thing."""

    tools: list[dict[str, Any]] | None = None  # functions with JSON schemas, as OpenAI has them
    kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the template

    @classmethod
    def of(cls, tools: Any, chat_template_kwargs: Any) -> "TemplateOptions":
        """The options that a caller gave; a list without tools, and None, are none."""
        if not isinstance(tools, list | tuple | None) or not all(isinstance(tool, dict) for tool in tools or ()):
            raise RequestError(
                f"tools is {shown(tools)}; it must be a list of dicts such as {{'type': 'function', 'function': "
                "{'name': 'now', 'description': 'The time', 'parameters': {'type': 'object', 'properties': {}}}}"
            )
        kwargs = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
            raise RequestError(
                f"chat_template_kwargs is {shown(kwargs)}; it must be a dict of the template's variables"
            )
        return cls(list(tools) if tools else None, dict(kwargs))


class ChatTemplate:
    """The template that a tokenizer came with."""

    def __init__(self, tokenizer: Any):
        """Takes transformers' tokenizer."""
        self._tokenizer = tokenizer

    def check(self, messages: list[Message], options: TemplateOptions) -> None:
        """Raises ConfigError when the model has no template, RequestError when it would pass over a field of the
        messages, `tool_calls`, say: when the text is the same without that field; and for options that it has no
        variable for."""
        if not self._tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template; use generate() with a plain prompt")
        self._check_options(options)
        extra = dict.fromkeys(field for message in messages for field in extra_fields(message))
        if len(extra) > MOST_EXTRA_FIELDS:  # each of which takes a rendering
            raise RequestError(
                f"messages have {len(extra)} fields beside role and content; chat templates know a handful, and at "
                f"most {MOST_EXTRA_FIELDS} are taken: leave the others out"
            )
        text = self.render(messages, options) if extra else ""
        unused = [field for field in extra if self._passes_over(field, text, messages, options)]
        if unused:
            raise RequestError(
                f"a message has {', '.join(map(shown, unused))}, which the model's chat template leaves out; put it "
                "into the content, leave it out, or use a model that knows it"
            )

    def render(self, messages: list[Message], options: TemplateOptions) -> str:
        """Text of a conversation up to where the assistant answers.

        Content that is None is the template's business where it knows of it, and else empty. Raises RequestError when
        the template refuses the messages or fails.
        """
        plain = [{key: value for key, value in message.items() if key != "token_ids"} for message in messages]
        if all(message["content"] is not None for message in plain):
            return self._apply(plain, options)
        empty = [message | {"content": message["content"] or ""} for message in plain]
        without = self._apply(empty, options)
        try:
            text = self._apply(plain, options)
        except RequestError:
            return without
        return text if text.count("None") <= without.count("None") else without

    def _apply(self, messages: list[Message], options: TemplateOptions) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=options.tools, add_generation_prompt=True, tokenize=False, **options.kwargs
            )
            return str(text)
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # whatever a template may do
            raise RequestError(
                f"the chat template fails on these messages ({type(error).__name__}: {error}); see whether it allows "
                "their roles and contents"
            ) from error

    def _check_options(self, options: TemplateOptions) -> None:
        own = inspect.signature(self._tokenizer.apply_chat_template).parameters
        if taken := [name for name in options.kwargs if name in own or name == "messages"]:
            raise RequestError(
                f"chat_template_kwargs has {', '.join(map(shown, taken))}, which cannot be set so; it must be "
                "variables of the model's chat template alone"
            )
        names = [*(["tools"] if options.tools else []), *options.kwargs]
        if not names:
            return
        from jinja2 import Environment, TemplateError, meta
        from jinja2.ext import loopcontrols

        text = self._tokenizer.get_chat_template(tools=options.tools)
        try:
            block = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # of transformers, for training
            known = meta.find_undeclared_variables(Environment(extensions=[loopcontrols]).parse(block))
        except TemplateError:
            return  # rendering says more
        if unused := [name for name in names if name not in known]:
            raise RequestError(
                f"the model's chat template does nothing with {', '.join(map(shown, unused))}; leave it out, or use a "
                "model whose template knows it"
            )

    def _passes_over(self, field: str, text: str, messages: list[Message], options: TemplateOptions) -> bool:
        """Whether the messages make the same text without a field."""
        try:
            return text == self.render([{key: one[key] for key in one if key != field} for one in messages], options)
        except RequestError:  # it needs the field
            return False
