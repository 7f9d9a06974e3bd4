"""Runs requests on an engine to their end, for whoever has it to himself: benchmarks, stress tests, the demo."""

from collections.abc import Iterator

from distkv import errors
from distkv.engine.client import EngineClient, OpenAnswers
from distkv.engine.protocol import EngineRequest, RequestFailed, TokenOutput


def drive(engine: EngineClient, requests: list[EngineRequest]) -> Iterator[list[TokenOutput]]:
    """Queues requests and goes on by steps until all their answers have ended; yields the tokens of each step, which
    may be none. Raises as `EngineClient` does, and what a request has failed with."""
    engine.add(requests)
    unfinished = OpenAnswers()
    unfinished.add(requests)
    while len(unfinished):
        tokens = next_tokens(engine)
        unfinished.take(tokens)
        yield tokens


def next_tokens(engine: EngineClient) -> list[TokenOutput]:
    """The tokens of one more step; raises what a request has failed with in it."""
    tokens = []
    for output in engine.step():
        if isinstance(output, RequestFailed):
            raise getattr(errors, output.error)(output.message)
        if isinstance(output, TokenOutput):
            tokens.append(output)
    return tokens


def drain(engine: EngineClient) -> None:
    """Goes on until nothing is left to be saved, once all requests have ended."""
    while engine.has_work:
        next_tokens(engine)
