"""A CPU that stands for a device behind a link: the link's clock, and answers that know nothing of it."""

from pathlib import Path

import pytest
from support.checkpoints import save_llama
from support.prompts import random_prompt
from support.runs import run

from distkv import LLM, ConfigError, EngineConfig
from distkv.storage.moving import copier, staging_ring
from distkv.storage.moving.link import Link, Way

MICROSECOND = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))[0]


def test_each_way_carries_one_thing_after_the_other() -> None:
    link = Link(1e9)
    assert link.carry(Way.UP, 1000, ready=500) == 500 + MICROSECOND
    assert link.carry(Way.UP, 1000, ready=600) == 500 + 2 * MICROSECOND, "behind the one before"
    assert link.carry(Way.DOWN, 1000, ready=600) == 600 + MICROSECOND, "beside it"
    assert link.carry(Way.UP, 0, ready=10**6) == 10**6, "it was idle"


def test_everything_that_crosses_is_waited_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And answers are those of a CPU, bit for bit. The clock is told all bytes that the engine counts, but of a step
    that has ended what comes next may be on its way."""
    carried = dict.fromkeys(Way, 0)
    carry = Link.carry

    def spy(link: Link, way: Way, num_bytes: int, ready: int) -> int:
        carried[way] += num_bytes
        return carry(link, way, num_bytes, ready)

    slept: list[int] = []
    monkeypatch.setattr(Link, "carry", spy)
    for module in (staging_ring, copier):
        monkeypatch.setattr(module, "sleep_until", slept.append)
    options = {"page_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 2}
    prompts = [random_prompt(200, 1), random_prompt(90, 2)]
    expected = run(folder, prompts, **options)
    for pages, where in (((4, 40, 0), None), ((4, 3, 40), tmp_path)):
        carried.update(dict.fromkeys(Way, 0))
        found = run(
            folder, prompts, pages=pages, cache_dir=where, device="simulated", link_bytes_per_second="1GB", **options
        )
        found.assert_same(expected)
        streamed = found.moved("host_streamed") + found.moved("disk_streamed")
        assert streamed and carried[Way.UP] == streamed + found.moved("host_to_device")
        assert carried[Way.DOWN] == found.moved("device_to_host") > 0
        assert slept
        slept.clear()


def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="device is simulated and link_bytes_per_second is not set; give the rate"):
        EngineConfig(folder, device="simulated")
    with pytest.raises(ConfigError, match="link_bytes_per_second is set and device is not simulated; set both"):
        EngineConfig(folder, link_bytes_per_second="1GB")
    simulated = {"device": "simulated", "link_bytes_per_second": "1GB"}
    with pytest.raises(ConfigError, match="attention_policy is set and device is simulated, which attends to all"):
        EngineConfig(folder, attention_policy="top_pages(pages=2)", **simulated)
    with pytest.raises(ConfigError, match="batch_invariant is False and a simulated device"):
        LLM(folder, batch_invariant=False, **simulated)
