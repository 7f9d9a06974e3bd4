"""How many tokens a request took."""

from typing import Any

from distkv.outputs import RequestOutput


class Usage:
    """The tokens of requests that are answered together, counted from their outputs."""

    def __init__(self) -> None:
        self._prompts: dict[int, RequestOutput] = {}  # the last output by request
        self.num_completion_tokens = 0

    def add(self, index: int, output: RequestOutput) -> None:
        """Takes an output of the request with this index, of which each token is in one output."""
        self._prompts[index] = output
        self.num_completion_tokens += sum(len(answer.token_ids) for answer in output.outputs)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each of which counts once however many answers it has."""
        return sum(len(output.prompt_token_ids) for output in self._prompts.values())

    @property
    def num_cached_tokens(self) -> int:
        """Those of them whose KV was found."""
        return sum(output.num_cached_tokens for output in self._prompts.values())

    def openai(self) -> dict[str, Any]:
        """In the words of completions."""
        prompt, completion = self.num_prompt_tokens, self.num_completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
