"""The body of `/v1/responses`."""

from itertools import chain
from typing import Any, ClassVar, Self

from pydantic import model_validator

from distkv.errors import RequestError
from distkv.frontend.messages import Message
from distkv.sampling_params import SamplingParams
from distkv.server.schemas.body import ANYTHING
from distkv.server.schemas.sampling import SamplingBody
from distkv.values import shown, text

MESSAGE_FIELDS = {"type", "role", "content", "id", "status"}  # an answer's own too, which clients send back
PART_FIELDS = {"type", "text", "annotations", "logprobs"}
TEXT_PARTS = ("input_text", "output_text", "text")


class ResponseBody(SamplingBody):
    """What is to be answered, and the response that it goes on from."""

    without_effect: ClassVar = SamplingBody.without_effect | {
        "safety_identifier": (ANYTHING,),
        "prompt_cache_key": (ANYTHING,),
        "prompt_cache_retention": (ANYTHING,),
        "text": ({}, {"format": {"type": "text"}}),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (ANYTHING,),
        "include": ([],),
        "background": (False,),
        "truncation": ("disabled",),
        "reasoning": ({},),
        "top_logprobs": (0,),
        "stream_options": ({}, {"include_obfuscation": False}),
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    store: bool = True
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if None in map(text, chain.from_iterable((self.metadata or {}).items())):
            raise ValueError("metadata has other than Unicode")
        return self

    def params(self) -> SamplingParams:
        """How to sample; raises RequestError as `sampling_params` does."""
        return self.sampling_params(max_tokens=self.max_output_tokens)

    def messages(self) -> list[Message]:
        """What is new in the conversation; raises RequestError for what is no message of text."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return first + [_message(item) for item in items]


def _message(item: dict[str, Any]) -> Message:
    if item.get("type", "message") != "message":
        raise RequestError(f"input has an item of type {item['type']!r}; this server reads messages of text alone")
    _check_fields("a message of input", item, MESSAGE_FIELDS)
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    role = "system" if item.get("role") == "developer" else item.get("role")
    return {"role": role, "content": content}


def _part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        _check_fields("a part of content", part, PART_FIELDS)
        return {"type": "text", "text": part.get("text")}
    return part


def _check_fields(what: str, given: dict[str, Any], known: set[str]) -> None:
    unknown = [name for name, value in given.items() if name not in known and value is not None]
    if unknown:
        raise RequestError(f"{what} has {shown(unknown[0])}, which this server does not support; leave it out")
