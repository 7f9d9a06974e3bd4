"""Requests whose lengths follow what is published of ShareGPT, conversations of people with ChatGPT.

The means are those of figure 11 in Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention" (SOSP 2023): 161.31 tokens of prompt and 337.99 of answer, served with room for 2048. The paper draws
long-tailed histograms and gives no spread. Lengths are lognormal here, with the deviation of the logarithm that follows
from median and 90th percentile of openchat_sharegpt4, a selection of the same conversations, in table 2 of Agrawal et
al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (OSDI 2024): 1730 and 5696 tokens of
prompt, 415 and 834 of answer.
"""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

from distkv.bench.prompts import Prompts
from distkv.engine.protocol import EngineRequest
from distkv.sampling_params import SamplingParams

PUBLISHED_LIMIT = 2048  # tokens of prompt and answer together
MEAN_PROMPT, MEAN_ANSWER = 161.31, 337.99
_P90 = NormalDist().inv_cdf(0.9)
PROMPT_SPREAD = math.log(5696 / 1730) / _P90  # 0.93, of the logarithm
ANSWER_SPREAD = math.log(834 / 415) / _P90  # 0.54
SHORTEST = 4  # tokens of a prompt or an answer; benchmarks leave shorter ones of the data set out
SOURCE = (
    "lognormal lengths of the published means of ShareGPT (Kwon et al. 2023: 161.31 + 337.99 tokens of at most 2048) "
    "and spread (Agrawal et al. 2024), in proportion to max_model_len"
)


@dataclass(frozen=True)
class Conversation:
    """A prompt, and how many tokens its answer will have. The engine is not told: `request.max_tokens` is all that
    there is room for."""

    request: EngineRequest
    answer_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache when the answer ends; its last token is never read."""
        return len(self.request.prompt_token_ids) + self.answer_tokens - 1


def draw_lengths(count: int, max_model_len: int, seed: int) -> list[tuple[int, int]]:
    """Tokens of `count` prompts and answers. With another limit than the published one, the means change in
    proportion; a pair that exceeds the limit is drawn again, as the data set leaves such ones out."""
    generator = random.Random(seed)
    scale = max_model_len / PUBLISHED_LIMIT
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        prompt = _draw(generator, MEAN_PROMPT * scale, PROMPT_SPREAD)
        answer = _draw(generator, MEAN_ANSWER * scale, ANSWER_SPREAD)
        if prompt + answer <= max_model_len:
            pairs.append((prompt, answer))
    return pairs


def conversations(prompts: Prompts, count: int, max_model_len: int, seed: int) -> list[Conversation]:
    """Each prompt is a piece of the text of its own; answers are greedy, and end when they have their length."""
    pairs = draw_lengths(count, max_model_len, seed)
    text = prompts.text(sum(prompt for prompt, _ in pairs))
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)  # an answer of unknown length
    found = []
    for number, (prompt, answer) in enumerate(pairs):
        request = EngineRequest(str(number), text[:prompt], params, max_model_len - prompt, number)
        found.append(Conversation(request, answer))
        text = text[prompt:]
    return found


def _draw(generator: random.Random, mean: float, spread: float) -> int:
    return max(SHORTEST, round(generator.lognormvariate(math.log(mean) - spread**2 / 2, spread)))
