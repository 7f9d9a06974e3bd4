"""Drafts change no answer, wherever pages lie and however answers are sampled; and they are as long as pays."""

import random
from itertools import count, product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import save_llama
from support.invariance import said
from support.llms import idle_engine
from support.prompts import random_prompt
from support.rules import rule_requests, save_speaking_llama

from distkv import LLM, ConfigError, EngineConfig, RequestError, SamplingParams
from distkv.engine.speculation.hit_rates import HitRates
from distkv.engine.speculation.ngram import NgramDrafter
from distkv.engine.speculation.step_cost import StepCost, draft_lengths, drafted_lengths
from distkv.engine.stats import SpeculationStats
from distkv.speculative_config import MAX_DRAFT, SpeculativeConfig
from distkv.workers.drafting.draft_model import DraftModel
from distkv.workers.runners.batch import MAX_DECODE_TOKENS

NGRAM = {"method": "ngram", "adaptive": False}
SELF = {"method": "self", "adaptive": False}
PAGE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, which soon repeats itself."""
    return save_llama(tmp_path_factory.mktemp("model"), vocab_size=20, max_position_embeddings=2048)[0]


def repeating_requests(rng: random.Random, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of a few pieces in some order, whose answers are sampled in many ways."""
    pieces = [random_prompt(rng.randint(3, 60), number, vocab_size) for number in range(3)]
    prompts, params = [], []
    for number in range(5):
        prompts.append([token for _ in range(rng.randint(1, 6)) for token in rng.choice(pieces)])
        params.append(
            SamplingParams(
                temperature=rng.choice([0, 0, 0.3, 1]), seed=number, n=rng.choice([1, 1, 3]), logprobs=3,
                max_tokens=rng.randint(1, 60), frequency_penalty=rng.choice([0, 0, 0.1]),
                stop_token_ids=[rng.randrange(vocab_size)] if rng.random() < 0.3 else None, ignore_eos=True,
            )
        )  # fmt: skip
    return prompts, params


@pytest.mark.parametrize("config", [NGRAM, SELF], ids=["ngram", "self"])
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 60))])
def test_drafts_change_no_answer(folder: Path, tmp_path: Path, config: dict[str, Any], seed: int) -> None:
    """Over all tiers and codecs; every bit of the log-probabilities is the same as well."""
    rng = random.Random(seed)
    prompts, params = repeating_requests(rng, 20)
    codec = ["auto", "int8", "auto", "int4"][seed % 4]
    common: dict[str, Any] = {"page_size": PAGE, "dtype": rng.choice(["float32", "bfloat16"]), "kv_cache_dtype": codec}
    with LLM(folder, device_kv_bytes="64MiB", host_kv_bytes="1MiB", **common) as plain:
        expected = [said(output) for output in plain.generate(prompts, params, use_tqdm=False)]
    sizes = {"device_kv_bytes": "128KiB", "host_kv_bytes": "64KiB", "disk_kv_bytes": "16MiB", "cache_dir": tmp_path}
    few = {"max_num_seqs": 9, "max_num_batched_tokens": 40, "speculative_config": config}
    with LLM(folder, **sizes, **few, **common) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [said(output) for output in outputs] == expected
        told = llm.stats().speculation
        idle_engine(llm).integrity_check()
    assert told.num_accepted_tokens
    if config is NGRAM or seed == 0:  # else all may have been resident
        assert told.num_accepted_tokens < told.num_draft_tokens


@pytest.mark.parametrize("is_same", [True, False])
def test_a_draft_model_changes_no_answer(folder: Path, tmp_path: Path, is_same: bool) -> None:
    """The model itself, which is nearly always right, and another one, which nearly never is; both over a cache with
    room for one context, where several have to read again what they have lost."""
    prompts, params = repeating_requests(random.Random(5), 20)
    params = [msgspec.structs.replace(one, frequency_penalty=0) for one in params]
    common: dict[str, Any] = {"page_size": PAGE, "dtype": "float32", "max_model_len": 500, "max_num_batched_tokens": 64}
    with LLM(folder, device_kv_bytes="64MiB", host_kv_bytes="1MiB", **common) as plain:
        expected = [said(output) for output in plain.generate(prompts, params, use_tqdm=False)]
    draft = folder if is_same else save_llama(tmp_path, vocab_size=20, max_position_embeddings=512, seed=7)[0]
    config = {"method": "draft_model", "model": str(draft), "adaptive": False}
    sizes = {"device_kv_bytes": "128KiB", "host_kv_bytes": "1MiB", "max_num_seqs": 9}
    with LLM(folder, speculative_config=config, **sizes, **common) as llm:
        assert [said(output) for output in llm.generate(prompts, params, use_tqdm=False)] == expected
        alone = llm.stats().speculation
        again = llm.generate(prompts[:1], params[:1], use_tqdm=False)
        assert said(again[0]) == expected[0]
        told = llm.stats().speculation
        idle_engine(llm).integrity_check()
    assert told.num_drafts > alone.num_drafts > 10
    assert told.acceptance_rate is not None and (told.acceptance_rate > 0.9 if is_same else told.acceptance_rate < 0.3)


