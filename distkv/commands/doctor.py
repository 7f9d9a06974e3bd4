"""The command `distkv doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from distkv.commands.options import JsonFile, path_option


def doctor(
    *,
    cache_dir: Annotated[
        Path, path_option("--cache-dir", help="Folder that is to hold KV pages; made for the while if need be.")
    ] = Path(),
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to look at: host:port or auto; else one that runs here.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Look at this machine: GPUs, kernels, memory, limits, disk, Ray; exit code 1 when something does not work."""
    from rich.console import Console

    from distkv.doctor.doctor import run

    if not run(Console(highlight=False), cache_dir, ray_address, json_file):
        raise typer.Exit(1)
