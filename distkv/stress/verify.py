"""Whether the answers of a stress run are right: equal to those of a run without tiers, or near a float64 reference."""

import math
from dataclasses import dataclass

import torch

from distkv.stress.reference import Reference
from distkv.stress.stage import Stage

# Rounding moves log-probabilities by some 2 * eps * layers ** 0.5 of their own deviation over the vocabulary (tiny,
# small and llama-3.2-1b, bfloat16 and float16); a page that is missing from 100,000 random tokens by some 25 eps of
# bfloat16.
TOLERANCE_EPS = 6.0
TOLERANCE_FLOOR = 1e-4  # log-probabilities themselves are float32


@dataclass(frozen=True)
class Verdict:
    """What a verification found."""

    passed: bool
    way: str  # "all-resident run" or "float64 reference"
    text: str  # in one line
    num_logprobs: int  # that were compared
    largest_error: float | None = None  # of the reference's way, see `tolerance`
    tolerance: float | None = None


def tolerance(dtype: torch.dtype, num_layers: int) -> float:
    """Largest error of a log-probability against the float64 reference that rounding explains, as a part of the
    standard deviation of the log-probabilities over the vocabulary."""
    return TOLERANCE_EPS * torch.finfo(dtype).eps * num_layers**0.5 + TOLERANCE_FLOOR


def compare_runs(stages: list[Stage], resident: list[Stage]) -> Verdict:
    """Tokens and log-probabilities of a run and of the all-resident one, bit for bit."""
    way = "all-resident run"
    count = 0
    for stage, other in zip(stages, resident, strict=True):
        for number, (mine, theirs) in enumerate(zip(stage.outputs, other.outputs, strict=True), 1):
            assert mine.logprobs is not None and theirs.logprobs is not None
            if mine.token_id != theirs.token_id or mine.logprobs != theirs.logprobs:
                what = "log-probabilities differ" if mine.token_id == theirs.token_id else "it is another token"
                text = f"token {number} after {stage.context} tokens differs from the all-resident run's: {what}"
                return Verdict(False, way, text, count)
            count += 1 + len(mine.logprobs.top)
    tokens = sum(len(stage.outputs) for stage in stages)
    text = f"{tokens} tokens and {count} log-probabilities equal the all-resident run's bit for bit"
    return Verdict(True, way, text, count)


def compare_with_reference(stages: list[Stage], reference: Reference) -> Verdict:
    """The engine's log-probabilities against float64 ones, each given the engine's own tokens before it."""
    way = "float64 reference"
    allowed = tolerance(reference.dtype, reference.model.num_hidden_layers)
    worst, where, count = 0.0, "", 0
    for stage in stages:
        logprobs = reference.logprobs(stage.request, [output.token_id for output in stage.outputs])
        for number, (output, right) in enumerate(zip(stage.outputs, logprobs, strict=True), 1):
            assert output.logprobs is not None
            listed = dict([(output.token_id, output.logprobs.logprob), *output.logprobs.top])
            mine = torch.tensor(list(listed.values()), dtype=torch.float64, device=right.device)
            error = ((mine - right[list(listed)]).abs().max() / right.std()).item()
            # the token that was sampled is the likeliest one, as far as rounding can tell
            error = max(error, ((right.max() - right[output.token_id]) / right.std()).item() / 2)
            count += len(listed)
            error = math.inf if math.isnan(error) else error
            if error >= worst:
                worst, where = error, f"token {number} after {stage.context} tokens"
    passed = worst <= allowed
    sign = "at most" if passed else "more than"
    text = (
        f"float64 reference, largest error {worst:.2g} of the deviation of the log-probabilities ({where}), "
        f"{sign} the {allowed:.2g} allowed; {count} were compared"
    )
    return Verdict(passed, way, text, count, worst, allowed)
