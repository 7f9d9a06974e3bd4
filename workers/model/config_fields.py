"""The fields of a `config.json` beside those that `ModelConfig` reads: some mean another model than the one that runs
here, and those of checkpoints in use that change no answer are known; others are told of."""

import logging
from typing import Any

from distkv.workers.errors import ConfigError

log = logging.getLogger(__name__)

OFF = (None, False)
ONE = (None, 1)
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),
    # which keys a query sees
    "sliding_window": (None,),
    "sliding_window_pattern": (None,),
    "interleaved_sliding_window": (None,),
    "attention_chunk_size": (None,),
    "no_rope_layer_interval": OFF,
    "alibi": OFF,
    "position_embedding_type": (None, "rope", "rotary"),
    # which parts of a head are turned, and how
    "partial_rotary_factor": ONE,
    "rotary_pct": ONE,
    "rope_interleaved": OFF,
    "rope_interleave": OFF,
    # factors and limits on the way: of Granite, MiniCPM, Cohere, Gemma, OLMo, Llama 4 and others
    "embedding_multiplier": ONE,
    "residual_multiplier": ONE,
    "attention_multiplier": (None,),
    "logits_scaling": ONE,
    "logit_scale": ONE,
    "scale_emb": ONE,
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attn_temperature_tuning": OFF,
    "clip_qkv": (None,),
    "qk_norm": OFF,
    "use_qk_norm": OFF,
    "qk_layernorm": OFF,
    # the order of the parts of a layer
    "parallel_attn": OFF,
    "use_parallel_residual": OFF,
}
"""What a field that would change the answer may say; the first stands for one that is left out."""

READ = {
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "dtype", "torch_dtype", "eos_token_id", "rope_theta", "rope_scaling",
    "rope_parameters", "original_max_position_embeddings", "layer_types", "no_rope_layers", "use_sliding_window",
}  # fmt: skip
"""By `ModelConfig`, or below."""

WITHOUT_EFFECT = {
    # of training, and of other tasks
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout",
    "classifier_dropout", "gradient_checkpointing", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder",
    "decoder_start_token_id", "tf_legacy_loss",
    # of how it is computed; `pretraining_tp` once cut products, which rounds otherwise
    "pretraining_tp", "use_cache", "chunk_size_feed_forward", "torchscript", "use_bfloat16", "attn_implementation",
    "output_attentions", "output_hidden_states", "return_dict", "max_window_layers",
    # tell who made it; a bias or another part that is there is told of by its tensors
    "name_or_path", "transformers_version", "transformers.js_config", "unsloth_version", "unsloth_fixed",
    "is_llama_config", "bias", "use_bias", "qkv_bias", "attention_qkv_bias",
    # of text and of the sampling that transformers does by default
    "bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "tokenizer_class", "model_max_length", "prefix",
    "do_sample", "temperature", "top_p", "top_k", "typical_p", "max_length", "min_length", "max_new_tokens",
    "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "repetition_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "early_stopping",
}  # fmt: skip

ARCHITECTURES = (["LlamaForCausalLM"], ["LlamaModel"])

ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor", "finetuned",
}  # fmt: skip


def check_fields(raw: dict[str, Any]) -> None:
    """Raises ConfigError that names a field which says something else than LLaMA; warns once of fields that nobody
    knows, which are passed over as transformers does."""
    architectures = raw.get("architectures") or ARCHITECTURES[0]
    if architectures not in ARCHITECTURES:
        raise ConfigError(f"architectures {architectures} is not supported; only LlamaForCausalLM is")
    supported = dict(SUPPORTED)
    if raw.get("use_sliding_window") is False:  # as configs of Qwen say that there is none
        del supported["sliding_window"]
    for field, choices in supported.items():
        _check(field, raw.get(field, choices[0]), choices)
    for field, only in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        values = raw.get(field)
        if values is not None and not (isinstance(values, list) and all(one == only for one in values)):
            raise ConfigError(f"{field} {values!r} in config.json is not supported; supported: {only!r} in every layer")
    _warn_of_unknown("config.json", raw, SUPPORTED.keys() | READ | WITHOUT_EFFECT)


def check_rope_fields(field: str, rope: dict[str, Any]) -> None:
    """The same for the table `rope_scaling` or `rope_parameters`."""
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"{field}.{nested[0]} is a table; only one table for all layers is supported")
    _check(f"{field}.partial_rotary_factor", rope.get("partial_rotary_factor"), ONE)
    _warn_of_unknown(field, rope, ROPE_FIELDS)


def _check(field: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        names = ", ".join("absent" if choice is None else repr(choice) for choice in choices)
        raise ConfigError(f"{field} {value!r} in config.json is not supported; supported: {names}")


def _warn_of_unknown(where: str, table: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(field for field in table if field not in known and not field.startswith("_"))
    if unknown:
        log.warning(
            "%s has fields that distkv does not know, and passes over as transformers' LlamaForCausalLM does: %s",
            where, ", ".join(unknown),
        )  # fmt: skip
