"""The configurations that the makers of LLaMA models have published (the `config.json` beside their weights on the
Hugging Face hub), for whoever has no copy of them: fields that say nothing of the shape are left out.

`tests/planner/test_model_shape.py` compares the parameters that follow from them with those that the checkpoints hold.
"""

from typing import Any

_LLAMA_2 = {
    "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "torch_dtype": "float16",
}  # fmt: skip
_LLAMA_3 = {
    "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "num_key_value_heads": 8, "torch_dtype": "bfloat16",
}  # fmt: skip
_STRETCHED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA_31 = {**_LLAMA_3, "max_position_embeddings": 131072, "rope_scaling": _STRETCHED}
_LLAMA_32 = {**_LLAMA_31, "rope_scaling": {**_STRETCHED, "factor": 32.0}, "tie_word_embeddings": True}
_SMOLLM2 = {
    "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def _shape(layers: int, hidden: int, intermediate: int, heads: int, **more: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, **more,
    }  # fmt: skip


_8B, _70B = _shape(32, 4096, 14336, 32), _shape(80, 8192, 28672, 64)

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-7b": {
        **_LLAMA_2, **_shape(32, 4096, 11008, 32), "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    },
    "llama-2-7b": {**_LLAMA_2, **_shape(32, 4096, 11008, 32)},
    "llama-2-13b": {**_LLAMA_2, **_shape(40, 5120, 13824, 40)},
    "llama-2-70b": {**_LLAMA_2, **_shape(80, 8192, 28672, 64, num_key_value_heads=8)},
    "llama-3-8b": {**_LLAMA_3, **_8B},
    "llama-3-70b": {**_LLAMA_3, **_70B},
    "llama-3.1-8b": {**_LLAMA_31, **_8B},
    "llama-3.1-70b": {**_LLAMA_31, **_70B},
    "llama-3.1-405b": {**_LLAMA_31, **_shape(126, 16384, 53248, 128)},
    "llama-3.2-1b": {**_LLAMA_32, **_shape(16, 2048, 8192, 32, head_dim=64)},
    "llama-3.2-3b": {**_LLAMA_32, **_shape(28, 3072, 8192, 24, head_dim=128)},
    "llama-3.3-70b": {**_LLAMA_31, **_70B},
    "tinyllama-1.1b": {
        **_LLAMA_2, **_shape(22, 2048, 5632, 32, num_key_value_heads=4), "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    },
    "smollm2-135m": {**_SMOLLM2, **_shape(30, 576, 1536, 9, num_key_value_heads=3)},
    "smollm2-360m": {**_SMOLLM2, **_shape(32, 960, 2560, 15, num_key_value_heads=5)},
    "smollm2-1.7b": {**_SMOLLM2, **_shape(24, 2048, 8192, 32), "rope_theta": 130000.0},
}  # fmt: skip
"""By names in small letters, without the maker's and without what tells a tuned variant, whose shape is the same."""
