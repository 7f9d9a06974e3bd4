"""The body of `/v1/completions`."""

from typing import Any, ClassVar, Self

from pydantic import model_validator

from distkv.sampling_params import SamplingParams
from distkv.server.schemas.sampling import OpenAIBody


class CompletionBody(OpenAIBody):
    """Prompts to go on with: a text, token ids, or a list of either, of which all are answered."""

    without_effect: ClassVar = OpenAIBody.without_effect | {"suffix": ("",), "best_of": (1,)}

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_stream()
        if self.echo and self.stream:
            raise ValueError("echo is true and so is stream; the prompt is repeated in whole answers alone")
        if self.prompt == []:
            raise ValueError("prompt is an empty list; give a text or token ids")
        return self

    @property
    def prompts(self) -> list[Any]:
        """All prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def params(self) -> SamplingParams:
        """How to sample; raises RequestError as `sampling_params` does."""
        return self.sampling_params(prompt_logprobs=self.logprobs if self.echo else None)
