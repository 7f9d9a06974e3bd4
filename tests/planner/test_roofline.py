"""Times of plans against sums that are worked out here, from the shape and the data sheet alone."""

from dataclasses import replace
from typing import Any

import pytest

from distkv.planner.hardware import Hardware, find_hardware
from distkv.planner.model_shape import find_model
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest
from distkv.planner.units import shown_bytes

LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, DIM, VOCAB = 32, 4096, 14336, 32, 8, 128, 128256
PRODUCTS = LAYERS * (HIDDEN * (2 * HEADS + 2 * KV_HEADS) * DIM + 3 * HIDDEN * WIDE)
READ = PRODUCTS + (2 * LAYERS + 1) * HIDDEN + VOCAB * HIDDEN  # parameters of a step: norms and the head too
TOKEN = 2 * LAYERS * KV_HEADS * DIM * 2  # bytes of KV
H100 = find_hardware("h100")
CPU = Hardware("two cores", "made up", 2**36, 20e9, 1e12, 10e9, 10e9, 2e9, is_cpu=True, step_seconds=0.003)


def plan(hardware: Hardware = H100, **more: Any) -> Plan:
    return make_plan(PlanRequest(find_model("llama-3-8b"), hardware, **more))


def test_a_step_with_all_on_the_device() -> None:
    found = plan(context=8192, concurrency=16).decode
    assert found is not None
    tokens = 16 * 8192
    assert found.parts["weights"] == pytest.approx(2 * READ / 3.35e12)
    assert found.parts["KV"] == pytest.approx(tokens * TOKEN / 3.35e12)
    operations = 2 * 16 * (PRODUCTS + VOCAB * HIDDEN) + 4 * tokens * HEADS * DIM * LAYERS
    assert found.parts["compute"] == pytest.approx(operations / 989e12)
    assert found.parts["host link"] == found.parts["disk"] == found.parts["peer links"] == 0
    assert found.seconds == pytest.approx((2 * READ + tokens * TOKEN) / 3.35e12) and found.limit == "KV"


def test_cold_pages_cross_the_link_while_others_are_read() -> None:
    """Of two requests of 65536 tokens one lies below the device, three quarters of it on the host."""
    half, quarter = 65536 * TOKEN, 16384 * TOKEN
    host = (half - quarter) * 16 // 15  # of which a sixteenth reads ahead
    sizes = {"device_kv_bytes": half, "host_kv_bytes": host, "disk_kv_bytes": quarter}
    found = plan(context=65536, concurrency=2, **sizes)
    assert [tier.used_pages for tier in found.fit.tiers] == [256, 192, 64] and found.decode is not None
    parts = found.decode.parts
    assert parts["host link"] == pytest.approx(half / 64e9), "what comes from disk crosses it as well"
    assert parts["disk"] == pytest.approx(quarter / 7e9)
    assert parts["KV"] == pytest.approx((half + 2 * half) / 3.35e12), "into the ring and out of it"
    assert found.decode.seconds == max(parts.values()) and found.decode.limit == "disk"


def test_a_cpu_copies_and_computes_in_turn() -> None:
    half, quarter = 4096 * TOKEN, 1024 * TOKEN
    sizes = {"device_kv_bytes": half, "host_kv_bytes": half - quarter, "disk_kv_bytes": quarter}
    found = plan(CPU, context=4096, concurrency=2, **sizes).decode
    assert found is not None
    memory, copies, disk = (2 * READ + 2 * half) / 20e9, (half - quarter) / 10e9, quarter / 2e9
    assert found.seconds == pytest.approx(memory + copies + disk + 0.003)
    faster = plan(replace(CPU, attention_bandwidth=40e9), context=4096, concurrency=2, **sizes).decode
    assert faster is not None and found.seconds - faster.seconds == pytest.approx(half / 20e9)


