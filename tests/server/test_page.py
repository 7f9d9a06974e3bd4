"""The page in a real browser: a chat that streams, and the live picture beside it."""

import re
import signal
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect
from support.browsers import opened_page
from support.servers import ServerProcess


@pytest.fixture(scope="module")
def page(server: ServerProcess) -> Iterator[Page]:
    """The page of a server."""
    with opened_page(server.url, server.url) as page:
        yield page


def test_a_chat_streams_into_the_page(page: Page, server: ServerProcess) -> None:
    page.get_by_label("Most tokens").fill("40")
    page.get_by_label("Message").fill("Hello <b>world</b>")
    page.keyboard.press("Enter")
    asked, answer = page.locator(".said.user"), page.locator(".said.assistant")
    expect(asked).to_have_text("Hello <b>world</b>")
    expect(answer).to_contain_text("tokens of the prompt were cached", timeout=20_000)
    page.get_by_label("Message").fill("And?")
    page.get_by_role("button", name="Send").click()
    expect(answer.nth(1)).to_contain_text("tokens of the prompt were cached", timeout=20_000)
    page.get_by_role("button", name="New chat").click()
    expect(answer).to_have_count(0)


def test_an_answer_can_be_stopped(page: Page, server: ServerProcess) -> None:
    page.get_by_label("Most tokens").fill("1900")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Message").fill("Hello world")
    page.keyboard.press("Enter")
    expect(page.locator(".said.assistant")).not_to_be_empty()
    server.process.send_signal(signal.SIGSTOP)  # else a slow browser may find that all is said
    try:
        page.get_by_role("button", name="Stop").click()
    finally:
        server.process.send_signal(signal.SIGCONT)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.await_idle()
    page.get_by_role("button", name="New chat").click()


def test_an_error_is_shown(page: Page) -> None:
    page.get_by_label("Message").fill("Hello world " * 400)
    page.keyboard.press("Enter")
    expect(page.locator(".said.failed")).to_contain_text("max_model_len is 2048")
    page.get_by_role("button", name="New chat").click()


def test_the_tiers_are_alive(page: Page, server: ServerProcess) -> None:
    expect(page.locator("#state")).to_have_text("serving")
    expect(page.locator("#model")).to_have_text("talker")
    server.post("/v1/completions", {"prompt": [40] * 1500, "max_tokens": 4, "cache_salt": "page"})
    for tier in ("device", "host", "disk"):
        expect(page.locator(f".tier.{tier} .on").first).to_be_visible(timeout=10_000)
        expect(page.locator(f".tier.{tier} h2")).to_contain_text("pages")
    expect(page.locator("#idle")).to_have_text(re.compile(r"9\d|\d{3,}"))  # at least the 93 pages of the prompt
