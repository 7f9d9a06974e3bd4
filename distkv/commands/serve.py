"""`distkv serve`: a model for whoever speaks OpenAI's API."""

import sys
from contextlib import redirect_stdout
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import typer

from distkv.commands.options import Fields, engine, model_folder, spread, surviving
from distkv.commands.streams import note
from distkv.config import EngineConfig, EngineOptions
from distkv.engine.protocol import EngineInfo
from distkv.planner.hardware import Hardware
from distkv.ray_serve.options import ReplicaOptions
from distkv.server.options import QUEUED_REQUESTS, ServerOptions

RANK_FAILURES = 10  # that are made good unless the user says otherwise

ReplicaFlags = Annotated[ReplicaOptions, Fields(ReplicaOptions, ("replicas", "route_prefix"), {})]
ServerFlags = Annotated[ServerOptions, Fields(ServerOptions, tuple(field.name for field in fields(ServerOptions)), {})]
EngineFlags = Annotated[
    EngineOptions,
    engine(*(field.name for field in fields(EngineConfig) if field.name != "model")),
]


@spread
def serve(
    model: Annotated[str, typer.Argument(help="Hugging Face model folder, or smollm2, which is fetched if need be.")],
    *,
    replicas: ReplicaFlags,
    server: ServerFlags,
    options: EngineFlags,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a page to look at."""
    tell = partial(_tell, model, sys.stdout)
    if options["max_queued_requests"] is None:
        options = {**options, "max_queued_requests": QUEUED_REQUESTS}
    with redirect_stdout(sys.stderr):  # Ray prints what it says of any worker's death
        if replicas.replicas is not None:
            from distkv.ray_serve.run import serve_replicas

            serve_replicas(model, lambda: _told_of(model_folder(model), options), server, options, replicas, tell)
            return
        from distkv.server.serve import serve as run

        found, options = partial(model_folder, model), surviving(options, RANK_FAILURES)
        run(model, found, server, options, partial(_tell_of, options), tell)


def _told_of(folder: Path, options: EngineOptions) -> Path:
    """The same, of which what is known before an engine runs has been said."""
    from distkv.launch.start_lines import start_lines

    for line in start_lines(EngineConfig(folder, **options)):
        note(line)
    return folder


def _tell_of(options: EngineOptions, info: EngineInfo, hardware: Hardware | None) -> None:
    from distkv.launch.start_lines import start_lines

    for line in start_lines(EngineConfig(info.model, **options), info, hardware):
        note(line)


def _tell(model: str, stdout: TextIO, url: str) -> None:
    print(f"distkv serves {model} at {url}", file=stdout, flush=True)
