"""Plans: the arithmetic that others have published, what must hold of every plan, and what is refused."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv import ConfigError
from distkv.planner.hardware import GPUS, Hardware, find_hardware
from distkv.planner.model_shape import find_model
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest

GIB = 2**30
H100 = find_hardware("h100")


def plan(model: str = "llama-3-8b", hardware: Hardware = H100, **more: Any) -> Plan:
    return make_plan(PlanRequest(find_model(model), hardware, **more))


def test_published_arithmetic() -> None:
    """LLaMA-7B in fp16: 2 GiB for 4k tokens, 64 GiB for 32 such requests. Llama-3-8B: 128 KiB per token, 0.5 GiB at 4k,
    16 GiB at 128k, of which 4 fit beside the weights on 80 GB. Llama-3-70B: an eighth of what 64 heads would take."""
    seven = plan("llama-7b", context=4096, dtype="float16").fit
    assert seven.kv_bytes_per_request == 2 * GIB and 32 * seven.kv_bytes_per_request == 64 * GIB
    assert plan().fit.kv_bytes_per_token == 128 * 1024
    assert plan(context=4096).fit.kv_bytes_per_request == GIB // 2
    eight = plan(context=2**17)
    assert eight.fit.kv_bytes_per_request == 16 * GIB and eight.fit.usual_requests == 4
    assert eight.fit.most_requests == 3, "nine tenths of what CUDA sees, less the workspace, hold one less"
    by_hand = find_hardware("memory=80GiB,bandwidth=3.35TB,matrix=989T,link=64GB")
    assert plan(hardware=by_hand, context=2**17, gpu_memory_utilization=1.0).fit.most_requests == 4
    seventy = find_model("llama-3-70b")
    full = replace(seventy, config=replace(seventy.config, num_key_value_heads=64))
    both = [make_plan(PlanRequest(one, H100, tensor_parallel_size=8)).fit for one in (seventy, full)]
    assert both[1].kv_bytes_per_token == 8 * both[0].kv_bytes_per_token == 8 * 320 * 1024


SIZES = st.sampled_from([0, 1 << 34, 1 << 38, 1 << 42])
REQUESTS = st.fixed_dictionaries(
    {
        "hardware": st.sampled_from(list(GPUS.values())),
        "tensor_parallel_size": st.sampled_from([1, 2, 3, 8, 16]),
        "context": st.integers(1, 1 << 20),
        "concurrency": st.integers(1, 256),
        "host_kv_bytes": SIZES,
        "disk_kv_bytes": SIZES,
        "kv_cache_dtype": st.sampled_from(["auto", "int8", "int4"]),
        "page_size": st.sampled_from([16, 256]),
    }
)


@settings(max_examples=60, deadline=None)
@given(model=st.sampled_from(["llama-3-8b", "llama-3.2-1b", "smollm2-135m"]), options=REQUESTS)
def test_more_memory_never_fits_less_and_never_takes_longer(model: str, options: dict[str, Any]) -> None:
    if model == "smollm2-135m":
        options = {**options, "tensor_parallel_size": min(options["tensor_parallel_size"], 9)}
    if not options["host_kv_bytes"]:
        options = {**options, "disk_kv_bytes": 0, "kv_cache_dtype": "auto"}
    one = plan(model, **options)
    fit = one.fit
    used = sum(tier.used_pages for tier in fit.tiers)
    assert used == fit.running * fit.pages_per_request and all(0 <= t.used_pages <= t.pages for t in fit.tiers)
    assert fit.running <= min(fit.most_requests, options["concurrency"])
    json.loads(json.dumps(one.to_json(), allow_nan=False))
    hardware = options["hardware"]
    larger = plan(model, **{**options, "hardware": replace(hardware, memory_bytes=2 * hardware.memory_bytes)})
    longer = plan(model, **{**options, "context": 2 * options["context"]})
    for other, better in ((larger, larger.fit.most_requests >= fit.most_requests),
                          (longer, longer.fit.most_requests <= fit.most_requests)):  # fmt: skip
        assert better, other
    if options["host_kv_bytes"] and options["kv_cache_dtype"] != "int4":
        smaller = plan(model, **{**options, "kv_cache_dtype": "int4"})
        assert smaller.fit.most_requests >= fit.most_requests
    few, window, all_of_them = (
        plan(model, **{**options, "kv_cache_dtype": "auto", "attention_policy": policy})
        for policy in ("top_pages(share=0.5)", "sink_window", "full")
    )
    assert window.fit == all_of_them.fit and window.first_token == all_of_them.first_token
    assert few.fit.most_requests <= all_of_them.fit.most_requests, "beside their pages lie the summaries of these"
    more = plan(model, **{**options, "concurrency": options["concurrency"] + 1})
    if one.decode is not None:
        assert more.decode is not None and more.decode.seconds >= one.decode.seconds
    # pages on the device are not codes, so that where its own memory is the limit more of them there may take longer
    is_coded = options["kv_cache_dtype"] != "auto"
    if one.decode is not None and larger.fit.running == fit.running and not is_coded:
        assert larger.decode is not None and larger.decode.seconds <= one.decode.seconds
    if one.decode is not None:
        assert one.decode.seconds >= max(one.decode.parts.values()) > 0
        assert one.first_token is not None and one.first_token.seconds > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context": 0}, "context is 0"), ({"context": float("nan")}, "context is nan"),
        ({"concurrency": -1}, "concurrency is -1"), ({"concurrency": True}, "concurrency is True"),
        ({"tensor_parallel_size": 33}, "more than the model's 32 query heads"), ({"page_size": 100}, "page_size 100"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype is 'int3'"), ({"kv_cache_dtype": "int8"}, "host_kv_bytes is 0"),
        ({"attention_policy": "top"}, "attention_policy is 'top'"), ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"disk_kv_bytes": "1TiB"}, "host_kv_bytes is 0"), ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"concurrency": 4096}, "max_num_batched_tokens 2048 is less"), ({"host_kv_bytes": -5}, "host_kv_bytes is -5"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def test_what_keeps_more_from_running_is_named() -> None:
    for options, limit in (
        ({"concurrency": 8}, "device memory"), ({"concurrency": 20, "host_kv_bytes": 2**37}, "host memory"),
        ({"concurrency": 99, "host_kv_bytes": 2**37, "disk_kv_bytes": 2**38}, "room on disk"),
        ({"concurrency": 3, "max_num_seqs": 2}, "max_num_seqs"),
    ):  # fmt: skip
        found = plan(context=2**17, **options)
        assert not found.fits and found.capacity_limit == limit and limit in found.advice[0]


def test_kv_of_a_given_size_has_what_is_beside_the_weights() -> None:
    """Also beyond `gpu_memory_utilization`, which the engine does not look at then."""
    for gib, fits in ((60, True), (65, False)):
        found = plan(context=4096, device_kv_bytes=gib * GIB)
        assert found.fits == fits and found.fit.tiers[0].num_bytes == (gib * GIB if fits else 0)
    assert f"device_kv_bytes {65 * GIB} holds" in found.advice[0] and found.command is None


def test_a_page_for_which_there_is_no_room_is_named() -> None:
    advice = plan(page_size=2**21).advice[0]
    assert "a page of KV 256 GiB; use --gpus 4 or more" in advice and "or a smaller --page-size" in advice
    assert "--page-size" not in plan("llama-3-70b").advice[0], "the weights alone are too much"


def test_a_step_of_fewer_tokens_than_answers_is_of_so_many_answers() -> None:
    options = plan(max_num_batched_tokens=32).request.engine_options
    assert options["max_num_seqs"] == options["max_num_batched_tokens"] == 32


def test_more_host_memory_as_advised_needs_no_disk() -> None:
    sizes = {"context": 2**17, "concurrency": 8, "host_kv_bytes": 2**35}
    waits = plan(**sizes, disk_kv_bytes=2**38)
    assert waits.decode is not None and waits.decode.limit == "disk"
    [size] = re.findall("waits for the disk: --host-kv-bytes ([0-9]+GiB) would", " ".join(waits.advice))
    assert plan(**{**sizes, "host_kv_bytes": size}).fits


@pytest.mark.parametrize("field", ["memory_bandwidth", "host_link", "matrix_rate", "memory_bytes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, True, "fast"])
def test_hardware_of_nonsense_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} of H100 SXM is"):
        replace(H100, **{field: value})


@pytest.mark.parametrize(
    "rates, limit",
    [
        ({"memory_bandwidth": 1e6, "attention_bandwidth": 1e12}, "weights"), ({"memory_bandwidth": 1e6}, "KV"),
        ({"host_link": 1e3}, "host link"), ({"disk_bandwidth": 1e3}, "disk"), ({"peer_link": 1e3}, "peer links"),
    ],
)  # fmt: skip
def test_advice_for_a_cpu_speaks_of_no_gpu(rates: dict[str, float], limit: str) -> None:
    cpu = Hardware("a CPU", "made up", 4 * GIB, 1e12, 1e15, 1e12, 1e12, 1e12, is_cpu=True, is_measured=True)
    sizes = {"host_kv_bytes": 2**28, "disk_kv_bytes": 2**30}
    found = plan("smollm2", replace(cpu, **rates), context=8192, concurrency=10, tensor_parallel_size=3, **sizes)
    assert found.decode is not None and found.decode.limit == limit and found.advice
    said = " ".join(found.advice)
    assert not [word for word in ("GPU", "NVLink", "more ranks") if word in said]
