"""`distkv serve`: a model for whoever speaks OpenAI's API."""

import sys
from contextlib import redirect_stdout
from dataclasses import fields
from functools import partial
from typing import Annotated, TextIO

import typer

from distkv.commands.options import Fields, engine, model_folder, spread, surviving
from distkv.config import EngineConfig, EngineOptions
from distkv.ray_serve.options import ReplicaOptions
from distkv.server.options import ServerOptions

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
    with redirect_stdout(sys.stderr):  # Ray prints what it says of any worker's death
        if replicas.replicas is not None:
            from distkv.ray_serve.run import serve_replicas

            serve_replicas(model, lambda: model_folder(model), server, options, replicas, tell)
            return
        from distkv.server.serve import serve as run

        run(model, lambda: model_folder(model), server, surviving(options, RANK_FAILURES), tell)


def _tell(model: str, stdout: TextIO, url: str) -> None:
    print(f"distkv serves {model} at {url}", file=stdout, flush=True)
