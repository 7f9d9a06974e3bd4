"""What a Hugging Face `config.json` says about a LLaMA model, checked; what cannot be run exactly is refused."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distkv.storage.dtypes import DTYPES, STORED_DTYPES
from distkv.workers.errors import ConfigError
from distkv.workers.model.config_fields import check_fields, check_rope_fields
from distkv.workers.model.files import cannot_read

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
ORIGINAL_LENGTH = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of the rotary embedding; fields that a type does not use stay at their defaults."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `LlamaForCausalLM`; names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str  # of the checkpoint, one of `STORED_DTYPES`
    eos_token_ids: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def most_positions(self) -> int:
        """The most positions that a request may use: RoPE of some types stretches those of training."""
        stretch = self.rope.factor if self.rope.rope_type in ("linear", "dynamic") else 1
        return int(self.max_position_embeddings * stretch)

    def run_dtype(self, option: str) -> str:
        """What the option `dtype` means for this model; raises ConfigError where that is not supported."""
        return check_dtype(self.dtype if option == "auto" else option)

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Reads `folder/config.json`, and more end tokens of `generation_config.json` where there is one.

        Raises ConfigError when the folder or the file is missing or malformed, or the model is not supported.
        """
        try:
            if not folder.is_dir():
                what = "is not a folder" if folder.exists() else "does not exist"
                raise ConfigError(
                    f"model folder {str(folder)!r} {what}; give the path of a Hugging Face model folder (names of the "
                    "hub are not fetched)"
                )
            if not (folder / "config.json").is_file():
                raise ConfigError(f"{str(folder)!r} has no config.json; give the path of a Hugging Face model folder")
            config = cls.from_dict(_read_json(folder / "config.json"))
            generation = folder / "generation_config.json"
            if generation.is_file():
                stops = _token_ids(_read_json(generation).get("eos_token_id"), "eos_token_id")
                config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + stops)))
            return config
        except OSError as error:
            raise cannot_read(folder, error) from error

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Checks the content of a `config.json`; raises ConfigError naming the field and what is supported."""
        check_fields(raw)
        heads = _positive(raw, "num_attention_heads")
        hidden = _positive(raw, "hidden_size")
        kv_heads = heads if raw.get("num_key_value_heads") is None else _positive(raw, "num_key_value_heads")
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if raw.get("head_dim") is None and hidden % heads:
            raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; set head_dim")
        head_dim = hidden // heads if raw.get("head_dim") is None else _positive(raw, "head_dim")
        if head_dim % 2:
            raise ConfigError(f"head_dim {head_dim} is odd; the rotary embedding needs an even one")
        positions = _positive(raw, "max_position_embeddings", 2048)
        rope = _rope_config(raw, positions)
        if rope.rope_type == "dynamic" and head_dim < 4:
            raise ConfigError(f"head_dim {head_dim} is too small for rope_type 'dynamic', which needs 4 or more")
        return cls(
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_hidden_layers=_positive(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=_positive_number(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", "it must be"),
            rope=rope,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            attention_bias=_flag(raw, "attention_bias"),
            mlp_bias=_flag(raw, "mlp_bias"),
            dtype=check_dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32", STORED_DTYPES),
            eos_token_ids=_token_ids(raw.get("eos_token_id"), "eos_token_id"),
        )


def check_dtype(name: Any, supported: tuple[str, ...] = DTYPES) -> str:
    """The name of a dtype, such as "bfloat16"; raises ConfigError for one that is not supported."""
    if not isinstance(name, str) or name not in supported:
        raise ConfigError(f"dtype {name!r} is not supported; use one of {', '.join(supported)}")
    return name


def _rope_config(raw: dict[str, Any], positions: int) -> RopeConfig:
    """Reads both spellings, `rope_parameters` (newer) and `rope_theta` with `rope_scaling` (older); as in transformers,
    the older one wins."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{field} in config.json is {rope!r}; it must be a table")
    check_rope_fields(field, rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"{field}.rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")

    def number(name: str) -> float:
        return _positive_number(rope.get(name), f"{field}.{name}", f"rope_type {rope_type!r} needs")

    theta = _positive_number(rope.get("rope_theta", raw.get("rope_theta", 10000.0)), "rope_theta", "it must be")
    if rope_type == "default":
        return RopeConfig("default", theta)
    if rope_type in ("linear", "dynamic"):
        return RopeConfig(rope_type, theta, number("factor"), original_max_position_embeddings=positions)
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if high <= low:
        raise ConfigError(
            f"{field}.high_freq_factor {high} is not above low_freq_factor {low}; rope_type 'llama3' needs it"
        )
    original = raw.get(ORIGINAL_LENGTH)  # as in transformers, the one beside the table wins
    if original is None:
        original = rope.get(ORIGINAL_LENGTH, positions)
    length = _positive({ORIGINAL_LENGTH: original}, ORIGINAL_LENGTH)
    return RopeConfig("llama3", theta, number("factor"), low, high, length)


def _positive(raw: dict[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{field} in config.json is {value!r}; it must be a positive integer")
    return value


def _positive_number(value: Any, field: str, need: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not good:
        raise ConfigError(f"{field} is {value!r}; {need} a positive number")
    return float(value)


def _flag(raw: dict[str, Any], field: str) -> bool:
    value = raw.get(field, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{field} in config.json is {value!r}; it must be true or false")
    return value


def _token_ids(value: Any, field: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ConfigError(f"{field} is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} holds no JSON object")
    return content
