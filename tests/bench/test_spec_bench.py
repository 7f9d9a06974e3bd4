"""`distkv bench spec` on a model so small that its times mean nothing: answers are compared, bytes counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.rules import save_speaking_llama
from typer.testing import CliRunner, Result

from distkv.bench.speculation.decoding import Decoded, Place, SpeculatingEngine
from distkv.bench.speculation.speculation import make_row
from distkv.bench.speculation.tasks import TASKS, Prompt
from distkv.commands.main import app
from distkv.engine.stats import SpeculationStats
from distkv.errors import ConfigError
from distkv.frontend.tokenizer import Tokenizer

PAGE, CONTEXT, NEW_TOKENS = 16, 512, "48"
PAGE_BYTES = 2 * 2 * 2 * 16 * 2 * PAGE  # of the small model: 2 layers, 2 KV heads of 16, bf16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking_llama(tmp_path_factory.mktemp("model"))


def run(model: Path, tmp_path: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    figures = tmp_path / "figures.json"
    sizes = ("--context", str(CONTEXT), "--page-size", str(PAGE), "--new-tokens", NEW_TOKENS, "--repeats", "1")
    given = ("--model", str(model), *sizes, "--cache-dir", str(tmp_path), "--json", str(figures))
    result = CliRunner().invoke(app, ["bench", "spec", *given, *arguments])
    return result, json.loads(figures.read_text()) if figures.exists() else {}


def test_what_lies_below_is_streamed_once_a_step(model: Path, tmp_path: Path) -> None:
    result, written = run(model, tmp_path, "--task", "quote", "--task", "chat", "--method", "ngram")
    assert result.exit_code == 0 and written["wrong"] is None, result.output
    rows = {(row["place"], row["task"]): row for row in written["rows"]}
    assert list(dict.fromkeys(place for place, _ in rows)) == [
        "all on device", "50 % on host", "95 % on host", "50 % on disk", "95 % on disk"
    ]  # fmt: skip
    for (place, task), row in rows.items():
        [steps], pages = row["steps"], {0: 0, 50: 16, 95: 30}[row["share_below"]]
        taken = row["streamed_bytes_per_token"] * 47 / steps
        # pages of the answer are on the device, and where there are fewer of them yet, so is more of the text
        for per_step in (row["plain_streamed_bytes_per_token"], taken):
            assert (pages - 5) * PAGE_BYTES <= per_step <= pages * PAGE_BYTES, place
        assert (row["target"] is None) is (task == "quote" and "disk" not in place)
    assert any(row["num_accepted_tokens"] for row in rows.values())
    assert "All 48 tokens of each answer are the same" in result.output.replace("\n", " ")


def test_answers_that_differ_are_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts, beside those without; and at one place beside another."""
    answer = SpeculatingEngine.answer

    def differs_with(wanted: str) -> None:
        def changed(engine: SpeculatingEngine, prompt: Prompt, num_tokens: int, drafts: bool) -> Any:
            one = answer(engine, prompt, num_tokens, drafts)
            is_hit = drafts if wanted == "drafts" else engine.place.share > 0 and num_tokens > 5
            return replace(one, tokens=[*one.tokens[:5], one.tokens[5] ^ 1, *one.tokens[6:]]) if is_hit else one

        monkeypatch.setattr(SpeculatingEngine, "answer", changed)

    for wanted, where in (
        ("drafts", "all on device, ngram: 'chat' differs in turn 0 with drafts ngram from token 5 on"),
        ("below", "50 % on host, ngram: 'chat' differs in turn 0 with drafts none from token 5 on"),
    ):
        differs_with(wanted)
        below = ("--below", "0", "--below", "50", "--tier", "host")
        result, written = run(model, tmp_path, "--task", "chat", "--method", "ngram", *below)
        assert result.exit_code == 1 and where in written["wrong"]


def test_targets_and_quotes() -> None:
    """Ratios are those of turns beside each other, and a quotation ends where it first differs."""
    quote, chat = (Prompt(task, [1], [5, 6, 7, 8]) for task in TASKS if task.name in ("quote", "chat"))
    assert quote.quoted([5, 6, 7, 8]) == 1 and quote.quoted([5, 6, 0, 8]) == 0.5 and chat.quoted([5]) is None

    def turns(*seconds: float) -> list[Decoded]:
        return [Decoded([5, 6, 0, 0], one, 2, 30, 60, None, SpeculationStats(1, 4, 1)) for one in seconds]

    disk = Place("disk", 95)
    row = make_row(disk, "ngram", quote, turns(4, 9, 2), turns(2, 3, 2))
    assert row["ratio"].median == 2 and row["verdict"] == "2x met" and row["quoted"] == 0.5
    assert (row["accepted"], row["tokens_per_sweep"], row["streamed_bytes_per_token"]) == (0.25, 2, 30)
    assert make_row(disk, "ngram", quote, turns(2), turns(1.01))["verdict"] == "2x MISSED"
    assert make_row(disk, "ngram", chat, turns(2), turns(2.2))["verdict"] == "0.95x MISSED"
    assert make_row(Place("host", 95), "ngram", quote, turns(2), turns(2))["verdict"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--context", "500"), "500 is not a whole number of pages of 16 tokens, at least 4; use 512"),
        (("--context", "1024"), r"question and answer take \d+ tokens and the model has 1024 positions"),
        (("--new-tokens", "100"), r"passage of 'quote the end' has \d+ tokens and new-tokens is 100; lower it"),
        (("--method", "draft_model"), "--method is 'draft_model'; use one of ngram"),
        (("--method", "self", "--below", "0"), "--below a share above 0"),
        (("--task", "sing"), "--task is 'sing'; use one of quote"),
        (("--below", "99"), "--below is 99; use a percentage from 0 to 95"),
    ],
)
def test_what_cannot_be_measured(arguments: tuple[str, ...], message: str, model: Path, tmp_path: Path) -> None:
    result, _ = run(model, tmp_path, *arguments)
    with pytest.raises(ConfigError, match=message):
        assert result.exception is not None
        raise result.exception


def test_questions_can_be_read(model: Path) -> None:
    assert all(Tokenizer(model).encode(task.question) for task in TASKS)
