"""The commands `distkv cache ...`."""

from typing import Annotated

import typer

from distkv.commands.cache_files import CacheFolder, cache_export, cache_import

cache = typer.Typer(help="Look after a --cache-dir.")
cache.command("export")(cache_export)
cache.command("import")(cache_import)


@cache.command("ls")
def cache_ls(cache_dir: CacheFolder) -> None:
    """List the models of which pages lie there."""
    from rich.console import Console

    from distkv.cache_folders.upkeep import list_caches

    list_caches(Console(), cache_dir)


@cache.command("verify")
def cache_verify(
    cache_dir: CacheFolder,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take out what is damaged and what belongs to no page; no engine may run.")
    ] = False,
) -> None:
    """Read all that lies there and compare checksums; exit code 1 when anything was not whole."""
    from rich.console import Console

    from distkv.cache_folders.verify import verify_caches
    from distkv.frontend.session_folder import verify_sessions

    if not verify_caches(Console(), cache_dir, repair, lambda: verify_sessions(cache_dir, repair)):
        raise typer.Exit(1)


@cache.command("prune")
def cache_prune(
    cache_dir: CacheFolder,
    max_bytes: Annotated[str, typer.Option(help="Most bytes that may stay, e.g. 10GiB; 0 for none.")],
    model: Annotated[str | None, typer.Option(help="Fingerprint of the only model to prune.")] = None,
) -> None:
    """Give up the pages that were used longest ago, until the rest fits."""
    from rich.console import Console

    from distkv.cache_folders.upkeep import prune_caches
    from distkv.option_checks import parse_bytes

    prune_caches(Console(), cache_dir, parse_bytes("max-bytes", max_bytes, least=0), model)
