"""A LLaMA model's way from a GGUF file to a Hugging Face folder in bfloat16."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

Phase = Callable[[str, int | None], Callable[[], None]]
"""Begins a phase of the work, of that many steps (None: unknown); the result is called after each step."""

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert(gguf_path: Path, folder: Path, phase: Phase) -> None:
    """Writes the model of a LLaMA GGUF file with tied embeddings into `folder` as Hugging Face files."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    meta = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    config = _config(meta)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special_ids)
    _write_tokenizer(meta, folder)
    _write_weights(reader, config["num_attention_heads"], config["num_key_value_heads"], folder, phase)


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    # a float32 of the file, as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06
    epsilon, theta = (
        float(f"{meta[key]:.7g}") for key in ("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base")
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json: byte-level BPE that splits digits (GGUF's pre type "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    _write_json(
        folder / "tokenizer_config.json",
        # a class of its own, such as GPT2Tokenizer, would put its own pre-tokenizer in place of the one above
        {"tokenizer_class": "PreTrainedTokenizerFast"}
        | {f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()}
        | {
            "model_max_length": meta["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": meta["tokenizer.chat_template"],
        },
    )


def _write_weights(reader: "GGUFReader", heads: int, kv_heads: int, folder: Path, phase: Phase) -> None:
    """Writes model.safetensors in bfloat16; only one tensor at a time is held in float32."""
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    step = phase("converting to bfloat16", len(reader.tensors))
    weights: dict[str, Tensor] = {}
    for stored in reader.tensors:
        *layer, kind, _ = stored.name.split(".")
        # float32 tensors come as a read-only view of the file, which torch does not take
        weight = torch.from_numpy(np.require(dequantize(stored.data, stored.tensor_type), requirements="W"))
        if kind in ("attn_q", "attn_k"):
            weight = unpermute(weight, heads if kind == "attn_q" else kv_heads)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        weights[f"{prefix}{_TENSORS[kind]}.weight"] = weight.to(torch.bfloat16).contiguous()
        step()
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors gives its files to their owner alone; a cache may be shared
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def unpermute(weight: "Tensor", heads: int) -> "Tensor":
    """Undoes llama.cpp's order of the q and k rows: rotary pairs side by side there, half a head apart here."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
