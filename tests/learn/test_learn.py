"""The report on a small random model: it is made of what was measured, and needs no other file."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.browsers import opened_page
from support.checkpoints import save_llama

from distkv.bench import cache, decoder
from distkv.bench.options import BenchOptions
from distkv.errors import ConfigError, DistKVError
from distkv.learn import report
from distkv.learn.measure import Measured, Sizes, plan_for
from distkv.learn.run import run

TINY = Sizes(
    (4, 12), requests=20, max_model_len=128, gqa_context=64, gqa_shape="tiny", offload_context=128, offload_tokens=2,
    page_size=32, offload_page_size=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measured]:
    """A report, and what it was made of."""
    folder = tmp_path_factory.mktemp("learn")
    model, _ = save_llama(folder / "model", max_position_embeddings=512)
    kept: list[Measured] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "PAUSE", 0.01)
        figures = report._figures
        patch.setattr(report, "_figures", lambda measured: (kept.append(measured), figures(measured))[1])
        run(model, folder / "learn.html", 1, BenchOptions(repeats=1), TINY)
    return folder / "learn.html", kept[0]


class Elements(HTMLParser):
    """What a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(path: Path) -> Elements:
    elements = Elements()
    elements.feed(path.read_text())
    elements.text = " ".join(elements.text.split())
    return elements


def test_figures_are_those_of_the_run(made: tuple[Path, Measured]) -> None:
    path, measured = made
    text = parsed(path).text
    facts = measured.cache.facts
    assert facts["machine"] in text and facts["date"] in text and "with 1 thread," in text
    assert "counted 78 rows" in text and "took 12 rows" in text  # 12 * 13 / 2
    for bench, field in (
        (measured.cache, "tokens_per_s"), (measured.paging, "running"), (measured.gqa, "long_ms"),
        (measured.offload, "decode_ms_per_token"),
    ):  # fmt: skip
        rows = [row for row in bench.rows if field in row]
        assert len(rows) >= 3
        for row in rows:
            assert report._spread(row[field]) in text, (bench.facts["benchmark"], row)
    assert "in a single turn" in text and "Chapters 1 and 2" not in text and "the planner expects" in text
    assert "256 bytes per token" in text  # 2 layers, 2 KV heads of 16, bf16
    assert "in every bit" in text and "computed, not measured" in text


def test_a_gpu_is_not_called_a_cpu(made: tuple[Path, Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    _, measured = made
    monkeypatch.setitem(measured.offload.facts, "machine", "NVIDIA X")
    text = " ".join(report.render(measured).split())
    assert "Measured on NVIDIA X with" in text and "Chapters 1 and 2 were measured on its CPU" in text
    assert 'the "device" is the CPU' not in text and "the planner expects" not in text


def test_the_page_needs_no_other_file(made: tuple[Path, Measured]) -> None:
    path, _ = made
    elements = parsed(path)
    names = {name for _, attributes in elements.tags for name in attributes}
    assert not {tag for tag, _ in elements.tags} & {"script", "link", "iframe"} and "srcset" not in names
    targets = [attributes[name] for _, attributes in elements.tags for name in ("src", "href") if name in attributes]
    assert targets and all(value and value.startswith(("data:image/svg+xml;base64,", "#")) for value in targets)
    anchors = {attributes.get("id") for _, attributes in elements.tags}
    assert all(value[1:] in anchors for value in targets if value and value.startswith("#"))
    assert not re.search(r"url\(|@import", path.read_text())
    pictures = [attributes for tag, attributes in elements.tags if tag == "img"]
    assert len(pictures) == 4 and all(one["alt"] for one in pictures)


def test_a_browser_shows_it(made: tuple[Path, Measured]) -> None:
    path, _ = made
    with opened_page(path.as_uri(), path.as_uri(), "data:") as page:
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 300)")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_what_is_wrong_is_not_explained(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any) -> str:
        return "they differ"

    monkeypatch.setattr(cache, "measure", measure)
    with pytest.raises(DistKVError, match="bench cache: they differ"):
        run(tiny_model, tmp_path / "x.html", 1, BenchOptions(repeats=1), TINY)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be written"):
        run(tiny_model, tmp_path / "no" / "x.html", 1, BenchOptions(repeats=1), TINY)


def test_sizes_keep_to_the_positions_of_the_model() -> None:
    small = Sizes().within(2048)
    assert (small.max_model_len, small.offload_context) == (2048, 1792), "with a page for the answer"
    assert Sizes().within(8192) == Sizes()


def test_planned_requests_are_those_that_fit() -> None:
    """The published arithmetic of Llama-3-8B on 80 GB: a request of 128k tokens is 16 GiB."""
    planned = plan_for(131072)
    assert planned.on_device.fit.kv_bytes_per_request == 16 * 2**30
    assert planned.on_device.fits and planned.on_device.fit.running in (3, 4)
    assert planned.with_host.fits and planned.with_host.fit.running == planned.on_device.fit.running + 16
    assert planned.with_host.decode is not None and planned.on_device.decode is not None
    assert planned.with_host.decode.limit == "host link"
    assert planned.with_host.decode.seconds > 100 * planned.on_device.decode.seconds
