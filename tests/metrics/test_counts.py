"""The engine counts what becomes of requests and what moves, each thing once."""

import random
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.checkpoints import save_llama
from support.damage import flip_bit
from support.llms import PAGE_BYTES, idle_engine, tiered
from support.memory import drain, expect_short_answers
from support.prompts import random_prompt
from support.speaker import make, requests

from distkv import LLM, SamplingParams, StructuredOutputsParams
from distkv.engine.protocol import RequestFailed
from distkv.engine.stats import EngineStats, Histogram

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
TIMES = ("e2e_latency", "queue_time", "prefill_time", "decode_time")


def count(histogram: Histogram) -> int:
    return sum(histogram.counts)


def test_every_answer_ends_for_one_reason() -> None:
    """Some end by themselves, some are ended while they wait, are read or are written, by index or as a whole."""
    rng = random.Random(3)
    engine, _ = make(num_pages=60)
    added = requests(30, SamplingParams(temperature=1.0, n=2), 12)
    num_tokens = 0
    for request in added:
        engine.add([request])
        num_tokens += sum(len(engine.step()) for _ in range(rng.randint(0, 3)))
        if rng.random() < 0.4:
            engine.abort([(rng.choice(added).request_id, rng.choice([None, 0, 1]))])
    num_tokens += len(drain(engine))
    found = engine.stats().requests
    assert sum(found.finished.values()) == 2 * len(added)
    assert all(found.finished[reason] for reason in ("stop", "length", "abort")) and not found.finished["error"]
    assert found.generation_tokens == num_tokens
    assert count(found.inter_token_latency) + count(found.time_to_first_token) == num_tokens
    for name in ("e2e_latency", "queue_time", "prefill_time", "decode_time", "prompt_length", "answer_length"):
        assert count(getattr(found, name)) == found.finished["stop"] + found.finished["length"]


def test_answers_that_were_dropped_before_they_began_count_once() -> None:
    engine, _ = make()
    engine.add(requests(2, SamplingParams(temperature=1.0, ignore_eos=True, n=3), 9))
    engine.abort([("0", 1)])
    engine.step()
    engine.abort([("1", 0), ("1", 2)])
    drain(engine)
    assert engine.stats().requests.finished == {"stop": 0, "length": 3, "abort": 3, "error": 0}


def test_times_add_up() -> None:
    engine, _ = make()
    engine.add(requests(6, SamplingParams(temperature=1.0, ignore_eos=True), 9))
    drain(engine)
    found = engine.stats().requests
    parts = found.queue_time.total + found.prefill_time.total + found.decode_time.total
    assert found.e2e_latency.total == pytest.approx(parts)
    assert found.time_to_first_token.total == pytest.approx(found.queue_time.total + found.prefill_time.total)
    assert found.inter_token_latency.total == pytest.approx(found.decode_time.total)
    assert found.answer_length.total == found.generation_tokens == 6 * 9
    assert found.prompt_length.total == found.prompt_tokens


def test_a_request_that_is_refused_when_it_comes_is_an_error() -> None:
    """Its grammar cannot be made here, which has no tokenizer."""
    engine, _ = make()
    engine.add(requests(1, SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), n=2), 9))
    [failed] = engine.step()
    assert isinstance(failed, RequestFailed) and failed.error == "RequestError"
    assert engine.stats().requests.finished == {"stop": 0, "length": 0, "abort": 0, "error": 2}


def test_a_request_that_fails_is_an_error() -> None:
    engine, memory = make()
    memory.poison = "0", 3
    engine.add(requests(3, SamplingParams(temperature=1.0, ignore_eos=True), 9))
    drain(engine)
    assert engine.stats().requests.finished == {"stop": 0, "length": 2, "abort": 0, "error": 1}


def test_a_preempted_answer_counts_its_tokens_once() -> None:
    engine, _ = make(num_pages=30, max_model_len=480)
    expect_short_answers(engine)
    params = SamplingParams(temperature=1.0, max_tokens=None, ignore_eos=True)  # so nobody knows how long they will be
    added = requests(4, params, 400)
    engine.add(added)
    num_tokens = len(drain(engine))
    stats = engine.stats()
    assert stats.num_preemptions
    assert stats.requests.generation_tokens == num_tokens == 4 * 400
    assert stats.requests.prompt_tokens == sum(len(one.prompt_token_ids) for one in added)
    assert stats.requests.prefix_queries == stats.requests.prompt_tokens, "what was preempted asks no second time"


