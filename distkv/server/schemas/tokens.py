"""The bodies of `/tokenize` and `/detokenize`, which are vLLM's."""

from typing import Any, ClassVar, Self

from pydantic import model_validator

from distkv.server.schemas.body import Body


class TokenizeBody(Body):
    """A text, or a conversation up to where the assistant answers."""

    without_effect: ClassVar = {
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template_kwargs": ({},),
        "tools": ([],),
    }

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            raise ValueError("tools and chat_template_kwargs are for messages; leave them out beside a prompt")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens is for a prompt; the chat template says what a conversation has")
        return self


class DetokenizeBody(Body):
    """Token ids to make text of."""

    model: str | None = None
    tokens: list[int]
