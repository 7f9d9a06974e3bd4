"""A page in a real browser."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Error, Page, expect, sync_playwright

EXPECTED = "status of 400", "status of 502"  # of requests that are refused, or that a test has fail
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def opened_page(url: str, *servers: str) -> Iterator[Page]:
    """A page that asks nobody but these servers; what its console complains of, but for `EXPECTED`, fails the test.
    Skips it where there is no browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser is installed; 'apt-get install chromium' brings one")
    with sync_playwright() as playwright:
        try:
            # in a container there may be no user namespace for its sandbox
            opened = playwright.chromium.launch(
                executable_path=browser, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except Error as error:
            pytest.skip(f"{browser} does not start here: {error.message.splitlines()[0]}")
        expect.set_options(timeout=60_000)
        page = opened.new_page(viewport={"width": 1280, "height": 800})
        complaints: list[str] = []
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(servers) else None)
        page.goto(url)
        yield page
        assert not [one for one in complaints if not any(map(one.__contains__, EXPECTED)) and one[:5] != "data:"]
        opened.close()
