"""An engine of the model that is asked to read texts and to answer questions about them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from distkv.bench.quality.variants import Variant
from distkv.config import EngineConfig, EngineOptions
from distkv.engine.drive import drive_scored
from distkv.engine.protocol import EngineRequest, PromptLogprobs, TokenOutput
from distkv.launch.launch import launch
from distkv.sampling_params import SamplingParams
from distkv.storage.page_spec import PageSpec
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec
from distkv.workers.sampling.sampled_token import TokenLogprobs

NUM_TOP = 100  # tokens that are listed at each position of a text
GREEDY = SamplingParams(temperature=0, max_tokens=None)
AT_A_TIME = 8


def page_spec(model: ModelConfig, variant: Variant) -> PageSpec:
    """The pages of a variant, over the whole model."""
    return model_page_spec(model, variant.page_size, model.run_dtype(variant.dtype), variant.kv_cache_dtype)


class Answers:
    """An engine of a variant, with room for texts of `longest` tokens on the device. A context manager."""

    def __init__(self, model: Path, variant: Variant, longest: int, num_threads: int | None):
        spec = page_spec(ModelConfig.load(model), variant)
        room = (spec.pages_for(longest) + AT_A_TIME * spec.pages_for(2 * variant.page_size)) * spec.page_bytes
        options: EngineOptions = {
            **variant.options,
            "max_model_len": longest,
            "max_num_seqs": AT_A_TIME,
            "num_threads": num_threads,
            "device_kv_bytes": room,
            "host_kv_bytes": room,
        }
        self._engine = launch(EngineConfig(model, **options))

    def score(self, text: list[int], num_read: int) -> list[TokenLogprobs]:
        """What the model says of a text's tokens behind the first `num_read`, each when it knows those before it. These
        first ones are the prompt, and the others an answer, so that a policy acts on them."""
        prompt, answer = text[:num_read], text[num_read:]
        request = EngineRequest("0", prompt, GREEDY, len(answer) + 1, 0, begun={0: answer}, begun_logprobs=NUM_TOP)
        return [one for output in self._run([request]) if isinstance(output, PromptLogprobs) for one in output.tokens]

    def continue_all(self, begun: list[tuple[list[int], list[int]]], num_tokens: int) -> list[list[int]]:
        """So many tokens more of answers that have begun, the likeliest at each place: `begun` has the prompt and the
        answer's first tokens of each."""
        requests = [
            EngineRequest(str(number), prompt, GREEDY, len(lead) + num_tokens, 0, begun={0: lead})
            for number, (prompt, lead) in enumerate(begun)
        ]
        answers: list[list[int]] = [[] for _ in begun]
        for output in self._run(requests):
            if isinstance(output, TokenOutput):
                answers[int(output.request_id)].append(output.token_id)
        return answers

    def _run(self, requests: list[EngineRequest]) -> Iterator[TokenOutput | PromptLogprobs]:
        """All that comes of requests until the last of them has ended."""
        for outputs in drive_scored(self._engine, requests):
            yield from outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
