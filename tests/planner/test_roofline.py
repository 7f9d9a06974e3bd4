"""Times of plans against sums that are worked out here, from the shape and the data sheet alone."""

from dataclasses import replace
from typing import Any

import pytest

from distkv.planner.hardware import Hardware, find_hardware
from distkv.planner.model_shape import find_model
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest

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
