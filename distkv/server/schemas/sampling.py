"""The fields of a request that say how to sample, and `SamplingParams` made of them."""

from typing import Any, ClassVar

import msgspec

from distkv.sampling_params import RequestOutputKind, SamplingParams
from distkv.server.schemas.body import ANYTHING, Body
from distkv.server.schemas.structured import structured_outputs

NAMES = frozenset(msgspec.structs.asdict(SamplingParams()))


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    without_effect: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(Body):
    """A request of any API. A field that has the name of one of `SamplingParams` becomes that one, and limits of values
    are theirs."""

    without_effect: ClassVar = {
        "user": (ANYTHING,),
        "service_tier": ("auto", "default", "standard_only"),
        "spaces_between_special_tokens": (True,),
    }

    model: str | None = None
    stream: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_speculative_tokens: int | None = None
    priority: int = 0
    cache_salt: str | None = None

    def sampling_params(self, **more: Any) -> SamplingParams:
        """The parameters, with `more` in place of fields of the same name; raises RequestError for one that is out of
        range."""
        given = {name: getattr(self, name) for name in NAMES & self.model_fields_set}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return SamplingParams(**(given | {"output_kind": kind} | more))


class OpenAIBody(SamplingBody):
    """A request of OpenAI's for completions."""

    without_effect: ClassVar = SamplingBody.without_effect | {
        "safety_identifier": (ANYTHING,),
        "prompt_cache_key": (ANYTHING,),  # prefixes are found without it
        "prompt_cache_retention": (ANYTHING,),
        "metadata": ({},),
        "store": (False,),
        "length_penalty": (1, 1.0),
        "use_beam_search": (False,),
        "add_special_tokens": (True,),
    }

    stream_options: StreamOptions = StreamOptions()
    n: int = 1
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def sampling_params(self, **more: Any) -> SamplingParams:
        """See `SamplingBody.sampling_params`."""
        return super().sampling_params(structured_outputs=structured_outputs(self), **more)

    def check_stream(self) -> None:
        """Raises ValueError for `stream_options` where nothing is streamed."""
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options says how to stream, and stream is not true; leave it out or stream")
