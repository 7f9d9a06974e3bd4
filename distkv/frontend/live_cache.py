"""What a running engine has read, to a file and from one."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from distkv.cache_folders.export_cache import CachedPrefixes
from distkv.cache_folders.export_store import Put
from distkv.cache_folders.import_cache import check_same_pages, open_exported
from distkv.cache_folders.model_cache import ModelCache
from distkv.engine.client import EngineClient
from distkv.engine.thread import EngineThread, RunningEngine
from distkv.errors import ConfigError
from distkv.frontend.cache_transfer import export_cache
from distkv.frontend.front_end import FrontEnd
from distkv.frontend.request_checks import Prompt, plain_prompt, plain_prompts, plain_salt
from distkv.frontend.session_limits import SessionLimits
from distkv.frontend.session_transfer import ComingSessions
from distkv.outputs import CacheExport, CacheImport

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0  # without a page saved, after which what is not saved is left out


def export_live(
    front_end: FrontEnd,
    store: AbstractContextManager[Put],
    prompts: Prompt | Sequence[Prompt] | None,
    sessions: Sequence[str],
    everything: bool,
    cache_salt: str | None,
) -> CacheExport:
    """See `LLM.export_cache`. Blocks, and may be called by any thread."""
    cache = _cache_of(front_end)
    given = []
    for prompt in [] if prompts is None else plain_prompts(prompts):
        text, token_ids, own_salt = plain_prompt(prompt)
        if plain_salt(cache_salt, own_salt) != cache_salt:
            raise ConfigError("a prompt has a cache_salt of its own; give it as that of the export, which has one salt")
        given.append(token_ids if token_ids is not None else text or "")
    _wait_until_saved(front_end.thread)
    cached = CachedPrefixes(cache, plain_salt(cache_salt))
    return export_cache(store, cache.folder.parent, cached, lambda: front_end.tokenizer, given, sessions, everything)


def import_live(front_end: FrontEnd, path: Path, cache_salt: str | None) -> CacheImport:
    """See `LLM.import_cache`. Blocks, and may be called by any thread."""
    cache, engine, cache_salt = _cache_of(front_end), front_end.thread, plain_salt(cache_salt)
    if not isinstance(engine, EngineThread):
        raise ConfigError("replicas have caches of their own; use `distkv cache import` while they do not run")
    with open_exported(path) as exported:
        check_same_pages(exported, cache.description)
        exported.verify()  # before any of it is taken in
        num_pages = len(exported.keyed(cache_salt))
        limits = SessionLimits.of(front_end.config)
        with ComingSessions(cache.folder.parent, exported.manifest.sessions, limits) as sessions:
            end = num_new = 0
            while end < num_pages:
                end, new = engine.call(partial(_import_part, str(path), cache_salt, end)).result()
                num_new += new
            sessions.save()
    return CacheImport(num_pages, num_new)


def _import_part(path: str, cache_salt: str | None, start: int, engine: EngineClient) -> tuple[int, int]:
    return engine.import_pages(path, cache_salt, start)


def _cache_of(front_end: FrontEnd) -> ModelCache:
    """The engine's cache folder. Raises ConfigError when it has none that outlives it, or not on this machine."""
    front_end.thread.check_process()
    info = front_end.info
    if info.num_engines > 1:
        raise ConfigError(
            "each of several engines has a cache of its own; use `distkv cache export` with the --cache-dir of one, "
            "cache_dir/engine-0, say"
        )
    if info.cache_dir is None or not info.fingerprint:
        raise ConfigError("pages are exported from disk; set cache_dir, and leave enable_prefix_caching on")
    cache = ModelCache(Path(info.cache_dir))
    if cache.is_listed_elsewhere:
        raise ConfigError(
            f"{info.cache_dir!r} is on the node of the engine's first rank; use `distkv cache export` there"
        )
    return cache


def _wait_until_saved(engine: RunningEngine) -> None:
    """Lets the engine write to disk what it writes by itself, as long as it gets on with it."""
    left, since = engine.stats().result().pages_to_save, time.monotonic()
    while left and time.monotonic() - since < PATIENCE_SECONDS:
        time.sleep(POLL_SECONDS)
        found = engine.stats().result().pages_to_save
        if found < left:
            left, since = found, time.monotonic()
