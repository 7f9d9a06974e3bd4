"""`distkv serve`: a model for whoever speaks OpenAI's API."""

from dataclasses import fields
from typing import Annotated

import typer

from distkv.commands.options import Fields, engine, model_folder, spread
from distkv.config import EngineConfig, EngineOptions
from distkv.server.options import ServerOptions

ServerFlags = Annotated[ServerOptions, Fields(ServerOptions, tuple(field.name for field in fields(ServerOptions)), {})]
EngineFlags = Annotated[
    EngineOptions,
    engine(*(field.name for field in fields(EngineConfig) if field.name != "model"), max_rank_failures=10),
]


@spread
def serve(
    model: Annotated[str, typer.Argument(help="Hugging Face model folder, or smollm2, which is fetched if need be.")],
    *,
    server: ServerFlags,
    options: EngineFlags,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a page to look at."""
    from distkv.server.serve import serve as run

    run(model, lambda: model_folder(model), server, options, lambda url: _tell(model, url))


def _tell(model: str, url: str) -> None:
    print(f"distkv serves {model} at {url}", flush=True)