def test_a_stop_string_is_no_abort(tmp_path: Path, demo_model: Path) -> None:
    folder, _ = save_llama(tmp_path, vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(demo_model / name)
    with LLM(folder, device_kv_bytes="4MiB") as llm:
        [whole] = llm.generate(["Hello"], GREEDY, use_tqdm=False)
        part = whole.outputs[0].text[8:11]
        [cut] = llm.generate(["Hello"], replace(GREEDY, stop=part), use_tqdm=False)
        assert cut.outputs[0].finish_reason == "stop"
        for _ in llm.stream("Hello", GREEDY):
            break
        idle_engine(llm)
        assert llm.stats().requests.finished == {"stop": 1, "length": 1, "abort": 1, "error": 0}


def test_prefixes_are_counted_where_they_were_found(tiny_model: Path, tmp_path: Path) -> None:
    prompt = random_prompt(100, 1)
    with tiered(tiny_model, (12, 20, 40), tmp_path) as llm:
        llm.generate([prompt], GREEDY, use_tqdm=False)
        [output] = llm.generate([prompt], GREEDY, use_tqdm=False)
        stats = llm.stats().requests
    assert stats.prefix_queries == 200
    assert stats.prefix_hits == output.num_cached_tokens_by_tier and output.num_cached_tokens == 96
    with tiered(tiny_model, (12, 20, 40), tmp_path) as llm:  # another process finds it on disk
        llm.generate([prompt], GREEDY, use_tqdm=False)
        assert llm.stats().requests.prefix_hits == {"device": 0, "host": 0, "disk": 96}


def test_tiers_and_what_moves_between_them(tiny_model: Path, tmp_path: Path) -> None:
    with tiered(tiny_model, (10, 7, 60), tmp_path) as llm:
        llm.generate([random_prompt(200, 2), random_prompt(180, 3)], replace(GREEDY, max_tokens=40), use_tqdm=False)
        idle_engine(llm)
        stats = llm.stats()
    check_movement(stats)
    assert stats.bytes_moved["disk_streamed"]
    for tier, pages in (("device", 10), ("host", 7), ("disk", 60)):
        found = stats.tiers[tier]
        assert (found.num_pages, found.capacity_bytes) == (pages, pages * PAGE_BYTES)
        assert found.used_bytes == found.used_pages * PAGE_BYTES
        assert found.used_pages == found.idle_pages == getattr(stats, f"{tier}_pages"), "nothing runs"
    assert stats.checksum_failures == 0


def check_movement(stats: EngineStats) -> None:
    """Each route that was taken took time; the disk is below its routes."""
    assert stats.seconds_moved.keys() == stats.bytes_moved.keys()
    assert all(seconds > 0 for seconds in stats.seconds_moved.values())
    read = stats.bytes_moved.get("disk_streamed", 0) + stats.bytes_moved.get("disk_to_host", 0)
    assert stats.disk_read_bytes == read
    assert stats.disk_written_bytes == stats.bytes_moved.get("host_to_disk", 0)
    in_disk = sum(stats.seconds_moved.get(route, 0.0) for route in ("disk_streamed", "disk_to_host"))
    assert stats.disk_read_seconds <= in_disk
    assert stats.disk_write_seconds <= stats.seconds_moved.get("host_to_disk", 0.0)


def test_a_damaged_page_is_a_checksum_failure(tiny_model: Path, tmp_path: Path) -> None:
    prompt = random_prompt(100, 4)
    with tiered(tiny_model, (12, 20, 40), tmp_path) as llm:
        expected = llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    flip_bit(sorted(tmp_path.glob("*/kv.zarr/c.*"))[0])
    with tiered(tiny_model, (12, 20, 40), tmp_path) as llm:
        assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
        stats = llm.stats()
        assert stats.checksum_failures and stats.pages_recomputed == 1