def test_a_draft_model_that_fails_ends_no_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with LLM(folder, page_size=PAGE, max_model_len=500) as plain:
        expected = said(plain.generate([[5, 6, 7]], params, use_tqdm=False)[0])
    config = {"method": "draft_model", "model": str(folder), "adaptive": False}
    draft, calls = DraftModel.draft, count()

    def fails(self: DraftModel, requests: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError("no memory")
        return draft(self, requests)

    monkeypatch.setattr(DraftModel, "draft", fails)
    with LLM(folder, page_size=PAGE, max_model_len=500, speculative_config=config) as llm:
        assert said(llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]) == expected
        assert llm.stats().speculation.num_drafts == 2 and next(calls) == 3
    assert "drafts no more" in caplog.text and "no memory" in caplog.text


def test_what_is_no_draft_model(folder: Path, tmp_path: Path) -> None:
    """Another vocabulary, fewer positions, too little memory."""

    def config(path: Path, **more: Any) -> dict[str, Any]:
        return {"speculative_config": {"method": "draft_model", "model": str(path), **more}}

    other = save_llama(tmp_path / "other", vocab_size=30)[0]
    short = save_llama(tmp_path / "short", vocab_size=20, max_position_embeddings=64)[0]
    for options, message in (
        (config(other), r"has another tokenizer than .* \(vocabularies of 30 and 20 tokens\); use one"),
        (config(short), r"made for 64 positions and max_model_len is 2048; lower it"),
        (config(folder, draft_kv_bytes="100KiB"), r"draft_kv_bytes 102400, and 2048 tokens .* take \d+; raise it"),
        (config(tmp_path / "nowhere"), r"nowhere"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(folder, **options)


def test_answers_that_keep_to_rules(tmp_path: Path) -> None:
    """Grammars, words that are banned, and lengths look at tokens of which nobody knows whether they come."""
    folder = save_speaking_llama(tmp_path)
    prompts, params = zip(*rule_requests(), strict=True)
    found = []
    for config in (None, NGRAM, SELF):
        with LLM(folder, page_size=PAGE, speculative_config=config) as llm:
            found.append([said(output) for output in llm.generate(list(prompts), list(params), use_tqdm=False)])
            told = llm.stats().speculation
        assert config is None or told.num_accepted_tokens > 20
    assert found[0] == found[1] == found[2]


def test_where_all_is_resident_the_model_says_what_it_will_say(folder: Path) -> None:
    """What a step drafts is sampled as it is when it is checked. And nobody would draft like that who looks at what it
    takes."""
    rng = random.Random(7)
    prompts, params = repeating_requests(rng, 20)
    for config in (SELF, {"method": "self"}):
        with LLM(folder, page_size=PAGE, speculative_config=config) as llm:
            llm.generate(prompts, params, use_tqdm=False)
            told = llm.stats().speculation
        if config is SELF:
            assert told.num_accepted_tokens == told.num_draft_tokens > 200
            most = sum(one.n for one in params)  # tokens that a step can draft: one for each answer
            assert told.tokens_per_sweep > 4 and told.num_drafting_steps >= told.num_draft_tokens / most
        else:
            assert told == SpeculationStats()


def test_an_answer_whose_pages_are_cold_tries_drafts(folder: Path) -> None:
    """Of two tokens first, whatever is known of what they take."""
    prompt = random_prompt(600, 1, 20)
    greedy = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    few: dict[str, Any] = {"page_size": PAGE, "device_kv_bytes": "64KiB", "max_num_batched_tokens": 32}
    with LLM(folder, **few, max_num_seqs=9, speculative_config={"method": "self"}) as llm:
        llm.generate([prompt], greedy, use_tqdm=False)
        told = llm.stats().speculation
        assert llm.stats().host_pages > 30
    assert told.num_drafts and told.num_drafting_steps >= told.num_drafts


def test_pages_that_drafts_have_filled_are_found(folder: Path) -> None:
    """A conversation goes on behind an answer as if its tokens had come one by one."""
    prompt, greedy = random_prompt(40, 1, 20), SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    cached = []
    for config in (None, NGRAM):
        with LLM(folder, page_size=PAGE, speculative_config=config) as llm:
            answer = llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids
            again = llm.generate([prompt + answer + [3]], greedy, use_tqdm=False)[0]
            cached.append((again.num_cached_tokens, again.outputs[0].token_ids))
            accepted = llm.stats().speculation.num_accepted_tokens
    assert cached[0] == cached[1] and cached[0][0] == 128 and accepted > 30


def test_a_request_may_go_without(folder: Path) -> None:
    prompt = random_prompt(20, 1, 20) * 4
    with LLM(folder, page_size=PAGE, speculative_config=NGRAM) as llm:
        off = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, num_speculative_tokens=0)
        llm.generate([prompt], off, use_tqdm=False)
        assert llm.stats().speculation.num_drafts == 0
        few = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, num_speculative_tokens=2)
        llm.generate([prompt], few, use_tqdm=False)
        told = llm.stats().speculation
        assert told.num_drafts and told.num_draft_tokens <= 2 * told.num_drafts
    with (
        LLM(folder, page_size=PAGE) as llm,
        pytest.raises(RequestError, match=r"no speculative_config; .*leave it out"),
    ):
        llm.generate([prompt], few, use_tqdm=False)