@pytest.mark.parametrize("codec, cold_token", [("int8", TOKEN * 33 // 64), ("int4", TOKEN * 9 // 32)])
def test_codes_are_what_streams(codec: str, cold_token: int) -> None:
    """A byte a number and a scale for 64 of them, or half a byte and two scales; of two requests of 4096 tokens one
    lies on the device, in 16 pages, and the other 4 pages on the host and 12 on disk."""
    page = 256
    sizes = {"device_kv_bytes": 16 * page * TOKEN, "host_kv_bytes": 4 * page * cold_token}
    sizes["disk_kv_bytes"] = 12 * page * cold_token
    found = plan(CPU, context=4096, concurrency=2, kv_cache_dtype=codec, **sizes)
    assert [tier.used_pages for tier in found.fit.tiers] == [16, 4, 12] and found.decode is not None
    parts = found.decode.parts
    assert parts["KV"] == pytest.approx(4096 * (TOKEN + cold_token) / 20e9)
    assert parts["host link"] == pytest.approx(1024 * cold_token / 10e9)
    assert parts["disk"] == pytest.approx(3072 * cold_token / 2e9)
    first = plan(CPU, context=8192, kv_cache_dtype=codec, **sizes).first_token
    assert first is not None
    cold = 2048  # of the tokens before the last of four chunks, 4096 lie on the device
    assert first.parts["KV"] == pytest.approx(((2048 + 4096 + 4096) * TOKEN + cold * cold_token) / 20e9)
    assert first.parts["disk"] == pytest.approx(1024 * cold_token / 2e9)


def test_a_policy_reads_its_share_of_every_tier() -> None:
    """Of 64 pages 7 each, a tenth rounded up, and a summary of all; a first token reads all."""
    half, quarter = 16384 * TOKEN, 4096 * TOKEN
    sizes = {"device_kv_bytes": half, "host_kv_bytes": half - quarter, "disk_kv_bytes": quarter}
    every, few = (
        plan(CPU, context=16384, concurrency=2, attention_policy=policy, **sizes)
        for policy in ("full", "top_pages(share=0.1)")
    )
    assert few.request.share_read == 7 / 64 and few.fit == every.fit and few.first_token == every.first_token
    assert few.decode is not None and every.decode is not None
    for part in ("host link", "disk"):
        assert few.decode.parts[part] == pytest.approx(every.decode.parts[part] * 7 / 64) and few.decode.parts[part]
    assert few.decode.parts["KV"] == pytest.approx((2 * half * 7 / 64 + 1024 * TOKEN) / 20e9)
    window = plan(CPU, context=16384, attention_policy="sink_window(sinks=4, window=1024)", **sizes)
    assert window.decode is not None and window.request.share_read == 6 / 64, "a page of sinks, and five of the window"
    assert window.decode.parts["KV"] == pytest.approx(half * 6 / 64 / 20e9)
    summaries = f"summaries of the running requests' pages in memory, {shown_bytes(1024 * TOKEN)}"
    assert [summaries in " ".join(one.advice) for one in (few, window, every)] == [True, False, False]


def test_ranks_share_out_what_they_read_and_sum_over_links() -> None:
    found = plan(context=8192, concurrency=16, tensor_parallel_size=8).decode
    assert found is not None
    norms = (2 * LAYERS + 1) * HIDDEN
    assert found.parts["weights"] == pytest.approx(2 * ((READ - norms) / 8 + norms) / 3.35e12)
    assert found.parts["KV"] == pytest.approx(16 * 8192 * TOKEN / 8 / 3.35e12)
    sums = (2 * LAYERS + 1) * 16 * HIDDEN * 2 * 2 * 7 / 8
    assert found.parts["peer links"] == pytest.approx(sums / 450e9)
    assert found.seconds == pytest.approx(found.parts["weights"] + found.parts["KV"] + found.parts["peer links"])
    uneven = plan(context=8192, concurrency=16, tensor_parallel_size=3)
    assert [rank.num_kv_heads for rank in uneven.fit.ranks] == [3, 3, 2] and uneven.decode is not None
    assert uneven.decode.parts["KV"] == pytest.approx(16 * 8192 * TOKEN * 3 / 8 / 3.35e12), "of the fullest rank"
    shared = plan(context=8192, tensor_parallel_size=32).fit
    assert shared.kv_bytes_per_token == 4 * TOKEN, "four ranks hold each head"


@pytest.mark.parametrize("context", [1, 1000, 2048, 2049, 50_000, 131_072])
def test_the_first_token_reads_what_lies_before_each_chunk(context: int) -> None:
    """Beside a sum over the chunks, one by one, with 16384 tokens on the device and as many on the host."""
    sizes = {"device_kv_bytes": 16384 * TOKEN, "host_kv_bytes": 16384 * TOKEN * 16 // 15, "disk_kv_bytes": 2**40}
    found = plan(context=context, **sizes).first_token
    assert found is not None
    starts = range(0, context, 2048)
    operations = 2 * context * PRODUCTS + 2 * VOCAB * HIDDEN + 2 * context**2 * HEADS * DIM * LAYERS
    assert found.parts["compute"] == pytest.approx(operations / 989e12)
    head = VOCAB * HIDDEN  # of the last chunk alone
    assert found.parts["weights"] == pytest.approx(2 * (len(starts) * (READ - head) + head) / 3.35e12)
    cold = sum(max(0, start - 16384) for start in starts)
    assert found.parts["KV"] == pytest.approx((sum(starts) + cold) * TOKEN / 3.35e12), "cold KV twice"
    assert found.parts["host link"] == pytest.approx(cold * TOKEN / 64e9)
    assert found.parts["disk"] == pytest.approx(sum(max(0, start - 32768) for start in starts) * TOKEN / 7e9)


def test_half_precision_is_what_the_matrix_rate_is_of() -> None:
    half, full = (plan(context=8192, dtype=dtype).first_token for dtype in ("bfloat16", "float32"))
    assert half is not None and full is not None
    assert full.parts["compute"] == pytest.approx(2 * half.parts["compute"])
    assert full.parts["weights"] == pytest.approx(2 * half.parts["weights"])
