"""Engines whose ranks share out the tokens of pages: answers are those of ranks that do not, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.prompts import random_prompts
from support.thread_group import llm_in_threads

from distkv import SamplingParams
from distkv.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=3)


def answers(outputs: list[RequestOutput]) -> list[Any]:
    return [(one.token_ids, one.logprobs) for output in outputs for one in output.outputs]


def shape(tmp_path: Path, heads: int, kv_heads: int) -> Path:
    folder, _ = save_llama(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads,
        intermediate_size=113, vocab_size=130, max_position_embeddings=512,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("heads, kv_heads, size, context", [(6, 3, 2, 2), (6, 1, 3, 3), (4, 2, 4, 2)])
def test_answers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, size: int, context: int
) -> None:
    folder = shape(tmp_path, heads, kv_heads)
    options: dict[str, Any] = {
        "tensor_parallel_size": size, "page_size": 16, "max_num_batched_tokens": 48, "max_num_seqs": 4,
        "dtype": "bfloat16",
    }  # fmt: skip
    prompts = random_prompts(90, 5, 150, 33)
    found = []
    for more in (
        {"device_kv_bytes": "4MiB"},
        {"device_kv_bytes": "4MiB", "decode_context_parallel_size": context},
        {"device_kv_bytes": 30000 * kv_heads, "host_kv_bytes": "4MiB", "decode_context_parallel_size": context},
    ):
        llm, _ = llm_in_threads(monkeypatch, folder, **options, **more)
        with llm:
            found.append(answers(llm.generate(prompts, GREEDY, use_tqdm=False)))
            found.append(answers(llm.generate(prompts, GREEDY, use_tqdm=False)))  # over what is known
    assert found[0] == found[1]
    for other in found[2:]:
        assert other == found[0]
