"""`distkv chat`: a conversation in a terminal, which may be kept."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distkv.commands.options import EngineFlags, Model, model_folder, piecemeal, sampling, spread
from distkv.commands.streams import ask, check_stdin, complain, note
from distkv.config import EngineConfig, EngineOptions
from distkv.errors import CapacityError, ConfigError, RequestError, StoreError
from distkv.sampling_params import SamplingParams

if TYPE_CHECKING:
    from distkv.frontend.conversation import Conversation
    from distkv.llm import LLM
    from distkv.outputs import RequestOutput


@spread
def chat(
    *,
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    session: Annotated[
        str | None, typer.Option(help="Name of a conversation to go on with; kept in --cache-dir.")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say after each answer what of its prompt was cached.")
    ] = False,
    params: Annotated[SamplingParams, sampling(max_tokens=1024, temperature=0.7, top_p=0.95)],
    options: EngineFlags,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends the conversation."""
    check_stdin("run it in a terminal, or give it the questions line by line")
    from distkv.llm import LLM

    folder = model_folder(model)
    first = [] if system is None else [{"role": "system", "content": system}]
    with _conversation(session, options) as conversation:
        conversation.check(first)
        if conversation.messages:
            _say(f"{conversation.title} goes on after {len(conversation.messages)} messages")
        with LLM(folder, **options) as llm:
            while question := _ask():
                try:
                    _answer(llm, conversation, [*first, {"role": "user", "content": question}], params, stats)
                except (RequestError, CapacityError, StoreError) as error:  # it has outgrown the model, memory or disk
                    complain(str(error))
            told = llm.stats()
            if read := told.policy.shown():
                note(f"the answers have read {read}")
            if drafted := told.speculation.shown():
                note(f"the answers have had {drafted}")


def _conversation(session: str | None, options: EngineOptions) -> AbstractContextManager["Conversation"]:
    """One that is forgotten, or the session of that name in the cache folder."""
    from distkv.frontend.conversation import Conversation
    from distkv.frontend.session import Session
    from distkv.frontend.session_limits import SessionLimits

    if session is None:
        return nullcontext(Conversation())
    config = EngineConfig("/", **options)
    if config.cache_dir is None:
        raise ConfigError("--session needs a folder to keep the conversation in; give it with --cache-dir")
    return Session(config.cache_dir, session, SessionLimits.of(config))


def _answer(
    llm: "LLM", conversation: "Conversation", new: list[dict[str, Any]], params: SamplingParams, show_stats: bool
) -> None:
    """Prints the answer as it comes, and adds what was sampled of it to the conversation."""
    from distkv.outputs import join_deltas

    first_token = 0.0
    deltas: list[RequestOutput] = []
    start = time.perf_counter()
    try:
        for delta in llm.stream(conversation.prompt(llm.tokenizer, new), piecemeal(params)):
            first_token = first_token or time.perf_counter()
            deltas.append(delta)
            print(delta.outputs[0].text, end="", flush=True)
    except KeyboardInterrupt:  # stops this answer, not the conversation
        pass
    except SystemExit:  # of SIGTERM
        if deltas:
            conversation.add_output(join_deltas(deltas).outputs[0])
        raise
    print()
    if not deltas:
        return
    output = join_deltas(deltas)
    conversation.add_output(output.outputs[0])
    if show_stats:
        _say(_stats(output, first_token - start))


def _stats(output: "RequestOutput", seconds: float) -> str:
    tiers = ", ".join(f"{tier} {count}" for tier, count in output.num_cached_tokens_by_tier.items() if count)
    return (
        f"{len(output.prompt_token_ids)} tokens of prompt, {output.num_cached_tokens} of them cached"
        + (f" ({tiers})" if tiers else "")
        + f", first token after {1e3 * seconds:.0f} ms"
    )


def _ask() -> str:
    """What the user says next; empty at the end."""
    line = ask("> ")
    if line is None:
        print()
    return (line or "").strip()


def _say(remark: str) -> None:
    typer.secho(remark, dim=True)
