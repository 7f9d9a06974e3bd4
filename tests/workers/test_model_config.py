"""What is refused before a model runs, and that the message names the field, the file or the tensor."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import TINY
from transformers import LlamaConfig

from distkv.errors import ConfigError
from distkv.workers.model.model_config import ModelConfig, RopeConfig

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
        dtype="bfloat16",
        eos_token_ids=(2,),
    )


def test_fields_may_be_left_out() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = ModelConfig.from_dict({name: VALID[name] for name in sizes})
    assert (config.num_key_value_heads, config.head_dim, config.group_size) == (4, 16, 1)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.dtype) == (2048, 1e-6, "float32")
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
        ({"dtype": None, "torch_dtype": None}, "dtype", "float32"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype", "float16"),
        ({"dtype": None, "torch_dtype": "float16"}, "dtype", "float16"),
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
        ({"dtype": "float8_e4m3fn"}, "^dtype 'float8_e4m3fn' .* float32, float16, bfloat16"),
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
            for field in LLAMA3 if field not in ("rope_type", "original_max_position_embeddings")
        ),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": "64"}},
         "^original_max_position_embeddings in config.json is '64'"),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": -1}, "^original_max_position_embed.* is -1"),
        ({"layer_types": ["full_attention"], "rope_parameters": {"full_attention": LLAMA3}},
         "^rope_parameters.full_attention is a table"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "^rope_parameters.high_freq_factor "),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 5.0}}, "^rope_parameters.high_freq_factor "),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(VALID | changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", 16), ("layer_types", ["full_attention", "sliding_attention"]), ("attention_chunk_size", 64),
        ("no_rope_layers", [1, 0]), ("no_rope_layer_interval", 4), ("rope_interleaved", True), ("alibi", True),
        ("position_embedding_type", "absolute"), ("embedding_multiplier", 12.0), ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.0078125), ("logits_scaling", 8.0), ("logit_scale", 0.0625), ("scale_emb", 12),
        ("scale_depth", 1.4), ("dim_model_base", 256), ("attn_logit_softcapping", 50.0), ("clip_qkv", 8.0),
        ("final_logit_softcapping", 30.0), ("use_qk_norm", True), ("rotary_pct", 0.25), ("is_encoder_decoder", True),
        ("use_parallel_residual", True), ("transformers_weights", "other.safetensors"),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_answer_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} {re.escape(repr(value))} in config.json is not supported"):
        ModelConfig.from_dict(VALID | {field: value})


def test_fields_that_leave_the_answer_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """What transformers saves, and what variants say when they mean LLaMA; nobody is told of these."""
    harmless = {
        "sliding_window": None, "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1], "logits_scaling": 1.0,
        "embedding_multiplier": 1, "rope_interleaved": False, "pretraining_tp": 2, "attention_dropout": 0.1,
        "partial_rotary_factor": 1.0, "use_qk_norm": False, "_name_or_path": "x", "bos_token_id": 1, "qkv_bias": False,
    }  # fmt: skip
    expected = ModelConfig.from_dict(VALID)
    assert ModelConfig.from_dict(LlamaConfig(**TINY).to_dict() | {"dtype": "bfloat16"} | harmless) == expected
    assert ModelConfig.from_dict(VALID | {"sliding_window": 4096, "use_sliding_window": False}) == expected
    assert not caplog.records


def test_fields_that_nobody_knows_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.3}
    ModelConfig.from_dict(VALID | {"norm_eps": 1e-3, "auto_map": {}, "rope_scaling": rope})
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "config.json" in told[0] and "auto_map, norm_eps" in told[0]
    assert "rope_scaling" in told[1] and told[1].endswith(": attention_factor")


def test_the_dtype_to_run_in() -> None:
    """A checkpoint in float64 has none unless one is given."""
    half, double = ModelConfig.from_dict(VALID), ModelConfig.from_dict(VALID | {"dtype": "float64"})
    assert half.run_dtype("auto") == "bfloat16" and half.run_dtype("float32") == "float32"
    assert double.run_dtype("float32") == "float32"
    with pytest.raises(ConfigError, match="use one of float32, float16, bfloat16"):
        double.run_dtype("auto")


def test_missing_folder_or_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere' does not exist; give the path .*names of the hub are not"):
        ModelConfig.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no config\.json; give the path"):
        ModelConfig.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file' is not a folder; give the path"):
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
