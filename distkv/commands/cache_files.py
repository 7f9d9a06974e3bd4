"""The commands `distkv cache export` and `distkv cache import`."""

from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from distkv.commands.options import model_folder, path_argument, path_option
from distkv.commands.streams import read_prompt
from distkv.errors import ConfigError

CacheFolder = Annotated[Path, path_option("--cache-dir", help="The folder that engines were given as --cache-dir.")]
Salt = Annotated[str | None, typer.Option(help="The cache_salt of requests that use the pages.")]


def cache_export(
    out: Annotated[Path, path_argument(help="What to write: NAME.zarr, which is a folder, or NAME.zarr.zip.")],
    cache_dir: CacheFolder,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt that was read; may be repeated.")] = None,
    prompt_file: Annotated[list[Path] | None, path_option(help="A file with one, UTF-8; may be repeated.")] = None,
    session: Annotated[list[str] | None, typer.Option(help="A session, with its pages; may be repeated.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The pages of all prompts.")] = False,
    cache_salt: Salt = None,
    model: Annotated[str | None, typer.Option(help="The model's folder, where it has moved since.")] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Where there are several models: the first digits of what `ls` shows.")
    ] = None,
) -> None:
    """Write what was read once to a file, for engines of the same weights elsewhere. An engine may be running: what it
    has not saved to disk yet is left out."""
    from distkv.cache_folders.export_cache import CachedPrefixes
    from distkv.cache_folders.export_store import check_target, new_store
    from distkv.cache_folders.model_cache import find_cache
    from distkv.frontend.cache_transfer import export_cache
    from distkv.frontend.tokenizer import Tokenizer
    from distkv.planner.units import shown_bytes

    check_target(out)
    prompts = [*(prompt or []), *(read_prompt(None, one) for one in prompt_file or [])]
    if not (prompts or session or everything):
        raise ConfigError("nothing was chosen; give --prompt, --prompt-file, --session or --all")
    pages = find_cache(cache_dir, fingerprint)
    folder = Path(pages.description.model) if model is None else model_folder(model)
    tokenizer = cache(lambda: Tokenizer(folder))
    exported = export_cache(
        new_store(out), cache_dir, CachedPrefixes(pages, cache_salt), tokenizer, prompts, session or [], everything
    )
    for one in exported.prompts:
        print(f"{one.name}: {one.num_exported} of {one.num_tokens} tokens")
    print(f"{exported.num_pages} pages ({exported.num_tokens} tokens, {shown_bytes(exported.num_bytes)}) in {out}")


def cache_import(
    file: Annotated[Path, path_argument(help="What `distkv cache export` has written.")],
    cache_dir: CacheFolder,
    model: Annotated[
        str | None, typer.Option(help="The model's folder; needed where its pages do not lie in --cache-dir yet.")
    ] = None,
    cache_salt: Salt = None,
) -> None:
    """Take a file of `export` in: all of it or, where it is damaged or of other weights, nothing. No engine may use the
    folder meanwhile. Only take what you trust: nothing shows whether pages are those of their tokens."""
    from distkv.cache_folders.import_cache import check_same_pages, find_same_pages, open_exported
    from distkv.cache_folders.model_cache import ModelCache
    from distkv.frontend.cache_transfer import import_cache, page_folder
    from distkv.launch.own_pages import own_pages
    from distkv.planner.units import shown_bytes

    with open_exported(file) as exported:
        if model is None:
            pages = find_same_pages(exported, cache_dir)
        else:
            pages = own_pages(model_folder(model), exported.pages)
            check_same_pages(exported, pages)
        imported = import_cache(exported, cache_dir, pages, cache_salt)
    known = imported.num_pages - imported.num_new
    print(f"{imported.num_new} of {imported.num_pages} pages taken in" + (f", {known} were there" if known else ""))
    for name in exported.manifest.sessions:
        print(f"session {name} taken in")
    if there := len(ModelCache(page_folder(cache_dir, pages)).entries()):
        size = shown_bytes(there * pages.page_bytes)
        print(
            f"{there} pages are there now: of these an engine with disk_kv_bytes below {size} keeps what was used last"
        )
