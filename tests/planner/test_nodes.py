"""Plans over several nodes against sums that are worked out here: pipelines, context groups, what nodes share, and
attention on their CPUs."""

from dataclasses import replace
from typing import Any

import pytest

from distkv import ConfigError
from distkv.planner.hardware import Hardware, find_hardware
from distkv.planner.layouts import find_layouts
from distkv.planner.model_shape import find_model
from distkv.planner.nodes import Node, parse_node
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest

LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, DIM, VOCAB = 80, 8192, 28672, 64, 8, 128, 128256
LAYER = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * DIM + 3 * HIDDEN * WIDE  # parameters of a layer's products
TOKEN = 2 * LAYERS * KV_HEADS * DIM * 2  # bytes of KV
STATE = (DIM + 2) * 4  # bytes of a head's partial state of a page
MILLION = 2**20
H100 = find_hardware("h100")
NODE = Node(network=100e9, latency=5e-6, memory_bandwidth=400e9)
DCP: dict[str, Any] = {"tensor_parallel_size": 64, "decode_context_parallel_size": 8, "nodes": 8}
PP: dict[str, Any] = {"tensor_parallel_size": 8, "pipeline_parallel_size": 8, "nodes": 8}


def plan(hardware: Hardware = H100, node: Node = NODE, **more: Any) -> Plan:
    given = {"context": MILLION, **more}
    return make_plan(PlanRequest(find_model("llama-3-70b"), hardware, node=node, **given))


