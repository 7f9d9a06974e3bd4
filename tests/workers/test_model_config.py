"""What is refused before a model runs, and that the message names the field, the file or the tensor."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY, edit_config, save_llama
from support.ranks import load_rank

from distkv.errors import ConfigError
from distkv.workers.model.model_config import ModelConfig, RopeConfig
from distkv.workers.model.weights import DummySource, SafetensorsSource

VALID: dict[str, Any] = TINY | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


def test_fields_are_read() -> None:
    assert ModelConfig.from_dict(VALID) == ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope=RopeConfig("default", 10000.0),
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype=torch.bfloat16,
        eos_token_ids=(2,),
    )


def test_fields_may_be_left_out() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = ModelConfig.from_dict({name: VALID[name] for name in sizes})
    assert (config.num_key_value_heads, config.head_dim, config.group_size) == (4, 16, 1)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.dtype) == (2048, 1e-6, torch.float32)
    assert config.eos_token_ids == ()
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"head_dim": 24}, "head_dim", 24),
        ({"head_dim": None}, "head_dim", 16),
        ({"head_dim": 24, "hidden_size": 63}, "hidden_size", 63),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", True),
        ({"attention_bias": True}, "attention_bias", True),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"dtype": None, "torch_dtype": None}, "dtype", torch.float32),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype", torch.float16),
        ({"dtype": None, "torch_dtype": "float16"}, "dtype", torch.float16),
        ({"eos_token_id": [5, 7]}, "eos_token_ids", (5, 7)),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"hidden_act": "swish"}, "hidden_size", 64),
        ({"architectures": None}, "hidden_size", 64),
        ({"quantization_config": None}, "hidden_size", 64),
        ({"rope_theta": 5e5}, "rope", RopeConfig("default", 5e5)),
        ({"rope_parameters": {"rope_theta": 3.0}, "rope_theta": 5e5}, "rope", RopeConfig("default", 3.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}},
            "rope",
            RopeConfig("llama3", 10000.0, 32.0, 1.0, 4.0, 8192),
        ),
    ],
)  # fmt: skip
def test_field(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(ModelConfig.from_dict(VALID | changes), field) == value


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]


@pytest.mark.parametrize("value", [0, -1, 1.5, 64.0, "64", True, [64]])
@pytest.mark.parametrize("field", SIZES)
def test_sizes_are_positive_integers(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} in config.json is {re.escape(repr(value))}; .*positive integer"):
        ModelConfig.from_dict(VALID | {field: value})


@pytest.mark.parametrize("field", SIZES[:5])
def test_sizes_without_a_default(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} in config.json is None"):
        ModelConfig.from_dict({name: value for name, value in VALID.items() if name != field})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"^architectures \['MistralForCausalLM'\] .*only LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "^architectures "),
        ({"architectures": "LlamaForCausalLM"}, "^architectures "),
        ({"model_type": "mistral"}, "^model_type 'mistral' .* supported: 'llama'"),
        ({"hidden_act": "gelu"}, "^hidden_act 'gelu' .* supported: 'silu', 'swish'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "^quantization_config .* supported: absent"),
        ({"partial_rotary_factor": 0.5}, "^partial_rotary_factor 0.5 "),
        ({"num_attention_heads": 3}, "^hidden_size 64 is not a multiple|^num_attention_heads 3 is not a multiple"),
        ({"num_key_value_heads": 3}, "^num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "^hidden_size 66 is not a multiple of num_attention_heads 4; set head_dim"),
        ({"hidden_size": 60}, "^head_dim 15 is odd"),
        ({"head_dim": 7}, "^head_dim 7 is odd"),
        ({"dtype": "float64"}, "^dtype 'float64' .* float32, float16, bfloat16"),
        ({"dtype": None, "torch_dtype": "int8"}, "^dtype 'int8' "),
        ({"dtype": ["bfloat16"]}, "^dtype .* is not supported"),
        ({"eos_token_id": "</s>"}, "^eos_token_id is '</s>'"),
        ({"eos_token_id": [1, "x"]}, "^eos_token_id is "),
        ({"rms_norm_eps": "small"}, "^rms_norm_eps "),
        ({"rms_norm_eps": None}, "^rms_norm_eps "),
        ({"rms_norm_eps": [1e-5]}, "^rms_norm_eps "),
        ({"rms_norm_eps": -1.0}, "^rms_norm_eps "),
        ({"tie_word_embeddings": "false"}, "^tie_word_embeddings "),
        ({"attention_bias": "no"}, "^attention_bias "),
        ({"mlp_bias": 2}, "^mlp_bias "),
        ({"rope_theta": 0}, "^rope_theta is 0"),
        ({"rope_theta": "10000"}, "^rope_theta is '10000'"),
        ({"rope_theta": True}, "^rope_theta is True"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "^rope_theta is None"),
        ({"rope_parameters": ["default"]}, "^rope_parameters in config.json is "),
        ({"rope_scaling": "linear"}, "^rope_scaling in config.json is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "^rope_parameters.rope_type 'yarn' .*llama3"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "^rope_scaling.rope_type 'yarn' "),
        ({"rope_scaling": {"rope_type": "longrope"}}, "^rope_scaling.rope_type 'longrope' "),
        ({"rope_scaling": {"rope_type": "linear"}}, "^rope_scaling.factor is None; rope_type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": -2}}, "^rope_scaling.factor is -2"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "^rope_scaling.factor is '2'"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "^rope_scaling.factor is True"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "^rope_scaling.factor is nan"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "^rope_scaling.factor is inf"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        *(
            ({"rope_parameters": {name: value for name, value in LLAMA3.items() if name != field}},
             f"^rope_parameters.{field} is None; rope_type 'llama3'")
            for field in LLAMA3 if field != "rope_type"
        ),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": "64"}},
         "^rope_parameters.original_max_position_embeddings is '64'"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "^rope_parameters.high_freq_factor "),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 5.0}}, "^rope_parameters.high_freq_factor "),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(VALID | changes)


def test_missing_folder_or_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere' does not exist; give the path"):
        ModelConfig.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no config\.json; give the path"):
        ModelConfig.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file' does not exist"):
        ModelConfig.load(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe", b"[1]", b"null", b'"llama"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_malformed_json(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VALID))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"/{name}' (cannot be read as JSON|holds no JSON object)"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(("generation", "stops"), [({"eos_token_id": [4, 2, 5]}, (2, 4, 5)), ({}, (2,)), (None, (2,))])
def test_end_tokens_of_generation_config_join_those_of_config(
    tmp_path: Path, generation: dict[str, Any] | None, stops: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VALID))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelConfig.load(tmp_path).eos_token_ids == stops


def test_malformed_stop_tokens_of_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VALID))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"^eos_token_id is '</s>'"):
        ModelConfig.load(tmp_path)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint in one file, with all biases."""
    return save_llama(tmp_path / "single", attention_bias=True, mlp_bias=True, num_hidden_layers=1)[0]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in several files and an index."""
    return save_llama(tmp_path / "sharded", max_shard_size="60KB")[0]


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_rank(single)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(single: Path, keep: float) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ConfigError, match=r"model\.safetensors' cannot be read .* fetch it again"):
        load_rank(single)


def test_every_tensor_must_be_there(single: Path) -> None:
    path = single / "model.safetensors"
    tensors = load_file(path)
    assert len(tensors) == 3 + 9 + 7
    for name in tensors:
        save_file({other: tensor for other, tensor in tensors.items() if other != name}, path)
        with pytest.raises(ConfigError, match=f"has no tensor '{name}'"):
            load_rank(single)


def test_every_tensor_must_have_its_shape(single: Path) -> None:
    path = single / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for wrong in (torch.cat([tensor, tensor[:1]]), tensor[None], tensor[:-1]):
            save_file(tensors | {name: wrong.contiguous()}, path)
            message = rf"^tensor '{name}' has shape {re.escape(str(list(wrong.shape)))}; config\.json asks for "
            with pytest.raises(ConfigError, match=message + re.escape(str(list(tensor.shape)))):
                load_rank(single)


@pytest.mark.parametrize("keep", [None, 0.0, 0.5])
def test_missing_or_truncated_shard(sharded: Path, keep: float | None) -> None:
    for path in sorted(sharded.glob("*.safetensors")):
        content = path.read_bytes()
        path.unlink()
        if keep is not None:
            path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ConfigError, match=f"{path.name}' cannot be read .* missing, truncated or damaged"):
            load_rank(sharded)
        path.write_bytes(content)
    load_rank(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}'])
def test_malformed_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json' is not a safetensors index"):
        load_rank(sharded)


def test_index_that_lacks_a_tensor(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"has no tensor 'model\.norm\.weight'"):
        load_rank(sharded)


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    def move(index: dict[str, Any]) -> None:
        files = index["weight_map"]
        name = "model.norm.weight"
        files[name] = next(file for file in files.values() if file != files[name])

    edit_index(sharded, move)
    with pytest.raises(ConfigError, match=r"lacks tensor 'model\.norm\.weight'"):
        load_rank(sharded)


def test_untied_config_without_a_head(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path, tie_word_embeddings=True)
    load_rank(folder)
    edit_config(folder, lambda raw: raw.update(tie_word_embeddings=False))
    with pytest.raises(ConfigError, match=r"has no tensor 'lm_head\.weight'"):
        load_rank(folder)


@given(data=st.data())
def test_slices_of_a_tensor(tiny_model: Path, data: st.DataObject) -> None:
    """Any source gives the slice of the whole tensor, whatever else is read."""
    stored = load_file(tiny_model / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(stored)))
    shape = tuple(stored[name].shape)

    def part(size: int) -> tuple[int, int] | None:
        first = data.draw(st.integers(0, size - 1))
        return data.draw(st.sampled_from([None, (first, data.draw(st.integers(first + 1, size)))]))

    rows, columns = part(shape[0]), part(shape[-1]) if len(shape) == 2 else None
    index = tuple(slice(None) if cut is None else slice(*cut) for cut in (rows, columns)[: len(shape)])
    with SafetensorsSource(tiny_model) as source:
        assert source.has(name) and not source.has(name + "x")
        assert torch.equal(source.read(name, shape, rows, columns), stored[name][index])
    dummy = DummySource(3, torch.float32, torch.device("cpu"))
    assert torch.equal(dummy.read(name, shape, rows, columns), dummy.read(name, shape)[index])
