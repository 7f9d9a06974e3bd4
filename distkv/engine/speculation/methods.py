"""What drafts tokens, by the method that was asked for."""

from distkv.engine.protocol import EngineInfo
from distkv.engine.speculation.model_drafts import ModelDrafts, RunDrafts
from distkv.engine.speculation.ngram_drafts import NgramDrafts
from distkv.engine.speculation.self_drafts import SelfDrafts
from distkv.engine.speculation.self_speculator import SelfSpeculator
from distkv.engine.speculation.speculator import Speculator
from distkv.storage.ledger.tiered_cache import TieredCache


def make_speculator(info: EngineInfo, run: RunDrafts, cache: TieredCache) -> Speculator:
    """For an engine whose options ask for drafts.

    Args:
        run: `Executor.draft`.
        cache: says which pages are resident.
    """
    assert info.speculation is not None
    match info.speculation.method:
        case "self":
            return SelfSpeculator(info, SelfDrafts(), cache)
        case "draft_model":
            return Speculator(info, ModelDrafts(run))
        case _:
            return Speculator(info, NgramDrafts(info.speculation))
