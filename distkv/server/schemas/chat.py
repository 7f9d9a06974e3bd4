"""The body of `/v1/chat/completions`."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from distkv.frontend.session_limits import RESPONSE_ID
from distkv.sampling_params import SamplingParams
from distkv.server.schemas.sampling import OpenAIBody


class ChatBody(OpenAIBody):
    """A conversation to go on with, or with a `session` what is new in one that the server keeps."""

    without_effect: ClassVar = OpenAIBody.without_effect | {
        "tools": ([],),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template_kwargs": ({},),
        "echo": (False,),
    }

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    session: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_stream()
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given and logprobs is not true; set it, or leave top_logprobs out")
        if self.tools and not self.parallel_tool_calls:
            raise ValueError("parallel_tool_calls is false, and nothing here keeps a model to one call; leave it out")
        if self.session is not None and RESPONSE_ID.fullmatch(self.session):
            raise ValueError(f"session is {self.session!r}, which is the name of a stored response; choose another")
        given = self.model_fields_set
        if {"max_tokens", "max_completion_tokens"} <= given and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools

    def params(self) -> SamplingParams:
        """How to sample, up to the model's limit unless told otherwise; raises RequestError as `sampling_params`."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None)