def test_a_million_tokens_lie_once_on_64_ranks() -> None:
    """Without context groups each of 8 KV heads lies on 8 ranks."""
    once, stages, copied = plan(**DCP), plan(**PP), plan(**{**DCP, "decode_context_parallel_size": 1})
    for found in (once, stages):
        assert found.fit.kv_bytes_per_token == TOKEN and found.request.copies_of_kv == 1
        assert found.fit.kv_bytes_per_request == TOKEN * MILLION == 320 * 2**30
    assert copied.fit.kv_bytes_per_token == 8 * TOKEN and copied.request.copies_of_kv == 8
    assert "8 times on the devices; --decode-context-parallel-size 8 has it once" in " ".join(copied.advice)
    assert once.fit.pages_per_request * 8 == copied.fit.pages_per_request == MILLION // 256
    assert {rank.num_layers for rank in stages.fit.ranks} == {10} and len(stages.fit.ranks) == 64
    weights = [rank.weights for rank in stages.fit.ranks[::8]]
    assert weights[1] == weights[7] == (10 * LAYER // 8 + 10 * 2 * HIDDEN) * 2
    assert weights[0] - weights[1] == (2 * VOCAB * HIDDEN // 8 + HIDDEN) * 2, "embedding, head and final norm"


def test_a_context_group_exchanges_states_of_pages_on_its_node() -> None:
    """Each rank sends its query head's queries to 7 others, and states of its 512 pages for the query heads of each."""
    found = plan(**DCP).decode
    assert found is not None
    exchange = LAYERS * 7 * (DIM * 2 + MILLION // 256 // 8 * STATE)
    on_node, numbers = 2 * 7 / 8, (2 * LAYERS + 1) * HIDDEN * 2
    assert found.parts["peer links"] == pytest.approx((exchange + on_node * numbers) / 450e9)
    network = 2 * 7 / 8 * numbers / 100e9 + (2 * LAYERS + 1) * 3 * 5e-6
    assert found.parts["network"] == pytest.approx(network), "sums in a tree of three steps between 8 nodes"
    assert found.between_ranks["context exchange"] == pytest.approx(exchange / 450e9)
    assert found.parts["KV"] == pytest.approx(TOKEN * MILLION / 64 / 3.35e12)
    in_turn = found.parts["weights"] + found.parts["KV"] + found.parts["peer links"] + network
    assert found.seconds == pytest.approx(in_turn) and found.idle == 0 and found.micro_batches == 1


def test_a_context_group_over_two_nodes_shares_their_network() -> None:
    """Of 16 ranks 7 are on the same node and 8 on the other, and the 8 of a node send at a time."""
    found = plan(**{**DCP, "decode_context_parallel_size": 16}).decode
    assert found is not None
    each = LAYERS * (DIM * 2 + MILLION // 256 // 16 * STATE)
    expected = 7 * each / 450e9 + 8 * 8 * each / 100e9 + 2 * LAYERS * 5e-6
    assert found.between_ranks["context exchange"] == pytest.approx(expected)


def test_stages_follow_each_other() -> None:
    """One request passes 8 stages while 7 of them wait. 16 of them are cut into m micro-batches: each reads a stage's
    weights again, the first passes all stages, and the others come behind it out of the slowest."""
    one, many = plan(**PP, context=2**17), plan(**PP, context=2**17, concurrency=16)
    assert one.decode is not None and many.decode is not None
    assert one.decode.micro_batches == 1 and one.decode.idle == pytest.approx(7 / 8, abs=1e-3)
    kv = TOKEN * 2**17 / 8 / 3.35e12
    assert one.decode.parts["KV"] == pytest.approx(kv)
    read = [one.request.model.rank_parameters(one.request.layout, rank).read_per_step * 2 for rank in range(0, 64, 8)]
    assert one.decode.parts["weights"] == pytest.approx(sum(read) / 3.35e12)
    rows = HIDDEN * 2
    hops = 8 * (8 * rows / 100e9 + 5e-6)
    assert one.decode.between_ranks["hidden states"] == one.decode.parts["network"] == pytest.approx(hops)
    count = many.decode.micro_batches
    assert count == pytest.approx((7 * 2 * kv / (read[0] / 3.35e12)) ** 0.5, abs=1), "and sums over the ranks"
    assert many.decode.idle == pytest.approx(7 / (7 + count), abs=0.02)
    assert many.decode.parts["weights"] == pytest.approx((sum(read) + (count - 1) * read[0]) / 3.35e12)
    assert many.decode.parts["KV"] == pytest.approx((7 + count) / 8 * 16 * kv / count)
    assert f"each waits {100 * one.decode.idle:.1f} % of the time; with 8 requests or more" in " ".join(one.advice)
    assert f"each waits {100 * many.decode.idle:.1f} % of the time." in " ".join(many.advice), "there are 8 already"


def test_a_prompt_passes_the_stages_in_pieces_of_each_chunk() -> None:
    found = plan(**PP, context=8192).first_token
    assert found is not None and found.micro_batches == 8
    operations = 2 * 8192 * LAYER * LAYERS + 2 * 8192**2 * HEADS * DIM * LAYERS + 2 * VOCAB * HIDDEN
    # eight pieces of a chunk pass eight stages in the time of fifteen; the first stage has the head too
    assert found.parts["compute"] == pytest.approx(operations / 64 * 15 / 8 / 989e12, rel=1e-3)
    assert found.between_ranks["hidden states"] == pytest.approx(4 * 8 * (8 * 256 * HIDDEN * 2 / 100e9 + 5e-6))


def test_a_prompt_has_its_pages_go_round_a_context_group() -> None:
    found = plan(**DCP, context=8192).first_token
    assert found is not None
    before = (2048 + 4096 + 6144) * TOKEN // 8  # of the group's head
    assert found.between_ranks["context exchange"] == pytest.approx(7 / 8 * before / 450e9)


@pytest.mark.parametrize("stages", [1, 2])
def test_gpus_of_a_node_share_its_memory_and_its_disk(stages: int) -> None:
    """Of 8 requests of 2**17 tokens a half lies on the devices of two nodes, a quarter on the host, a quarter on disk,
    also where each node has two stages that work at a time."""
    each = 2**17 * TOKEN
    sizes = {"device_kv_bytes": 4 * each, "host_kv_bytes": 2 * each * 16 // 15 + 2**20, "disk_kv_bytes": 4 * each}
    ranks = {"tensor_parallel_size": 8 // stages, "pipeline_parallel_size": 2 * stages}
    found = plan(**ranks, nodes=2, concurrency=8, context=2**17, page_size=1024, **sizes)
    assert [tier.used_pages for tier in found.fit.tiers] == [512, 256, 256] and found.decode is not None
    count = 2 * stages
    pieces = found.decode.micro_batches
    assert pieces > 2
    times = (count - 1 + pieces) / pieces  # of a micro-batch: through all stages, and out of the slowest
    at_a_time = 1 / 2  # of the layers, on one node
    quarter = 2 * each
    assert found.decode.parts["disk"] == pytest.approx(times * at_a_time * quarter / 7e9)
    assert found.decode.parts["host memory"] == pytest.approx(times * at_a_time * 3 * quarter / 400e9)
    assert found.decode.parts["host link"] == pytest.approx(times / count * 2 * quarter / (8 // stages) / 64e9)


def test_a_node_holds_no_more_than_it_has() -> None:
    fits = plan(**PP, node=Node(memory=2**40), host_kv_bytes="8TiB")
    assert fits.fits and fits.fit.refusal is None
    small = plan(**PP, node=Node(memory=2**39), host_kv_bytes="8TiB")
    assert not small.fits and "host_kv_bytes 8796093022208 is 1099511627776 bytes a node" in small.advice[0]
    assert small.advice[0].endswith("lower it to 4398046511104.")


def test_the_cpu_takes_what_the_links_leave_of_its_memory() -> None:
    """Of 8 requests 4 lie on the host. Eight links of 32 GB/s take 256 of 400 GB/s, so the CPU has 36 % of the pages;
    with links of 64 GB/s none are left."""
    each = 2**17 * TOKEN
    sizes = {"device_kv_bytes": 4 * each, "host_kv_bytes": 4 * each, "context": 2**17, "concurrency": 8}
    slow = replace(H100, host_link=32e9)
    off, auto, half, most = (
        plan(slow, tensor_parallel_size=8, cpu_attention=share, **sizes) for share in ("off", "auto", 0.5, 1)
    )
    assert off.decode is not None and auto.decode is not None and half.decode is not None and most.decode is not None
    assert off.decode.parts["host link"] == pytest.approx(4 * each / 8 / 32e9) and off.decode.limit == "host link"
    states = 0.36 * 8 * 2**17 / 256 * LAYERS * HEADS // 8 * STATE
    assert auto.to_json()["cpu_share"] == pytest.approx(0.36), "of all pages"
    assert auto.decode.parts["host link"] == pytest.approx((0.14 * 8 * each / 8 + states) / 32e9)
    assert auto.decode.parts["host memory"] == pytest.approx(4 * each / 400e9)
    assert auto.decode.seconds < 0.7 * off.decode.seconds
    for one in (half.decode, most.decode):  # all that is cold, whether streamed or not
        assert one.parts["host memory"] == auto.decode.parts["host memory"] and one.limit == "host memory"
    assert half.decode.parts["KV"] == most.decode.parts["KV"] == pytest.approx(4 * each / 8 / 3.35e12)
    fast = plan(tensor_parallel_size=8, cpu_attention="auto", **sizes)
    assert fast.to_json()["cpu_share"] == 0 and fast.decode is not None and fast.decode.limit == "host memory"


def test_all_layouts_are_compared() -> None:
    node = replace(NODE, gpus=4)
    request = PlanRequest(find_model("llama-3-70b"), H100, context=MILLION, node=node, host_kv_bytes=2**43)
    plans = find_layouts(request, 4)
    sizes = {(one.tensor_parallel_size, one.pipeline_parallel_size) for one in (found.request for found in plans)}
    assert sizes == {(16 // stages, stages) for stages in (1, 2, 4, 8, 16)}
    seconds = [found.decode.seconds for found in plans if found.decode is not None]
    assert seconds == sorted(seconds) and len(seconds) == len(plans)
    best = plans[0].request
    assert (best.tensor_parallel_size, best.decode_context_parallel_size) == (16, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tensor_parallel_size": 8, "decode_context_parallel_size": 3}, "decode_context_parallel_size 3 does not"),
        ({"tensor_parallel_size": 64, "decode_context_parallel_size": 4}, "has no whole KV heads"),
        ({"tensor_parallel_size": 16, "decode_context_parallel_size": 2, "page_size": 64}, "use page_size 256 or more"),
        ({"tensor_parallel_size": 128}, "more than the model's 64 query heads"),
        ({"pipeline_parallel_size": 81}, "more than the model's 80 layers"),
        ({"tensor_parallel_size": 8, "nodes": 3}, "8 x 1 are 8 ranks, which 3 nodes cannot share evenly"),
        ({"tensor_parallel_size": 32, "nodes": 2}, "32 x 1 are 32 ranks, and 2 nodes of 8 GPUs have 16"),
        ({"tensor_parallel_size": 6, "pipeline_parallel_size": 4, "nodes": 6}, "begin in the middle of nodes"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0"), ({"nodes": True}, "nodes is True"),
        ({**DCP, "cpu_attention": "auto", "host_kv_bytes": 2**40}, "cpu_attention is auto and decode_context"),
        ({"cpu_attention": "auto"}, "host_kv_bytes is 0"), ({"cpu_attention": "on"}, "cpu_attention is 'on'"),
        ({"cpu_attention": 1.5, "host_kv_bytes": 2**33}, "cpu_attention is 1.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_laid_out(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def test_a_node_by_hand() -> None:
    text = "gpus=4,memory=1TiB,bandwidth=500GB,disk=30TiB,network=100GB,latency_us=5"
    assert parse_node(text) == Node(4, 2**40, 500e9, 30 * 2**40, 100e9, pytest.approx(5e-6))
    assert parse_node("network=50GB") == Node(network=50e9)
    for wrong, message in (
        ("gpus=0", "gpus of the node is 0"), ("cores=3", "is not one of gpus=..., memory=..."),
        ("gpus=x", "gpus of the node is 'x'"), ("network=fast", "network of the node"), ("", "is not one of"),
        ("gpus=8,gpus=8", "each given once"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            parse_node(wrong)
