"""Requests of many kinds, and all that they answer, which may not depend on what else runs: `docs/invariance.md`."""

import random
from typing import Any

from support.prompts import random_prompt

from distkv import LLM, SamplingParams
from distkv.outputs import RequestOutput

WHOLE = {"max_num_batched_tokens": 4096, "max_num_seqs": 3}  # one request at a time, in one chunk


def said(output: RequestOutput) -> list[Any]:
    """All that a request answered, with every bit of its log-probabilities."""
    return [
        (
            answer.token_ids,
            [{token: entry.logprob for token, entry in table.items()} for table in answer.logprobs or []],
        )
        for answer in output.outputs
    ]


def answers_alone(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Any]]:
    """What each request answers by itself."""
    return [said(llm.generate([prompt], one, use_tqdm=False)[0]) for prompt, one in zip(prompts, params, strict=True)]


def assert_answers(
    llm: LLM, rng: random.Random, prompts: list[list[int]], params: list[SamplingParams], expected: list[list[Any]],
    round: int,
) -> None:  # fmt: skip
    """Together, in any order, requests answer what they are expected to."""
    order = rng.sample(range(len(prompts)), len(prompts))
    outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order], use_tqdm=False)
    for index, output in zip(order, outputs, strict=True):
        assert output.error is None
        assert said(output) == expected[index], f"request {index}, round {round}"


def random_requests(
    rng: random.Random, stems: tuple[int, ...] = (16, 70, 300, 700), most: int = 40
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that begin alike, long and short, greedy and not, with one answer and several, of up to `most` tokens.
    What they have in common is as long as one of `stems`."""
    common = [random_prompt(rng.choice(stems), rng.randrange(99)) for _ in range(2)]
    prompts, params = [], []
    for number in range(rng.randint(2, 7)):
        stem = rng.choice(common)
        prompts.append(stem[: rng.randint(1, len(stem))] + random_prompt(rng.randint(0, 40), 100 + number))
        params.append(
            SamplingParams(
                temperature=rng.choice([0, 1]),
                seed=number,
                n=rng.choice([1, 1, 3]),
                max_tokens=rng.randint(1, most),
                logprobs=5,
                ignore_eos=True,
            )
        )
    return prompts, params
