"""The small model that drafts, as ranks are told of it."""

from pathlib import Path

from distkv.config import EngineConfig
from distkv.errors import ConfigError
from distkv.speculative_config import MAX_DRAFT
from distkv.storage.paging import pages_for
from distkv.storage.tier import Tier
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import DraftConfig, model_page_spec

TOKENIZER = "tokenizer.json"


def draft_config(config: EngineConfig, model: ModelConfig) -> DraftConfig | None:
    """What ranks are told of the draft model, None without one. Raises ConfigError for one that cannot be used beside
    the model."""
    speculation = config.speculation
    if speculation is None or speculation.model is None:
        return None
    folder = Path(speculation.model)
    draft = ModelConfig.load(folder)
    if draft.vocab_size != model.vocab_size or not _has_same_tokenizer(folder, Path(config.model)):
        raise ConfigError(
            f"the draft model {folder} has another tokenizer than {config.model} (vocabularies of {draft.vocab_size} "
            f"and {model.vocab_size} tokens); use one of the same family"
        )
    most = config.max_model_len or model.most_positions
    if draft.most_positions < most:
        raise ConfigError(
            f"the draft model {folder} was made for {draft.most_positions} positions and max_model_len is {most}; "
            "lower it, or use another draft model"
        )
    spec = model_page_spec(draft, config.page_size, model.run_dtype(config.dtype))
    page_bytes, least = spec.page_bytes_in(Tier.DEVICE), pages_for(most + MAX_DRAFT, config.page_size)
    num_bytes = speculation.draft_kv_bytes
    if num_bytes is None:
        return DraftConfig(folder, draft, least)
    if int(num_bytes) < least * page_bytes:
        raise ConfigError(
            f"speculative_config has draft_kv_bytes {num_bytes}, and {most} tokens (max_model_len) of the draft model "
            f"take {least * page_bytes}; raise it, or lower max_model_len"
        )
    return DraftConfig(folder, draft, int(num_bytes) // page_bytes)


def _has_same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both have the same tokenizer's file, or one of them has none."""
    files = [folder / TOKENIZER for folder in (one, other)]
    return not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes()
