"""A model as the planner needs it: its checked `config.json` and the numbers of parameters that follow from it."""

import difflib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from distkv.errors import ConfigError
from distkv.models.fetch import MODELS, default_cache_dir
from distkv.models.published import PUBLISHED
from distkv.models.shapes import SHAPES
from distkv.option_checks import settle_path
from distkv.values import shown
from distkv.workers.model.layout import Layout
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import Shard

MOST_PARAMETERS = 10**15
"""A config that comes to more is refused, before sizes leave what can be shown."""

UNPUBLISHED = "gpt-4"
"""A model that is asked for and whose configuration is not published."""

VARIANT = re.compile(r"-(instruct|chat|hf|base|it|v\d+(\.\d+)*)(?=-|$)")


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters that one tensor-parallel rank holds, as `load_llama` cuts them."""

    embedding: int
    head: int  # 0 where it is the embedding once more
    layers: int  # of products: what a token is multiplied with
    others: int  # norms and biases
    tied: bool  # whether the embedding is the head too

    @property
    def total(self) -> int:
        """All that the rank holds."""
        return self.embedding + self.head + self.layers + self.others

    @property
    def read_per_step(self) -> int:
        """Those that every step reads, however few tokens it has: all but the embedding, of which a token reads a row,
        unless that is the head too."""
        return self.total - (0 if self.tied else self.embedding)

    @property
    def head_products(self) -> int:
        """Those that a token is multiplied with whose logits are wanted."""
        return self.embedding if self.tied else self.head


@dataclass(frozen=True)
class ModelShape:
    """A LLaMA model by name; raises ConfigError for one that is too large to be true."""

    name: str
    config: ModelConfig
    folder: Path | None = None  # where its config.json lies, if it does

    def __post_init__(self) -> None:
        if self.num_parameters > MOST_PARAMETERS:
            raise ConfigError(
                f"{self.name} would have {shown(self.num_parameters)} parameters, more than the {MOST_PARAMETERS:.0e} "
                "that any model has; mend the sizes in its config.json"
            )

    @property
    def num_parameters(self) -> int:
        """Of the whole model, as its checkpoint holds them: tied embeddings count once."""
        return self.rank_parameters(Layout(), 0).total

    def rank_parameters(self, layout: Layout, rank: int) -> RankParameters:
        """What a rank holds: the layers of its stage, of which the first has embedding, final norm and head too. A KV
        head that several ranks hold counts for each of them. Raises ConfigError for a layout that the model cannot be
        cut into."""
        config, shard = self.config, find_shard(self.config, layout, rank)
        hidden, dim = config.hidden_size, config.head_dim
        query, kv = shard.num_query_heads * dim, shard.num_kv_heads * dim
        columns, rows = shard.mlp[1] - shard.mlp[0], shard.vocab[1] - shard.vocab[0]
        products = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * columns
        biases = (query + 2 * kv + hidden * (shard.rank == 0)) * config.attention_bias
        biases += (2 * columns + hidden * (shard.rank == 0)) * config.mlp_bias
        layers, tied, is_first = shard.num_layers, config.tie_word_embeddings, shard.stage == 0
        return RankParameters(
            embedding=rows * hidden if is_first else 0,
            head=rows * hidden if is_first and not tied else 0,
            layers=layers * products,
            others=layers * (2 * hidden + biases) + (hidden if is_first else 0),
            tied=tied,
        )


@lru_cache(maxsize=2**12)
def find_shard(config: ModelConfig, layout: Layout, rank: int) -> Shard:
    """`Shard.of`, found once, since plans ask for those of all ranks again and again."""
    return Shard.of(config, layout, rank)


def attention_cost(config: ModelConfig) -> float:
    """Operations of a token for each one that it attends to, by a product with K and one with V, as a part of those by
    which it is multiplied with the weights of all layers."""
    products = ModelShape("", config).rank_parameters(Layout(), 0).layers
    return 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers / products


def find_model(model: str | Path) -> ModelShape:
    """The model that a user names: a folder with a `config.json`, such a file, or a name.

    Nothing is downloaded: a name that `distkv fetch` knows is that of its published configuration unless it has been
    fetched. Names of the hub are understood where the model is known ("meta-llama/Llama-3.1-8B-Instruct").

    Raises ConfigError that lists the known names when there is no such model, or names the field that is wrong.
    """
    text, path = str(model), settle_path("model", model)
    if os.path.isfile(path) and path.name == "config.json":  # which takes a path of any length
        path = path.parent
    if os.path.isdir(path):
        return ModelShape(path.name or text, ModelConfig.load(path), path)
    fetched = default_cache_dir() / text
    if text in MODELS and fetched.is_dir():
        return ModelShape(text, ModelConfig.load(fetched), fetched)
    return find_known_model(text, "neither a folder with a config.json, such a file, nor known by name")


def find_known_model(text: str, what_else: str = "not known by name") -> ModelShape:
    """The same for whoever may name no path: a model of `known_models`. No file is read. Raises ConfigError, in which
    `what_else` says what the text is not."""
    known = known_models()
    name = VARIANT.sub("", text.lower().rpartition("/")[2]).removeprefix("meta-")
    if name == UNPUBLISHED:
        raise ConfigError(
            "the configuration of GPT-4 is not published, so there is nothing to plan with; distkv plan gpt-4 --kinds "
            "--guess layers=L,heads=H,head_dim=D,kv_heads=K reckons with a guess"
        )
    name = {"smollm2": "smollm2-135m", "tinyllama": "tinyllama-1.1b"}.get(name, name)
    if name in known:
        shown_name = text if text in MODELS else name
        return ModelShape(shown_name, ModelConfig.from_dict({"model_type": "llama", **known[name]}))
    near = difflib.get_close_matches(name, known, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"model {shown(text)} is {what_else}{meant}; known: {', '.join(known)}")


def known_models() -> dict[str, dict[str, Any]]:
    """Configurations by name: published ones, and the shapes of `distkv stress`."""
    return {**{name: {"dtype": "bfloat16", **shape} for name, shape in SHAPES.items()}, **PUBLISHED}
