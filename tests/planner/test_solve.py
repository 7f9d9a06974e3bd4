"""The smallest setup, and what sharing KV heads saves."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import pytest
from support.cpu_plans import CPU

from distkv import ConfigError
from distkv.planner.attention_kinds import attention_kinds, guessed_kv
from distkv.planner.hardware import GPUS, find_hardware
from distkv.planner.model_shape import find_model
from distkv.planner.plan import make_plan
from distkv.planner.request import PlanRequest
from distkv.planner.room import enough_below, fewest_ranks
from distkv.planner.solve import solve
from distkv.workers.attention.policies.sink_window import SinkWindow
from distkv.workers.kinds import KINDS

TARGET = PlanRequest(
    find_model("llama-3.1-8b"), find_hardware("l40s"), context=2**17, concurrency=8, host_kv_bytes=2**40,
    disk_kv_bytes=2**42,
)  # fmt: skip
SIZES = [1, 2, 4, 8]


@pytest.mark.parametrize("seconds", [None, 0.5, 0.01])
def test_the_smallest_setup_reaches_and_nothing_smaller_does(seconds: float | None) -> None:
    """Beside all setups with as much memory below as may be taken."""
    for found in solve(TARGET, list(GPUS.values()), SIZES, seconds, {}):
        request = found.plan.request
        for size in SIZES[: SIZES.index(request.tensor_parallel_size)] if found.reached else SIZES:
            for host, disk in ((0, 0), (2**40, 0), (2**40, 2**42)):
                smaller = make_plan(replace(request, tensor_parallel_size=size, host_kv_bytes=host, disk_kv_bytes=disk))
                assert not smaller.fits or (seconds is not None and smaller.decode.seconds > seconds), smaller.command
        if found.reached:
            assert found.plan.fits and (seconds is None or found.plan.decode.seconds <= seconds)
            if request.host_kv_bytes:
                assert not make_plan(replace(request, host_kv_bytes=0, disk_kv_bytes=0)).fits or seconds is not None


def test_prices_decide() -> None:
    h100, l40s = find_hardware("h100"), find_hardware("l40s")
    for prices, best in (({h100.name: 2.0, l40s.name: 3.0}, h100), ({h100.name: 9.0, l40s.name: 0.1}, l40s)):
        first = solve(TARGET, [h100, l40s], SIZES, None, prices)[0]
        assert first.plan.request.hardware == best and first.reached
        size, rate = first.plan.request.tensor_parallel_size, first.plan.tokens_per_second
        assert first.price_per_hour == prices[best.name] * size
        assert first.price_per_million_tokens == pytest.approx(first.price_per_hour / 3600 / rate * 1e6)
    with pytest.raises(ConfigError, match="no price per hour for L40S"):
        solve(TARGET, [h100, l40s], SIZES, None, {h100.name: 2.0})


def test_all_that_may_be_taken_is_taken_where_round_figures_are_more() -> None:
    """40 requests of 40 GiB, of which the GPUs hold 3."""
    target = replace(TARGET, model=find_model("llama-3-70b"), concurrency=40, host_kv_bytes=3 * 2**39, disk_kv_bytes=0)
    for host, reached in ((1470 * 2**30, True), (1400 * 2**30, False)):
        [found] = solve(replace(target, host_kv_bytes=host), [find_hardware("h100")], [4], None, {})
        assert found.reached == reached and found.plan.request.host_kv_bytes == host
        with_disk = replace(target, host_kv_bytes=host, disk_kv_bytes=200 * 2**30)
        [found] = solve(with_disk, [find_hardware("h100")], [4], None, {})
        assert found.reached and bool(found.plan.request.disk_kv_bytes) != reached


def test_what_comes_nearest_is_first_where_nothing_reaches_the_target() -> None:
    """Whatever it costs."""
    prices = {find_hardware(name).name: price for name, price in (("l4", 0.3), ("h100", 3.0), ("b200", 6.0))}
    found = solve(TARGET, [find_hardware(name) for name in ("l4", "h100", "b200")], SIZES, 0.001, prices)
    assert not any(one.reached for one in found) and len({one.plan.fits for one in found}) == 1
    seconds = [one.plan.decode.seconds for one in found]
    assert seconds == sorted(seconds) and found[0].price_per_hour == 48.0


def test_a_cpu_is_no_more_than_one() -> None:
    [found] = solve(replace(TARGET, concurrency=1), [CPU], SIZES, 1e-6, {})
    assert not found.reached and found.plan.request.tensor_parallel_size == 1


def test_what_is_advised_makes_room() -> None:
    devices = replace(TARGET, host_kv_bytes=0, disk_kv_bytes=0)
    assert not make_plan(devices).fits
    with_host = enough_below(devices, "host")
    assert with_host is not None and make_plan(with_host).fits
    assert not make_plan(replace(with_host, host_kv_bytes=with_host.host_kv_bytes * 8 // 9)).fits
    with_disk = enough_below(replace(devices, host_kv_bytes=2**33, disk_kv_bytes=2**33), "disk")
    assert with_disk is not None and make_plan(with_disk).fits
    assert (ranks := fewest_ranks(devices, fit_all=True)) is not None
    assert make_plan(replace(devices, tensor_parallel_size=ranks)).fits
    too_large = replace(devices, model=find_model("llama-3-70b"))
    assert enough_below(too_large, "host") is None
    assert f"use --gpus {fewest_ranks(too_large)} or more" in make_plan(too_large).advice[0]


def test_a_codec_is_named_where_it_makes_room() -> None:
    """Not where it would not be enough."""
    cpu = replace(TARGET, hardware=replace(CPU, memory_bytes=2**37), context=2**16, device_kv_bytes=2**34)
    for gib, codec in ((60, None), (36, "int8"), (20, "int4"), (6, None)):
        target = replace(cpu, concurrency=9, host_kv_bytes=gib * 2**30, disk_kv_bytes=0)
        advice = make_plan(target).advice[0]
        assert ("--kv-cache-dtype" in advice) == (codec is not None), advice
        if codec is not None:
            assert f"--kv-cache-dtype {codec} would make room for all" in advice and "docs/quality.md" in advice
            assert make_plan(replace(target, kv_cache_dtype=codec)).fits
    small = replace(cpu, concurrency=9, host_kv_bytes=2**40, disk_kv_bytes=0)
    found = [
        solve(replace(small, kv_cache_dtype=codec), [cpu.hardware], SIZES, None, {})[0] for codec in ("auto", "int4")
    ]
    assert all(one.reached for one in found)
    assert found[1].plan.request.host_kv_bytes * 3 < found[0].plan.request.host_kv_bytes


def test_plans_know_which_kernels_know_policies() -> None:
    from distkv.workers.backends.cpu import NativeBackend
    from distkv.workers.backends.cuda import CudaBackend

    for kind, backend in (("cpu", NativeBackend), ("cuda", CudaBackend)):
        assert KINDS[kind].follows_policies == _takes(backend.use_policy, SinkWindow(), None)


def _takes(method: Callable[..., object], *values: object) -> bool:
    """Whether a method of a backend, which is not there, takes values."""
    try:
        method(Mock(), *values)
    except ConfigError:
        return False
    return True


def test_shared_kv_heads_save_what_is_published() -> None:
    """For 32 query heads MQA takes a 32nd and GQA with 8 KV heads a quarter; the model's own row is its plan."""
    kinds = {one.name: one for one in attention_kinds(TARGET)}
    assert {name: one.saving for name, one in kinds.items()} == {"MHA": 1, "GQA": 4, "MQA": 32}
    assert all(one.plan.fit.kv_bytes_per_token == 2 * 32 * one.kv_heads * 128 * 2 for one in kinds.values())
    four = {one.name: one.saving for one in attention_kinds(replace(TARGET, tensor_parallel_size=4))}
    assert four == {"MHA": 1, "GQA": 4, "MQA": 8}, "each of four ranks holds the only head"
    assert kinds["GQA"].is_own and kinds["GQA"].plan == make_plan(TARGET)
    times = [kinds[name].plan.decode.seconds for name in ("MQA", "GQA", "MHA")]
    assert times == sorted(times)


def test_gpt_4_is_a_guess_or_nothing() -> None:
    kv = guessed_kv({"layers": 120, "heads": 96, "head_dim": 128, "kv_heads": 1}, "float16")
    assert kv.bytes_per_token == 2 * 120 * 128 * 2
    for guess in ({"layers": 120}, {"layers": 1, "heads": 1, "head_dim": 1, "experts": 16}):
        with pytest.raises(ConfigError, match="the guess"):
            guessed_kv(guess, "float16")
    with pytest.raises(ConfigError, match="dtype is 'float13'"):
        guessed_kv({"layers": 1, "heads": 1, "head_dim": 1}, "float13")
    with pytest.raises(ConfigError, match="not published"):
        find_model("gpt-4")
