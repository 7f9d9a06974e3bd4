"""`distkv bench cache` on a model so small that its times mean nothing: work is counted, answers are compared."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from distkv.bench import cache
from distkv.bench.cache_variants import CONCATENATED, NO_CACHE, PAGED, VARIANTS, Concatenated, Counted, SmallModel
from distkv.commands.main import app
from distkv.errors import ConfigError

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # of the tiny model: 2 layers, 2 KV heads of 16, fp32


def run(model: Path, tmp_path: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    figures = tmp_path / "figures.json"
    sizes = ("--length", "20", "--length", "5", "--page-size", "16", "--repeats", "1", "--json", str(figures))
    result = CliRunner().invoke(app, ["bench", "cache", "--model", str(model), *sizes, *arguments])
    return result, json.loads(figures.read_text())


def test_rows_are_counted_and_answers_are_equal(tiny_model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    result, written = run(tiny_model, tmp_path, "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG") and written["wrong"] is None
    rows = {(row["cache"], row["tokens"]): row for row in written["rows"]}
    assert {key: row["attention_rows"] for key, row in rows.items()} == {
        (NO_CACHE, 5): 15, (CONCATENATED, 5): 5, (PAGED, 5): 5,
        (NO_CACHE, 20): 210, (CONCATENATED, 20): 20, (PAGED, 20): 20,
    }  # fmt: skip
    # the second token copies one, the third two, and so on
    assert rows[CONCATENATED, 20]["copied_bytes"] == TOKEN_BYTES * sum(range(20))
    assert rows[NO_CACHE, 20]["copied_bytes"] == rows[PAGED, 20]["copied_bytes"] == 0
    assert all(len(times) == 20 and min(times) > 0 for times in written["position_ms"].values())
    assert "same 20 tokens" in result.output.replace("\n", " ")


def test_variants_agree_with_each_other(tiny_model: Path) -> None:
    """Over the end of a page, and the logits of the page in every bit."""
    with closing(SmallModel(tiny_model, 20, 16)) as model:
        none, concatenated, paged = (model.decode(name, 7, 20, keeps_logits=True) for name in VARIANTS)
        assert model.is_exact
    assert none.tokens == concatenated.tokens == paged.tokens and len(set(paged.tokens)) > 3
    assert all(map(torch.equal, none.logits, paged.logits))
    torch.testing.assert_close(torch.stack(concatenated.logits), torch.stack(paged.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["rows", "tokens", "logits"])
def test_what_is_wrong_is_said(what: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "rows":  # of an attention that is called twice as often
        attend = Counted.attend
        monkeypatch.setattr(Counted, "attend", lambda *arguments: (attend(*arguments), attend(*arguments))[1])
        monkeypatch.setattr(cache, "compare", lambda *arguments: ("", "equal"))
        words = "no cache took 30 rows of attention for 5 tokens, and not 15"
    else:
        factor = {"tokens": -30.0, "logits": 1.01}[what]
        attend = Concatenated.attend
        monkeypatch.setattr(Concatenated, "attend", lambda *arguments: attend(*arguments) * factor)
        words = {"tokens": "torch.cat and paged draw other tokens", "logits": "differ"}[what]
    result, written = run(tiny_model, tmp_path)
    assert result.exit_code == 1 and words in written["wrong"]
    assert "WRONG: " + words[:20] in result.output or "WRONG: logits of torch.cat and paged" in result.output


def test_lengths_beyond_the_model_are_refused(tiny_model: Path) -> None:
    for length in ("0", "257"):
        result = CliRunner().invoke(app, ["bench", "cache", "--model", str(tiny_model), "--length", length])
        assert isinstance(result.exception, ConfigError) and "from 1 to 256" in str(result.exception)
