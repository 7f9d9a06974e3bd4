"""Requests whose answers keep to rules, and a small model with a tokenizer for them."""

from pathlib import Path
from typing import Any

from support.checkpoints import save_llama
from support.prompts import random_prompt
from support.tokenizers import save_tokenizer

from distkv import SamplingParams, StructuredOutputsParams

VOCAB_SIZE = 290
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"(ab?){3,9}-[0-9]{2,20}"


def save_speaking_llama(folder: Path) -> Path:
    """Saves a random LLaMA with a byte-level tokenizer."""
    save_llama(folder, vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    return save_tokenizer(folder, "byte level")


def rule_requests() -> list[tuple[list[int], SamplingParams]]:
    """One of each kind, sampled and greedy, one answer and several, beside some without rules."""
    rules: list[dict[str, Any]] = [
        {"structured_outputs": StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)},
        {"structured_outputs": StructuredOutputsParams(regex=REGEX), "temperature": 0},
        {"structured_outputs": StructuredOutputsParams(choice=["Hello", "Hello world", "漢"]), "n": 3},
        {"structured_outputs": StructuredOutputsParams(json_object=True), "repetition_penalty": 1.2, "n": 2},
        {"min_tokens": 20, "stop_token_ids": list(range(0, 200)), "temperature": 0.5},
        {"bad_words": ["a", "b", "Hello world", "ab", "the"], "logit_bias": {65: 40, 66: 40.0, 67: 40}, "n": 2},
        {"allowed_token_ids": [3, 5, 7, 290 - 1], "prompt_logprobs": 2},
        {"prompt_logprobs": 0, "logprobs": 1},
        {},
        {"temperature": 0},
    ]
    return [
        (
            random_prompt(5 + 9 * number, number, VOCAB_SIZE),
            SamplingParams(**({"max_tokens": 40, "seed": number} | one)),
        )
        for number, one in enumerate(rules)
    ]
