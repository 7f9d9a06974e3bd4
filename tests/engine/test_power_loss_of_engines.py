"""Engines on what a loss of power left: their tokens are those that come without a cache, and nothing stops a start."""

import random
from pathlib import Path

import pytest
from support.llms import OPTIONS, tiered
from support.power_loss import PowerLoss
from support.prompts import random_prompt

from distkv import LLM, SamplingParams
from distkv.storage.disk import synced_pages

PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SIZES = (8, 12, 40)  # pages of device, host and disk


def test_an_engine_goes_on_from_what_is_left(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synced_pages, "SYNC_SECONDS", 0.02)
    prompts = [random_prompt(length, seed) for seed, length in enumerate((130, 70, 50, 120, 90))]
    with LLM(folder, host_kv_bytes=0, **OPTIONS) as llm:
        expected = [one.outputs[0].token_ids for one in llm.generate(prompts, PARAMS, use_tqdm=False)]

    def answers(cache: Path) -> int:
        """Checks all answers; returns how many tokens of the prompts were found."""
        with tiered(folder, SIZES, cache) as llm:
            outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
            assert [one.outputs[0].token_ids for one in outputs] == expected
            return sum(one.num_cached_tokens for one in outputs)

    rng, disk = random.Random(3), tmp_path / "disk"
    disk.mkdir()
    loss = PowerLoss(disk)
    at = sorted(rng.sample(range(5, 90), 5))
    left: list[Path] = []

    def fail() -> None:
        if loss.num_calls in at:
            left.append(tmp_path / f"left{loss.num_calls}")
            loss.leave(left[-1], rng)

    loss.called = fail
    with loss.followed(), tiered(folder, SIZES, disk / "cache") as llm:
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        assert [one.outputs[0].token_ids for one in outputs] == expected
    assert len(left) == len(at)
    for folder_left in left:
        answers(folder_left / "cache")
    loss.leave(tmp_path / "end", rng)
    assert answers(tmp_path / "end" / "cache") == sum(len(one) // 16 * 16 for one in prompts), "it was closed"
