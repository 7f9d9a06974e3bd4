"""Small random checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_llama(
    folder: Path, *, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any
) -> tuple[Path, LlamaForCausalLM]:
    """Saves a random fp32 LLaMA of the TINY shape, changed by `overrides` (fields of LlamaConfig), as safetensors.

    Every weight is random, norms and biases too, and wide enough that attention is far from uniform and logits are far
    from ties, so that a mistake anywhere shows in the logits.
    """
    config = LlamaConfig(**(TINY | overrides))
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.5 * noise)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(noise)
            else:
                weight.copy_(noise * 1.5 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder, model


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes `config.json` in place by hand, so that a spelling of our choice is read by both sides."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of `model.safetensors` by hand."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
