"""Models by name and by folder: their parameters are those of the published checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama

from distkv import ConfigError
from distkv.models.published import PUBLISHED
from distkv.planner.model_shape import find_model
from distkv.workers.model.layout import Layout

# what the hub's pages and the safetensors' headers of these models say
PARAMETERS = {
    "llama-7b": 6_738_415_616, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}  # fmt: skip


def test_published_models_have_the_parameters_of_their_checkpoints() -> None:
    assert {name: find_model(name).num_parameters for name in PUBLISHED} == PARAMETERS


@pytest.mark.parametrize(
    "text, name",
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"), ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b"), ("LLAMA-3.3-70B", "llama-3.3-70b"),
    ],
)  # fmt: skip
def test_names_of_the_hub(text: str, name: str) -> None:
    assert find_model(text).name == name


def test_a_folder_has_the_parameters_of_its_tensors(tmp_path: Path) -> None:
    """With biases everywhere and uneven heads; ranks share them out without remainder."""
    changes = {"attention_bias": True, "mlp_bias": True, "hidden_size": 48, "num_attention_heads": 6}
    changes |= {"num_key_value_heads": 3}
    folder, model = save_llama(tmp_path, **changes)
    shape = find_model(folder)
    assert shape.num_parameters == sum(tensor.numel() for tensor in model.parameters())
    assert find_model(folder / "config.json").config == shape.config and shape.folder == folder
    for size in (2, 3):
        ranks = [shape.rank_parameters(Layout(size), rank) for rank in range(size)]
        assert sum(one.layers for one in ranks) == shape.rank_parameters(Layout(), 0).layers
        assert sum(one.embedding + one.head for one in ranks) == 2 * shape.rank_parameters(Layout(), 0).embedding


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'llama-3.1-9b' is neither .*did you mean llama-3.1-8b\?.*smollm2-135m"):
        find_model("llama-3.1-9b")


@pytest.mark.parametrize("text", ["", "~no_such_user", "x" * 5000, "a\0b", "/dev/null", "/"])
def test_nonsense_for_a_model_is_one_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model|config\.json"):
        find_model(text)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", float("nan")), ("num_hidden_layers", -1), ("vocab_size", True), ("vocab_size", 10**400),
        ("num_key_value_heads", 7), ("intermediate_size", 1e30), ("num_hidden_layers", 2**62), ("head_dim", "64"),
    ],
)  # fmt: skip
def test_nonsense_in_a_config_is_one_error(tmp_path: Path, field: str, value: Any) -> None:
    config = {"model_type": "llama", **PUBLISHED["llama-3-8b"], field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"{field}|parameters"):
        find_model(tmp_path)