def test_the_longest_draft_attends_as_an_answer_does() -> None:
    assert MAX_DRAFT + 1 == MAX_DECODE_TOKENS


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speculative_config": "ngram"}, r"give an object such as"),
        ({"speculative_config": {"method": "eagle"}}, r"method 'eagle'; use one of ngram"),
        ({"speculative_config": {"method": "ngram", "tokens": 3}}, r"unknown field `tokens`"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 8}}, r"tokens 8; .* from 1 to 7"),
        (
            {"speculative_config": {"method": "ngram", "prompt_lookup_min": 9, "prompt_lookup_max": 8}},
            r"min 9; .* from 1 to 8",
        ),
        ({"speculative_config": {"method": "ngram", "model": "m"}}, r"model, which goes with method draft_model"),
        ({"speculative_config": {"method": "draft_model"}}, r'name its folder, "model"'),
        ({"speculative_config": {**SELF, "prompt_lookup_max": 9}}, r"goes with method ngram and not self; leave it"),
        ({"speculative_config": SELF, "host_kv_bytes": 0}, r"none leaves the device; use ngram"),
        ({"speculative_config": NGRAM, "max_num_seqs": 7}, r"raise max_num_seqs to 8"),
        ({"speculative_config": NGRAM, "batch_invariant": False}, r"drafts could change answers; leave one"),
        ({"speculative_config": NGRAM, "attention_policy": "decay(share=0.1)"}, r"in vain would count; leave one"),
    ],
)
def test_what_is_no_way_to_draft(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig("m", **options)


def test_a_draft_is_what_followed_the_longest_match() -> None:
    """Against a search from the definition."""

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.integers(1, 4), st.integers(0, 4), st.data())
    def check(tokens: list[int], least: int, more: int, data: st.DataObject) -> None:
        config = SpeculativeConfig(method="ngram", prompt_lookup_min=least, prompt_lookup_max=least + more)
        drafter = NgramDrafter(config, HitRates())
        drafter.read(tokens)
        end = len(tokens)
        best = (0, 0)
        for place in range(1, end):
            agreed = 0
            while agreed < min(place, least + more) and tokens[place - 1 - agreed] == tokens[end - 1 - agreed]:
                agreed += 1
            best = max(best, (agreed, place))
        expected = list(tokens)
        for index in range(8 if best[0] >= least else 0):
            expected.append(expected[best[1] + index])
        assert drafter.draft(8) == expected[end:]
        assert len(drafter.chances(8)) == len(expected) - end
        # and where it told of what came, it goes on along the same place
        if drafter.draft(8):
            came = drafter.draft(data.draw(st.integers(1, 8)))
            drafter.read(tokens + came)
            assert drafter.draft(1) == expected[end + len(came) : end + len(came) + 1] or len(came) == 8

    check()


