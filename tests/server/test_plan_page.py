"""The planner in a real browser: what its controls say is what the server is asked, and its bars are the answer."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Locator, Page, expect
from support.browsers import opened_page
from support.servers import PlannerProcess, ServerProcess

from distkv.planner.units import shown_seconds

PARTS = ("weights", "workspace", "context", "staging")
"""Of a rank's device, in the order of the bar."""


@pytest.fixture(scope="module")
def planner() -> Iterator[PlannerProcess]:
    """A server without a model."""
    with PlannerProcess() as server:
        yield server


@pytest.fixture(scope="module")
def page(planner: PlannerProcess, server: ServerProcess) -> Iterator[Page]:
    """Its page, with a plan that uses all tiers."""
    query = (
        "model=llama-3-70b&tensor_parallel_size=4&context=64k&concurrency=16&host_kv_bytes=128GiB&disk_kv_bytes=1TiB"
    )
    with opened_page(f"{planner.url}/plan?{query}", planner.url, _with_key(planner.url), server.url) as page:
        yield page


def test_a_slider_moves_the_bars_to_the_servers_figures(page: Page, planner: PlannerProcess) -> None:
    asked: dict[str, Any] = {"model": "llama-3-70b", "gpu": "h100", "tensor_parallel_size": 4, "context": "64k"}
    asked |= {"concurrency": 16, "host_kv_bytes": "128GiB", "disk_kv_bytes": "1TiB"}
    before = planner.post("/plan", asked).json()
    _expect_plan(page, before)
    slider = page.get_by_role("slider", name="Requests at a time")
    expect(slider).to_have_attribute("aria-valuetext", "16")
    slider.focus()
    for _ in range(2):  # 24, then 32
        page.keyboard.press("ArrowRight")
    after = planner.post("/plan", asked | {"concurrency": 32}).json()
    assert after["tiers"][2]["used_pages"] > before["tiers"][2]["used_pages"] > 0 and after["fits"]
    expect(page.get_by_role("status")).to_contain_text("All 32 requests fit, but llama-3-70b was made for 8,192")
    expect(page.locator("#verdict")).to_have_class("lacks")
    _expect_plan(page, after)
    assert parse_qs(urlsplit(page.url).query)["concurrency"] == ["32"]


def test_an_address_is_a_plan(page: Page, planner: PlannerProcess) -> None:
    page.get_by_label("Runs on", exact=True).select_option("by hand")
    by_hand = "memory=1TiB,bandwidth=2TB,matrix=300T,link=60GB"
    page.get_by_label("Runs on, by hand").fill(by_hand)
    page.get_by_label("Context, tokens of a request, exactly").fill("70000")
    page.get_by_text("More options").click()
    page.get_by_label("Tokens of a page").fill("64")
    expect(page.locator("#sources")).to_contain_text("given by hand")
    page.wait_for_url("**page_size=64**")
    asked: dict[str, Any] = {"model": "llama-3-70b", "gpu": by_hand, "tensor_parallel_size": 4, "context": 70000}
    asked |= {"concurrency": 32, "host_kv_bytes": "128GiB", "disk_kv_bytes": "1TiB", "page_size": 64}
    plan = planner.post("/plan", asked).json()
    _expect_plan(page, plan)
    page.goto(page.url)
    expect(page.get_by_label("Tokens of a page")).to_have_value("64")
    _expect_plan(page, plan)


def test_what_cannot_be_planned_is_said_where_it_is(page: Page) -> None:
    page.get_by_label("Tokens of a page").fill("17")
    expect(page.get_by_role("status")).to_contain_text("page_size 17 is not a power of two")
    expect(page.get_by_label("Tokens of a page")).to_have_attribute("aria-invalid", "true")
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_role("status")).to_contain_text("The request fits")
    expect(page.get_by_label("Tokens of a page")).not_to_have_attribute("aria-invalid", "true")


def test_a_codec_makes_the_bars_below_the_device_smaller(page: Page, planner: PlannerProcess) -> None:
    asked = {"model": "llama-3-8b", "gpu": "l4", "context": "8k", "concurrency": 6, "host_kv_bytes": "8GiB"}
    page.goto(f"{planner.url}/plan?{urlencode(asked)}")
    _expect_plan(page, planner.post("/plan", asked).json())
    page.get_by_label("KV below the device").select_option("int4")
    plan = planner.post("/plan", asked | {"kv_cache_dtype": "int4"}).json()
    assert plan["tiers"][1]["used_pages"] and plan["kv_bytes_per_token"] > 3 * plan["cold_kv_bytes_per_token"]
    expect(page.locator("#figures")).to_contain_text("KV of a token below the device36.0 KiB")
    _expect_plan(page, plan)
    page.get_by_text("More options").click()
    page.get_by_label("Attention policy").fill("sink_window(sinks=4, window=1024)")
    expect(page.locator("#figures")).to_contain_text("18.8 %")
    page.get_by_label("Host memory for KV, exactly").fill("0")
    expect(page.get_by_role("status")).to_contain_text("kv_cache_dtype is set and host_kv_bytes is 0")
    expect(page.get_by_label("KV below the device")).to_have_attribute("aria-invalid", "true")
    assert parse_qs(urlsplit(page.url).query)["attention_policy"] == ["sink_window(sinks=4, window=1024)"]


