"""`distkv chat`: a conversation in a terminal, which may be kept."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from distkv.errors import CapacityError, ConfigError, RequestError
from distkv.frontend.conversation import Conversation
from distkv.frontend.session import Session
from distkv.llm import LLM
from distkv.outputs import RequestOutput, join_deltas
from distkv.sampling_params import SamplingParams


def run(
    model: Path,
    options: dict[str, Any],
    params: SamplingParams,
    system: str | None,
    session: str | None,
    show_stats: bool,
) -> None:
    """Asks and answers until an empty line or the end of the input.

    Args:
        options: of the engine.
        params: of every answer, of the output kind DELTA.
        system: message at the beginning; for a session that goes on, the one that it has.
        session: name of the conversation that is to go on, now and in later processes.

    Raises ConfigError for a session that cannot be kept.
    """
    if session is not None and options["cache_dir"] is None:
        raise ConfigError("--session needs a folder to keep the conversation in; give it with --cache-dir")
    first = [{"role": "system", "content": system}] if system else []
    with nullcontext(Conversation()) if session is None else Session(options["cache_dir"], session) as conversation:
        conversation.check(first)
        if conversation.messages:
            _say(f"{conversation.title} goes on after {len(conversation.messages)} messages")
        with LLM(model, **options) as llm:
            while question := _ask():
                try:
                    _answer(llm, conversation, [*first, {"role": "user", "content": question}], params, show_stats)
                except (RequestError, CapacityError) as error:  # it has outgrown the model or the memory
                    print(f"distkv: error: {error}", file=sys.stderr)


def _answer(
    llm: LLM, conversation: Conversation, new: list[dict[str, Any]], params: SamplingParams, show_stats: bool
) -> None:
    """Prints the answer as it comes, and adds what was sampled of it to the conversation."""
    deltas: list[RequestOutput] = []
    start = first_token = time.perf_counter()
    try:
        for delta in llm.stream(conversation.prompt(llm.tokenizer, new), params):
            if not deltas:
                first_token = time.perf_counter()
            deltas.append(delta)
            print(delta.outputs[0].text, end="", flush=True)
    except KeyboardInterrupt:  # stops this answer, not the conversation
        pass
    print()
    if not deltas:
        return
    output = join_deltas(deltas)
    conversation.add_output(output.outputs[0])
    if show_stats:
        _say(_stats(output, first_token - start))


def _stats(output: RequestOutput, seconds: float) -> str:
    tiers = ", ".join(f"{tier} {count}" for tier, count in output.num_cached_tokens_by_tier.items() if count)
    return (
        f"{len(output.prompt_token_ids)} tokens of prompt, {output.num_cached_tokens} of them cached"
        + (f" ({tiers})" if tiers else "")
        + f", first token after {1e3 * seconds:.0f} ms"
    )


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def _say(remark: str) -> None:
    typer.secho(remark, dim=True)
