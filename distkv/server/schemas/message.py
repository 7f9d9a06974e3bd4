"""The body of `/v1/messages`, in Anthropic's shape."""

from typing import Any, ClassVar, Self

from pydantic import model_validator

from distkv.frontend.messages import Message
from distkv.sampling_params import SamplingParams
from distkv.server.schemas.body import ANYTHING, Body
from distkv.server.schemas.sampling import SamplingBody


class CountBody(Body):
    """A conversation to count the tokens of."""

    without_effect: ClassVar = {
        "tools": ([],),
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
        "thinking": ({"type": "disabled"},),
        "output_config": ({},),
    }

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.messages and self.messages[-1].get("role") == "assistant":
            raise ValueError("the last message is the assistant's; this server does not go on with a begun answer")
        return self

    def conversation(self) -> list[Message]:
        """The messages, with the system's first."""
        return ([] if self.system is None else [{"role": "system", "content": self.system}]) + self.messages


class MessageBody(CountBody, SamplingBody):
    """A conversation to go on with."""

    without_effect: ClassVar = SamplingBody.without_effect | CountBody.without_effect | {"metadata": (ANYTHING,)}

    max_tokens: int
    stop_sequences: list[str] | None = None

    def params(self) -> SamplingParams:
        """How to sample; raises RequestError as `sampling_params` does."""
        return self.sampling_params(stop=self.stop_sequences)