def test_chances_follow_what_came() -> None:
    """Where quotes go on they are taken for likely, and where they break off they are not."""
    config = SpeculativeConfig(method="ngram")
    all_answers = HitRates()
    quoting, free = NgramDrafter(config, all_answers), NgramDrafter(config, HitRates())
    text = random_prompt(200, 1, 5000)
    tokens = text + text[:2]
    for index in range(2, 100):
        quoting.read(tokens)
        tokens.append(text[index])
    quoting.read(tokens)
    assert quoting.chances(8)[-1] > 0.8
    words = list(text)
    for number in range(40):
        words += [*text[10 + number : 12 + number], 6000 + number]  # two words of it, and then something else
        free.read(words[:-1])
        free.read(words)
    free.read([*words, *text[90:92]])
    assert free.chances(1)[0] < 0.2
    newcomer = NgramDrafter(config, all_answers)
    newcomer.read(text + text[:40])
    assert newcomer.chances(1)[0] > 0.5, "it begins with what others have met"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=3), min_size=1, max_size=3), st.floats(0, 0.5),
    st.integers(0, 5), st.integers(0, 2), st.floats(0, 0.5), st.floats(0, 0.5),
)  # fmt: skip
def test_lengths_of_drafts_are_the_best(
    rates: list[list[float]], slope: float, most: int, others: int, begin: float, each: float
) -> None:
    """Against all there are: no other lengths bring more tokens a second."""
    chances = [np.cumprod(own).tolist() for own in rates]
    count = len(chances) + others

    def speed(lengths: Any) -> float:
        tokens = count + sum(sum(own[:length]) for own, length in zip(chances, lengths, strict=True))
        return tokens / (1 + slope * sum(lengths) + (begin + each * sum(lengths) if any(lengths) else 0))

    found = draft_lengths(chances, count, (1.0, slope), (begin, each), most)
    every = product(*(range(len(own) + 1) for own in chances))
    assert sum(found) <= most
    assert speed(found) >= max(speed(one) for one in every if sum(one) <= most) - 1e-9


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8), st.floats(0, 0.3), st.floats(0, 1), st.floats(0, 0.3),
    st.integers(0, 9),
)  # fmt: skip
def test_lengths_of_drafts_that_take_steps(
    rates: list[float], slope: float, step: float, row: float, most: int
) -> None:
    """Against all there are. Where a step that drafts takes as long as one that checks, there is none."""
    rates = sorted(rates, reverse=True)
    chances = np.cumprod(rates).tolist()

    def speed(length: int) -> float:
        drafting = sum(step + row * place for place in range(length))
        return (1 + sum(chances[:length])) / (1 + slope * length + drafting)

    [found] = drafted_lengths([chances], 1, (1.0, slope), (step, row), most)
    assert found <= most and speed(found) >= max(map(speed, range(min(most, len(chances)) + 1))) - 1e-9
    assert drafted_lengths([chances], 1, (1.0, slope), (1.0, row), most) == [0]
    # two answers share the steps that draft: both have drafts where one alone would not
    assert drafted_lengths([[0.7], [0.7]], 2, (1.0, 0.0), (0.6, 0.0), most) == [[0, 0], [0, 0], [1, 1]][min(most, 2)]
    assert drafted_lengths([[0.7]], 1, (1.0, 0.0), (0.8, 0.0), most) == [0]


def test_cost_of_a_step() -> None:
    """A line through what steps took, soon of the newest ones; what is not known is guessed."""
    cost = StepCost()
    for number in range(30):
        cost.note(number % 5, 2.0 + 0.25 * (number % 5))
    base, slope = cost.line()
    assert base == pytest.approx(2.0, abs=0.02) and slope == pytest.approx(0.25, abs=0.02)
    for number in range(100):
        cost.note(number % 5, 8.0 + 0.5 * (number % 5))
    base, slope = cost.line()
    assert base == pytest.approx(8.0, abs=0.2) and slope == pytest.approx(0.5, abs=0.1)
    cost.note(0, 1000.0)  # the process was held up
    assert cost.line()[0] < 14
    alone = StepCost()
    for _ in range(30):
        alone.note(0, 3.0)
    base, slope = alone.line()
    assert base == pytest.approx(3.0) and 0 < slope < 1
