"""What Prometheus reads: names, values, and that the page can be parsed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families
from support.llms import tiered
from support.prompts import random_prompt

from distkv import LLM, SamplingParams
from distkv.engine.stats import EngineStats, total
from distkv.metrics.catalogue import CATALOGUE, PREFIX
from distkv.metrics.exposition import exposition

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

VLLM = {
    "num_requests_running": [],
    "num_requests_waiting": [],
    "kv_cache_usage_perc": [],
    "cache_config_info": ["block_size", "cache_dtype", "enable_prefix_caching", "num_cpu_blocks", "num_gpu_blocks"],
    "prefix_cache_queries_total": [],
    "prefix_cache_hits_total": [],
    "prompt_tokens_total": [],
    "generation_tokens_total": [],
    "num_preemptions_total": [],
    "spec_decode_num_drafts_total": [],
    "spec_decode_num_draft_tokens_total": [],
    "spec_decode_num_accepted_tokens_total": [],
    "spec_decode_num_drafting_steps_total": [],
    "request_success_total": ["finished_reason"],
    "time_to_first_token_seconds": [],
    "inter_token_latency_seconds": [],
    "e2e_request_latency_seconds": [],
    "request_queue_time_seconds": [],
    "request_prefill_time_seconds": [],
    "request_decode_time_seconds": [],
    "request_prompt_tokens": [],
    "request_generation_tokens": [],
    "kv_offload_total_bytes_total": ["transfer_type"],
    "kv_offload_total_time_total": ["transfer_type"],
    "kv_offload_tiering_read_bytes_total": ["tier"],
    "kv_offload_tiering_read_time_total": ["tier"],
    "kv_offload_tiering_write_bytes_total": ["tier"],
    "kv_offload_tiering_write_time_total": ["tier"],
}
"""vLLM's names and labels behind the prefix, as its dashboards use them; all of them have `model_name`, too."""

OURS = {
    "requests_refused_total": [],
    "num_requests_parked": [],
    "num_requests_lacking_room": [],
    "tier_used_bytes": ["tier"],
    "tier_idle_bytes": ["tier"],
    "tier_capacity_bytes": ["tier"],
    "page_summaries_capacity_bytes": [],
    "prefix_cache_hits_total": ["tier"],
    "prefix_cache_recomputed_total": [],
    "transfer_bytes_total": ["from", "to"],
    "transfer_seconds_total": ["from", "to"],
    "attention_pages_visible_total": [],
    "attention_pages_chosen_total": [],
    "attention_audited_total": [],
    "attention_mass_covered_total": [],
    "pipeline_stage_seconds_total": [],
    "pipeline_stage_wait_seconds_total": [],
    "checksum_failures_total": [],
    "pages_recomputed_total": [],
}


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """One that has streamed from disk."""
    with tiered(tiny_model, (10, 7, 60), tmp_path_factory.mktemp("cache")) as llm:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        llm.generate([random_prompt(200, 2), random_prompt(180, 3)], params, use_tqdm=False)
        yield llm


@pytest.fixture(scope="module")
def page(llm: LLM) -> tuple[EngineStats, str]:
    stats = llm.stats()
    return stats, exposition(stats, llm.info, "a model").decode()


def parsed(text: str) -> Samples:
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[PREFIX + name, frozenset({("model_name", "a model"), *labels.items()})]


@pytest.mark.parametrize("expected", [VLLM, OURS], ids=["vLLM's", "ours"])
def test_names_and_labels(page: tuple[EngineStats, str], expected: dict[str, list[str]]) -> None:
    samples = parsed(page[1])
    for name, labels in expected.items():
        found = [{key for key, _ in has} for one, has in samples if one in (PREFIX + name, f"{PREFIX}{name}_count")]
        assert found, name
        assert all({"model_name", *labels} <= one for one in found), name


def test_nothing_else_has_the_prefix(page: tuple[EngineStats, str]) -> None:
    names = {line.split()[2] for line in page[1].splitlines() if line.startswith(f"# TYPE {PREFIX}")}
    assert names == {PREFIX + name for name in VLLM | OURS}


def test_values_are_those_of_the_engine(page: tuple[EngineStats, str]) -> None:
    stats, samples = page[0], parsed(page[1])
    assert value(samples, "prompt_tokens_total") == stats.requests.prompt_tokens == 380
    assert value(samples, "generation_tokens_total") == stats.requests.generation_tokens == 60
    assert value(samples, "request_success_total", finished_reason="length") == 2
    streamed = stats.bytes_moved["disk_streamed"]
    assert value(samples, "transfer_bytes_total", **{"from": "disk", "to": "staging"}) == streamed
    assert value(samples, "kv_offload_tiering_read_bytes_total", tier="disk") == stats.disk_read_bytes >= streamed
    spilled = value(samples, "kv_offload_total_bytes_total", transfer_type="GPU_to_CPU")
    assert spilled == stats.bytes_moved["device_to_host"]
    for tier, one in stats.tiers.items():
        assert value(samples, "tier_used_bytes", tier=tier) == one.used_bytes
        assert value(samples, "tier_capacity_bytes", tier=tier) == one.capacity_bytes
    assert value(samples, "kv_cache_usage_perc") == 0, "nothing runs"


def test_buckets_are_cumulative(page: tuple[EngineStats, str]) -> None:
    stats, samples = page[0], parsed(page[1])
    name = "inter_token_latency_seconds"
    found = {dict(labels)["le"]: number for (one, labels), number in samples.items() if one == f"{PREFIX}{name}_bucket"}
    counts = [found[bound] for bound in sorted(found, key=float)]
    assert counts == sorted(counts) and counts[-1] == value(samples, f"{name}_count") == 58
    assert value(samples, f"{name}_sum") == pytest.approx(stats.requests.inter_token_latency.total)


def test_the_device_is_in_use_while_a_request_runs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for _ in llm.stream(random_prompt(60, 5), params):
        samples = parsed(exposition(llm.stats(), llm.info, "a model").decode())
        if value(samples, "num_requests_running"):
            assert 0 < value(samples, "kv_cache_usage_perc") <= 1
            held = value(samples, "tier_used_bytes", tier="device") - value(samples, "tier_idle_bytes", tier="device")
            assert held > 0
            break
    else:
        pytest.fail("it was never seen running")


def test_a_model_may_have_any_name(llm: LLM) -> None:
    name = 'a "quoted"\\ name\nof two lines'
    found = parsed(exposition(llm.stats(), llm.info, name).decode())
    assert {dict(labels).get("model_name") for one, labels in found if one.startswith(PREFIX)} == {name}


def test_capacities_are_those_of_all_engines(llm: LLM) -> None:
    stats, info = llm.stats(), structs.replace(llm.info, summary_bytes=1000)
    one, two = (parsed(exposition(each, info, "a model").decode()) for each in (stats, total([stats, stats])))
    names = [key for key in one if key[0].endswith("_capacity_bytes")]
    assert len(names) == 4 and all(two[key] == 2 * one[key] > 0 for key in names)


def test_an_engine_that_tells_nothing_has_a_page_too(llm: LLM) -> None:
    assert parsed(exposition(EngineStats(0, 0, 0, 0), llm.info, "a model").decode())


def test_the_page_in_the_guide_lists_every_metric() -> None:
    table = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for metric in CATALOGUE:
        name = metric.name + ("_total" if metric.kind == "counter" else "")
        assert f"| `{name}`" in table, name
