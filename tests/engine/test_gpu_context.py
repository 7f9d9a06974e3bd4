"""Ranks that share out pages on CUDA, as threads that share one GPU and exchange through its host. Run with
`pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.invariance import said
from support.prompts import random_prompts
from support.thread_group import llm_in_threads

from distkv import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_ranks_that_share_out_pages_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    folder, _ = save_llama(
        tmp_path, num_attention_heads=4, num_key_value_heads=1, hidden_size=512, head_dim=128,
        max_position_embeddings=4096,
    )  # fmt: skip
    prompts = random_prompts(2500, 700, 300)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
    options: dict[str, Any] = {
        "page_size": 256, "max_num_batched_tokens": 512, "max_num_seqs": 4, "dtype": "bfloat16", "device": "cuda",
        "kv_cache_dtype": codec, "batch_invariant": True, "tensor_parallel_size": 2, "host_kv_bytes": "64MiB",
    }  # fmt: skip
    page = 2 * 2 * 128 * 256 * 2  # bytes of a rank
    found = []
    for more in {"device_kv_bytes": "64MiB"}, {"device_kv_bytes": 7 * page, "decode_context_parallel_size": 2}:
        llm, _ = llm_in_threads(monkeypatch, folder, **options, **more)
        with llm:
            found.append([said(one) for one in llm.generate(prompts, params, use_tqdm=False)])
            moved = llm.stats().bytes_moved.get("host_streamed", 0)
    assert found[0] == found[1] and moved
