"""Rows of draws for tests of the sampler."""

from dataclasses import replace

from distkv.workers.sampling.sample_row import SampleRow

PLAIN = SampleRow(
    logits_row=0,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    num_logprobs=None,
    uniform=0.5,
    prompt_token_ids=[],
    output_token_ids=[],
)
GREEDY = replace(PLAIN, temperature=0.0)
