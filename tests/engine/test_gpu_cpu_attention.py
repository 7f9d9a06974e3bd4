"""A GPU and its host that share out the pages of answers. Run with `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.measures import relative_error
from support.prompts import random_prompts
from support.runs import run

from distkv import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_the_share_decides_alone(tmp_path: Path, codec: str) -> None:
    """The same bits with all pages on the device too, with most on the host, and with most on disk; near to those
    without a share."""
    folder, _ = save_llama(tmp_path / "model", head_dim=16, max_position_embeddings=8192)
    prompts = random_prompts(4000, 700, 300)
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    options: dict[str, Any] = {
        "page_size": 256, "max_num_batched_tokens": 512, "max_num_seqs": 1, "device": "cuda", "kv_cache_dtype": codec,
        "num_threads": 2,
    }  # fmt: skip
    alone = run(folder, prompts, params, pages=(40, 40, 0), **options)
    shared = run(folder, prompts, params, pages=(40, 40, 0), cpu_attention=0.5, **options)
    assert shared.moved("host_attended")
    for mine, theirs in zip(shared.logits[:10], alone.logits[:10], strict=True):
        assert relative_error(mine, theirs) < 1e-2
    on_host = run(folder, prompts, params, pages=(6, 40, 0), cpu_attention=0.5, **options)
    on_host.assert_same(shared)
    assert on_host.moved("host_streamed")
    pytest.importorskip("zarr", reason="the disk tier's array is made by zarr")
    # of the host's pages 16 are where the disk is read ahead
    on_disk = run(folder, prompts, params, pages=(6, 22, 40), cache_dir=tmp_path / "kv", cpu_attention=0.5, **options)
    on_disk.assert_same(shared)
