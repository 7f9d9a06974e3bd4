"""Runs requests on an engine to their end, for whoever has it to himself: benchmarks, stress tests, the demo."""

from collections.abc import Iterator

from distkv import errors
from distkv.engine.client import EngineClient, OpenAnswers
from distkv.engine.protocol import EngineRequest, PromptLogprobs, RequestFailed, TokenOutput


def drive(engine: EngineClient, requests: list[EngineRequest]) -> Iterator[list[TokenOutput]]:
    """Queues requests and goes on by steps until all their answers have ended; yields the tokens of each step, which
    may be none. Raises as `EngineClient` does, and what a request has failed with."""
    for outputs in drive_scored(engine, requests):
        yield [output for output in outputs if isinstance(output, TokenOutput)]


def drive_scored(engine: EngineClient, requests: list[EngineRequest]) -> Iterator[list[TokenOutput | PromptLogprobs]]:
    """The same with the log-probabilities of tokens that were given."""
    engine.add(requests)
    unfinished = OpenAnswers()
    unfinished.add(requests)
    while len(unfinished):
        outputs = _next_outputs(engine)
        unfinished.take(outputs)
        yield outputs


def next_tokens(engine: EngineClient) -> list[TokenOutput]:
    """The tokens of one more step; raises what a request has failed with in it."""
    return [output for output in _next_outputs(engine) if isinstance(output, TokenOutput)]


def drain(engine: EngineClient) -> None:
    """Goes on until nothing is left to be saved, once all requests have ended."""
    while engine.has_work:
        next_tokens(engine)


def _next_outputs(engine: EngineClient) -> list[TokenOutput | PromptLogprobs]:
    outputs: list[TokenOutput | PromptLogprobs] = []
    for output in engine.step():
        if isinstance(output, RequestFailed):
            raise getattr(errors, output.error)(output.message)
        outputs.append(output)
    return outputs
