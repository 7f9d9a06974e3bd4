"""`distkv bench quality`: its questions have answers, and its figures are those of a plain computation."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from support.checkpoints import edit_config, save_llama
from support.prompts import random_prompt
from support.tokenizers import save_tokenizer
from torch.nn.functional import kl_div, log_softmax
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from distkv.bench.quality.answers import Answers
from distkv.bench.quality.divergence import divergence, perplexity
from distkv.bench.quality.quality import compare
from distkv.bench.quality.questions import make_questions
from distkv.bench.quality.tasks import KEYS, QUICK_TASKS, TASKS, Question, Task, split_sentences, take_words
from distkv.bench.quality.variants import Variant, parse_row, with_references
from distkv.commands.main import app
from distkv.errors import ConfigError
from distkv.frontend.tokenizer import Tokenizer
from distkv.workers.sampling.sampled_token import TokenLogprobs

FILLER = "The sky is as it was. Nobody has seen what came of it; some went on: others did not. That is all of it."
EXACT = "dtype=float32; page_size=16"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_are_in_the_texts(task: Task) -> None:
    sentences = split_sentences(FILLER)
    asked = task.questions(sentences, 1.3, seed=1)
    assert asked == task.questions(sentences, 1.3, seed=1) != task.questions(sentences, 1.3, seed=2)
    assert len({one.prompt for one in asked}) >= task.num_texts and len(set(asked)) == len(asked)
    for one in asked:
        words = len(one.prompt.split())
        assert task.num_tokens / 1.3 - 60 < words < task.num_tokens / 1.3 + 100
        for expected in one.expected:
            assert one.prompt.count(expected) >= 1 and expected not in one.lead
        right = " and ".join(one.expected)
        assert (one.score(f" {right}.\nmore"), one.score(f" none of it\n{right}"), one.score("")) == (1, 0, 0)
    assert Question("", "", "", ("a1", "b2")).score("\n b2") == 0.5


def test_needles_lie_at_all_depths() -> None:
    [needle] = (task for task in TASKS if task.name == "needle")
    places = []
    for one in needle.questions(split_sentences(FILLER), 1.3, seed=1):
        [key] = (key for key in KEYS if key in one.lead)
        text = one.prompt.partition("\n")[2].rpartition("\n")[0]
        places.append(text.index(f"numbers for {key} is: {one.expected[0]}.") / len(text))
    assert places == sorted(places) and places[0] < 0.01 and places[-1] > 0.98


def test_texts_have_the_words_that_they_should() -> None:
    assert take_words(["a b.", "c."], 7) == ["a b.", "c.", "a b.", "c."]


def listed(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    logprobs = log_softmax(logits.double(), dim=-1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprobs(float(logprobs[token]), 1, list(zip(ids.tolist(), values.tolist(), strict=True)))


def test_a_divergence_of_listed_tokens_is_never_too_large() -> None:
    """And is the divergence itself where all are listed."""
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 0.1, 1.0):
        for token in (0, 39):
            exact = 2 * torch.randn(40, generator=generator)
            other = exact + scale * torch.randn(40, generator=generator)
            whole = float(kl_div(log_softmax(other, -1), log_softmax(exact, -1), reduction="sum", log_target=True))
            found = [divergence(token, listed(exact, token, n), listed(other, token, n)) for n in (1, 20, 40)]
            assert all(0 <= one <= whole + 1e-5 for one in found)
            assert found[-1] == pytest.approx(whole, rel=1e-3, abs=1e-5)
            assert found[1] > whole / 4
            assert divergence(token, listed(exact, token, 20), listed(exact, token, 20)) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    return save_llama(tmp_path_factory.mktemp("model"))


def test_perplexity_is_that_of_transformers_and_codes_lose_some(model: tuple[Path, LlamaForCausalLM]) -> None:
    """Of tokens that an engine is given as an answer; the fewer bits, the more is lost."""
    folder, reference = model
    text = random_prompt(150, seed=1)
    with torch.inference_mode():
        logprobs = log_softmax(reference(torch.tensor([text])).logits[0].double(), dim=-1)
    own = [float(logprobs[place, token]) for place, token in enumerate(text[1:])]
    rows = {}
    for name in (EXACT, f"{EXACT}; kv_cache_dtype=int8", f"{EXACT}; kv_cache_dtype=int4"):
        with Answers(folder, parse_row(name), 200, 1) as engine:
            scores = engine.score(text, 40)
            rows[name] = scores
    assert [one.logprob for one in rows[EXACT]] == pytest.approx(own[39:], abs=1e-4)
    assert perplexity(rows[EXACT]) == pytest.approx(math.exp(-sum(own[39:]) / 110), rel=1e-4)
    found = [compare({"x": text[40:]}, {"x": rows[EXACT]}, {"x": scores}) for scores in rows.values()]
    assert found[0]["divergence"] == found[0]["added"] == 0
    assert 0 < 3 * found[1]["divergence"] < found[2]["divergence"] and found[1]["added"] != 0
    assert len(found[2]["divergence_by_position_x"]) == 7 and min(found[2]["divergence_by_position_x"]) > 0


def test_rows_are_options_and_come_behind_what_they_are_compared_with() -> None:
    fast = parse_row(" attention_policy = top_pages(share=0.10) ;page_size=64")
    assert fast == Variant("auto", "auto", "top_pages(share=0.1)", 64) and fast.name == "top_pages(share=0.1)"
    assert [one.name for one in with_references(["kv_cache_dtype=int4", "full", "dtype=float32"])] == [
        "full", "int4", "float32"
    ]  # fmt: skip
    twice = "page_size=16; page_size=64"
    for wrong in ("int4", "page_size=48", "page_size=x", "seed=1", "kv_cache_dtype=int5", "", twice):
        with pytest.raises(ConfigError, match=r"--row|page_size|kv_cache_dtype"):
            parse_row(wrong)


def test_the_command_measures_a_text_of_ones_own(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path / "model", vocab_size=300, max_position_embeddings=16384)
    save_tokenizer(folder, "byte level")
    text, figures, plot = tmp_path / "own.txt", tmp_path / "figures.json", tmp_path / "plot.png"
    text.write_text(FILLER * 20, encoding="utf-8")
    sizes = ("--quick", "--text-tokens", "600", "--read-tokens", "100", "--shape", "tiny", "--context", "4096")
    rows = ("--row", "attention_policy=sink_window(sinks=1, window=64); page_size=64", "--row", "page_size=16")
    files = ("--model", str(folder), "--text", str(text), "--json", str(figures), "--plot", str(plot))
    result = CliRunner().invoke(app, ["bench", "quality", *sizes, *rows, *files])
    assert result.exit_code == 0, result.exception or result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    full, window, small_pages = json.loads(figures.read_text())["rows"]
    for one in (full, small_pages):
        assert (one["name"], one["added"], one["divergence"], one["read_share"]) == ("full", 0, 0, 1)
    assert full["perplexity_own.txt"] != small_pages["perplexity_own.txt"]
    assert window["divergence"] > 0.01 and 0.02 < window["read_share"] < 0.05  # 2 or 3 of 65 pages
    assert window["host_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    endless = Tokenizer(folder).encode("no end " * 400)  # so that no text is made of it, and each needle found
    with pytest.raises(ConfigError, match="sentences are too long for needle, which wants texts of 1800 tokens"):
        make_questions(folder, {"endless": endless}, QUICK_TASKS)
    edit_config(folder, lambda raw: raw.update(max_position_embeddings=900))
    short = tmp_path / "short.txt"
    short.write_text("It is.", encoding="utf-8")
    for wrong, words in (
        (("--text-tokens", "20000"), "less than 900"),
        (("--read-tokens", "594"), "use 7 less at least"),
        (("--text", str(short)), "has 6 tokens; name a text of 107 at least, or lower --read-tokens"),
        (("--text", "/none"), "cannot be read"),
        (("--text", str(text)), "needle takes [0-9]+ tokens, and the model has 900 positions"),
    ):
        result = CliRunner().invoke(app, ["bench", "quality", "--model", str(folder), *sizes, *wrong])
        assert isinstance(result.exception, ConfigError) and re.search(words, str(result.exception))
