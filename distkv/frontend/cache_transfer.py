"""What was read and said, to a file and from one: prompts and sessions by name, for whoever has a tokenizer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from distkv.cache_folders.export_cache import CachedPrefixes, export_pages
from distkv.cache_folders.export_store import Put
from distkv.cache_folders.import_cache import ExportedCache, import_pages
from distkv.errors import RequestError
from distkv.frontend.session_transfer import ComingSessions, read_session
from distkv.frontend.tokenizer import Tokenizer
from distkv.launch.fingerprint import FOLDER_DIGITS
from distkv.outputs import CacheExport, CacheImport, PromptExport
from distkv.storage.disk.cache_folder import Description
from distkv.storage.disk.catalogue import Entry


def export_cache(
    store: AbstractContextManager[Put],
    cache_dir: Path,
    cached: CachedPrefixes,
    tokenizer: Callable[[], Tokenizer],
    prompts: Sequence[str | list[int]] = (),
    sessions: Sequence[str] = (),
    everything: bool = False,
) -> CacheExport:
    """Writes prompts and sessions, as far as their pages lie on disk.

    Args:
        store: where to, see `export_store.py`.
        tokenizer: is made when a text is to be encoded.
        everything: all pages of the salt.

    Raises RequestError when nothing was chosen, or no page would be in the file, nor a session, and as `export_pages`
    and `read_session` do.
    """
    if not (prompts or sessions or everything):
        raise RequestError("nothing was chosen; name prompts, sessions or all pages")
    prefixes: list[Sequence[Entry]] = []
    exported: list[PromptExport] = []
    contents: dict[str, dict[str, Any]] = {}

    def add(name: str, token_ids: list[int]) -> None:
        prefixes.append(found := cached.longest(token_ids))
        exported.append(PromptExport(name, len(token_ids), len(found) * cached.page_size))

    for number, prompt in enumerate(prompts, 1):
        add(f"prompt {number}", tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)
    for name in sessions:
        contents[name], token_ids = read_session(cache_dir, name, tokenizer())
        add(f"session {name}", token_ids)
    if everything:
        prefixes += cached.all()
    if not any(prefixes) and not contents:
        raise RequestError(
            f"no page of that lies on disk in {str(cached.cache.folder)!r}. Have an engine with the same cache_dir and "
            f"cache_salt read it first, {cached.page_size} tokens at least, and close it, which saves its pages"
        )
    return export_pages(store, cached.cache, prefixes, contents, exported)


def import_cache(exported: ExportedCache, cache_dir: Path, pages: Description, cache_salt: str | None) -> CacheImport:
    """Takes pages and sessions of a file in, or nothing.

    Args:
        pages: what is said of them in `cache_dir`, or is to be.

    Raises as `import_pages` and `ComingSessions` do.
    """
    with ComingSessions(cache_dir, exported.manifest.sessions) as sessions:
        imported = import_pages(exported, page_folder(cache_dir, pages), pages, cache_salt)
        sessions.save()
    return imported


def page_folder(cache_dir: Path, pages: Description) -> Path:
    """Where the pages of a model lie in a cache_dir."""
    return cache_dir / pages.fingerprint[:FOLDER_DIGITS]