def test_what_was_refused_is_shown(page: Page, planner: PlannerProcess) -> None:
    """Among the options that are folded away, too."""
    page.goto(f"{planner.url}/plan?model=llama-3-8b&gpu=h100&concurrency=4000")
    expect(page.get_by_label("Most tokens of a step")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Most tokens of a step")).to_be_visible()


def test_memory_that_nothing_uses_is_not_said_to_be_used(page: Page, planner: PlannerProcess) -> None:
    page.goto(f"{planner.url}/plan?model=llama-3-70b&gpu=a10&host_kv_bytes=64GiB")
    expect(page.get_by_role("status")).to_contain_text("Nothing runs")
    expect(page.locator(".tier-bar.host .legend")).to_have_text("not used 64.0 GiB")


def test_an_answer_that_is_no_plan_is_told_and_outlived(page: Page, planner: PlannerProcess) -> None:
    page.goto(f"{_with_key(planner.url)}/plan")
    expect(page.get_by_role("status")).to_contain_text("The request fits")
    page.route("**/plan", lambda route: route.fulfill(status=502, body="<html>", content_type="text/html"))
    slider = page.get_by_role("slider", name="Requests at a time")
    slider.press("ArrowRight")
    expect(page.get_by_role("status")).to_contain_text("status 502")
    page.unroute("**/plan")
    slider.press("ArrowRight")
    expect(page.get_by_role("status")).to_contain_text("All 3 requests fit")


def test_a_phone_has_room_for_it(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.locator("#verdict")).to_be_in_viewport()  # while the controls are
    share = page.get_by_role("button", name="Copy link")
    share.focus()
    boxes = share.bounding_box(), page.locator("#headline").bounding_box()
    assert boxes[0] and boxes[1] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # which hides nothing in focus


def test_a_server_on_a_cpu_speaks_of_no_gpu(page: Page, server: ServerProcess) -> None:
    page.goto(f"{server.url}/plan")
    expect(page.get_by_role("status")).to_contain_text("The request fits")
    expect(page.get_by_label("Model", exact=True)).to_have_value("talker")
    expect(page.locator("#sources")).to_contain_text("measured on this CPU")
    assert "GPU" not in page.locator("body").inner_text()
    page.get_by_role("link", name="Chat").click()
    page.get_by_role("link", name="Plan").click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("talker")


def _with_key(url: str) -> str:
    """An address as browsers take the key in it."""
    return url.replace("//", "//any:key@")


def _expect_plan(page: Page, plan: dict[str, Any]) -> None:
    """The bars have the sizes of a plan, in bytes and on the screen, and the figures its times."""
    rank, tiers = min(plan["ranks"], key=lambda one: one["left"] / one["page_bytes"]), plan["tiers"]
    device, host, disk = (page.locator(f".tier-bar.{tier['name']}") for tier in tiers)
    used = tiers[0]["used_pages"] * rank["page_bytes"]
    free = (tiers[0]["pages"] - tiers[0]["used_pages"]) * rank["page_bytes"]
    taken = [size for size in (*(rank[part] for part in PARTS), used, free) if size]
    rest = plan["hardware"]["memory_bytes"] - sum(taken)
    expect(device.locator(".bar i")).to_have_count(len(taken) + 1)
    _expect_sizes(device, [*taken, rest])
    for bar, tier in ((host, tiers[1]), (disk, tiers[2])):
        pages = tier["used_pages"], tier["pages"] - tier["used_pages"]
        sizes = [count * tier["num_bytes"] / tier["pages"] for count in pages if count]
        _expect_sizes(bar, [*sizes, plan["request"][f"{tier['name']}_kv_bytes"] - tier["num_bytes"]])
    times = [shown_seconds(plan[name]["seconds"]) for name in ("decode", "first_token")]
    for index, time in enumerate(times):
        expect(page.locator("#figures dd").nth(index)).to_have_text(time)
    parts = [shown_seconds(seconds) for seconds in plan["decode"]["parts"].values() if seconds]
    expect(page.locator("#costs b")).to_have_text(parts)
    expect(page.locator("#costs .binds")).to_have_count(1)


def _expect_sizes(bar: Locator, sizes: list[float]) -> None:
    """Of the parts of a bar, but for those that are empty."""
    sizes = [size for size in sizes if size > 0]
    expect(bar.locator(".bar i")).to_have_count(len(sizes))
    for index, size in enumerate(sizes):
        expect(bar.locator(".bar i").nth(index)).to_have_attribute("data-bytes", f"{size:.0f}")
    bar.locator(".bar").evaluate("bar => Promise.all(bar.getAnimations({ subtree: true }).map((one) => one.finished))")
    widths = bar.locator(".bar i").evaluate_all("parts => parts.map((one) => one.getBoundingClientRect().width)")
    assert widths == pytest.approx([sum(widths) * size / sum(sizes) for size in sizes], abs=1)
