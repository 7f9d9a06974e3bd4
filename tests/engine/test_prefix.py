"""Prefix caching as a user meets it: what is found again, where, and after which events; and never a changed bit."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from msgspec.structs import astuple
from support.checkpoints import edit_config
from support.collisions import collide
from support.damage import damages, flip_bit
from support.llms import PAGE_SIZE, idle_engine, tiered
from support.prompts import random_prompt
from torch import Tensor

from distkv import LLM, SamplingParams
from distkv.engine.protocol import TokenOutput
from distkv.outputs import RequestOutput
from distkv.storage.disk.catalogue import Catalogue
from distkv.storage.ledger.prefix_index import page_keys, root_key
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.rank import Rank

PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=5)


def ask(llm: LLM, prompt: list[int], params: SamplingParams = PARAMS, salt: str | None = None) -> RequestOutput:
    """Answers one prompt and waits until nothing moves any more."""
    [output] = llm.generate([prompt], params, cache_salt=salt, use_tqdm=False)
    assert output.error is None
    idle_engine(llm).integrity_check()
    return output


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def tiers(output: RequestOutput) -> tuple[int, int, int]:
    """Pages found on device, host and disk."""
    by_tier = output.num_cached_tokens_by_tier
    assert output.num_cached_tokens == sum(by_tier.values())
    device, host, disk = (by_tier[tier] for tier in ("device", "host", "disk"))
    assert device % PAGE_SIZE == host % PAGE_SIZE == disk % PAGE_SIZE == 0
    return device // PAGE_SIZE, host // PAGE_SIZE, disk // PAGE_SIZE


def cached(llm: LLM, prompt: list[int], salt: str | None = None) -> int:
    """Pages of a prompt that are found."""
    return sum(tiers(ask(llm, prompt, SamplingParams(temperature=0, max_tokens=1), salt)))


def listed(folder: Path) -> int:
    """Pages in the catalogue."""
    with closing(Catalogue(folder, read_only=True)) as catalogue:
        return len(catalogue.entries())


# --- where a prefix is found ---

FIRST = random_prompt(170)
SECOND = FIRST[:165] + random_prompt(30, 2)
COMMON = 160 // PAGE_SIZE


@dataclass(frozen=True)
class Hit:
    """What a request with a known prefix got."""

    tiers: tuple[int, int, int]
    logits: list[Tensor]
    output: RequestOutput


def hit(
    folder: Path, pages: tuple[int, int, int], fill: int, cache_dir: Path, restart: bool = False, **options: Any
) -> Hit:
    """FIRST, then `fill` tokens of something else, then SECOND."""
    logits: list[Tensor] = []
    llm = tiered(folder, pages, cache_dir, **options)
    try:
        assert tiers(ask(llm, FIRST)) == (0, 0, 0)
        if fill:
            ask(llm, random_prompt(fill, 3))
        if restart:
            llm.close()
            llm = tiered(folder, pages, cache_dir, **options)
        with pytest.MonkeyPatch.context() as patch:
            execute = Rank.execute

            def spy(self: Rank, plan: StepPlan, drawn: Tensor | None) -> Tensor | None:
                result = execute(self, plan, drawn)
                if result is not None and len(result):
                    logits.append(result.clone())
                return result

            patch.setattr(Rank, "execute", spy)
            output = ask(llm, SECOND)
        return Hit(tiers(output), logits, output)
    finally:
        llm.close()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_hits_are_equal_in_every_tier(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Whole pages are found, wherever they lie, and what follows is the same bit for bit; in fp32 it is what a run
    without them answers."""
    options = {"dtype": dtype}
    share = 2 if dtype == "bfloat16" else 1  # the sizes are in pages of fp32

    def case(name: str, pages: tuple[int, int, int], fill: int, restart: bool = False) -> Hit:
        sizes = -(-pages[0] // share), -(-pages[1] // share), pages[2]
        return hit(folder, sizes, fill, tmp_path / name, restart, **options)

    device = case("device", (200, 0, 0), 0)
    assert device.tiers == (COMMON, 0, 0)
    others = {
        "host": case("host", (8, 100, 0), 200),
        "disk": case("disk", (8, 6, 100), 600),
        "mixed": case("mixed", (24, 20, 100), 250),
        "after a restart": case("restart", (8, 6, 100), 0, restart=True),
    }
    assert others["host"].tiers == (0, COMMON, 0)
    assert others["disk"].tiers == others["after a restart"].tiers == (0, 0, COMMON)
    mixed = others["mixed"].tiers
    assert sum(mixed) == COMMON and sum(count > 0 for count in mixed) >= 2, mixed
    for name, other in others.items():
        assert len(other.logits) == len(device.logits) == PARAMS.max_tokens
        assert all(torch.equal(*pair) for pair in zip(other.logits, device.logits, strict=True)), name
        assert other.output.outputs == device.output.outputs
    with tiered(folder, (200, 0, 0), enable_prefix_caching=False, dtype=dtype) as llm:
        fresh = ask(llm, SECOND)
    assert tiers(fresh) == (0, 0, 0)
    if dtype == "float32":
        assert tokens(fresh) == tokens(device.output)
        for mine, theirs in zip(device.output.outputs[0].logprobs or [], fresh.outputs[0].logprobs or [], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4) for token in mine)


def test_the_last_token_of_a_prompt_is_run(folder: Path) -> None:
    """Its logits are needed; so of a prompt that ends with a page, that page is computed again."""
    prompt = random_prompt(64)
    with tiered(folder, (60, 0, 0)) as llm:
        first = ask(llm, prompt)
        assert tiers(first) == (0, 0, 0)
        for length, pages in ((64, 3), (65, 4), (63, 3), (49, 3), (48, 2), (17, 1), (16, 0), (1, 0)):
            assert cached(llm, (prompt + tokens(first))[:length]) == pages
        assert tokens(ask(llm, prompt)) == tokens(first)
        other = [prompt[0] % 100 + 4, *prompt[1:]]
        assert cached(llm, other) == 0, "a page is found behind its own past only"
        assert cached(llm, prompt[16:]) == 0, "and at its own place only"


def test_a_follow_up_finds_the_answer_too(folder: Path, tmp_path: Path) -> None:
    """Pages that filled while decoding; the last token drawn was never run."""
    prompt = random_prompt(50)
    for cache_dir in (tmp_path / "cache", tmp_path / "other"):
        with tiered(folder, (60, 60, 60), cache_dir) as llm:
            answer = tokens(ask(llm, prompt, SamplingParams(temperature=0, max_tokens=47, ignore_eos=True)))
            assert len(prompt + answer) == 97
            if cache_dir.name == "cache":
                assert cached(llm, prompt + answer + [5] * 20) == 96 // PAGE_SIZE
                assert cached(llm, prompt + answer[:40] + [4, 4]) == 90 // PAGE_SIZE
        with tiered(folder, (60, 60, 60), cache_dir) as llm:
            output = ask(llm, prompt + answer + [5] * 20)
            assert tiers(output) == (0, 0, (117 if cache_dir.name == "cache" else 96) // PAGE_SIZE)
        with tiered(folder, (60, 0, 0)) as llm:
            assert tokens(ask(llm, prompt + answer + [5] * 20)) == tokens(output)


def test_requests_at_the_same_time_share_what_is_known(folder: Path) -> None:
    with tiered(folder, (80, 0, 0)) as llm:
        ask(llm, FIRST)
        prompts = [FIRST[:100] + random_prompt(20, seed) for seed in range(5, 9)]
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        assert [output.num_cached_tokens for output in outputs] == [96] * 4
        assert llm.stats().peak_pages_in_use <= 6 + 4 * -(-(120 - 96 + 24) // PAGE_SIZE)
    with tiered(folder, (80, 0, 0), enable_prefix_caching=False) as llm:
        assert [tokens(one) for one in llm.generate(prompts, PARAMS, use_tqdm=False)] == [tokens(o) for o in outputs]


# --- who may find what ---


def test_salts_never_meet(folder: Path, tmp_path: Path) -> None:
    """None is a salt of its own, and the empty text another; also in a later process."""
    salts = [None, "", "a", "b"]
    with tiered(folder, (200, 0, 0)) as llm:
        for seed, first in enumerate(salts):
            prompt = random_prompt(70, seed)
            expected = tokens(ask(llm, prompt, salt=first))
            for salt in (first, *(one for one in salts if one != first)):
                output = ask(llm, prompt, salt=salt)
                assert sum(tiers(output)) == (4 if salt == first else 0)
                assert tokens(output) == expected
    prompt = random_prompt(70)
    cache_dir = tmp_path / "kept"
    with tiered(folder, (60, 60, 60), cache_dir) as llm:
        ask(llm, prompt, salt="a")
    with tiered(folder, (60, 60, 60), cache_dir) as llm:
        assert cached(llm, prompt, "b") == cached(llm, prompt[:60]) == 0
        assert tiers(ask(llm, prompt, salt="a")) == (0, 0, 4)
        outputs = llm.generate([prompt] * 3, PARAMS, cache_salt=["a", "b", "c"], use_tqdm=False)
        assert [output.num_cached_tokens for output in outputs] == [64, 64, 0]


def test_equal_keys_are_no_hit_where_tokens_differ(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hashes collide: tokens are compared, in memory and with what a former process left."""
    prompts = [random_prompt(50, seed) for seed in (1, 2, 3)]
    with tiered(folder, (60, 0, 0), enable_prefix_caching=False) as llm:
        expected = [tokens(ask(llm, prompt)) for prompt in prompts]
    collide(monkeypatch)
    for _ in range(2):
        with tiered(folder, (60, 60, 60), tmp_path) as llm:
            for prompt, answer in zip(prompts, expected, strict=True):
                assert tokens(ask(llm, prompt)) == answer


def test_switched_off_nothing_is_kept(folder: Path, tmp_path: Path) -> None:
    with tiered(folder, (8, 8, 60), tmp_path, enable_prefix_caching=False) as llm:
        answers = [ask(llm, FIRST) for _ in range(2)]
        assert [tiers(one) for one in answers] == [(0, 0, 0)] * 2
        stats = llm.stats()
        assert stats.bytes_moved["host_to_disk"] and stats.idle_pages == stats.pages_in_use == 0
        assert (stats.device_pages, stats.host_pages, stats.disk_pages) == (0, 0, 0)
        assert llm.info.cache_dir is not None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_reset_forgets_every_tier(folder: Path, tmp_path: Path) -> None:
    with tiered(folder, (20, 20, 60), tmp_path) as llm:
        first = ask(llm, FIRST)
        ask(llm, random_prompt(300, 5))
        assert llm.stats().idle_pages and llm.stats().disk_pages
        llm.reset_prefix_cache()
        idle_engine(llm).integrity_check()
        stats = llm.stats()
        assert (stats.idle_pages, stats.device_pages, stats.host_pages, stats.disk_pages) == (0, 0, 0, 0)
        again = ask(llm, FIRST)
        assert tiers(again) == (0, 0, 0) and again.outputs == first.outputs
        llm.reset_prefix_cache()
    with tiered(folder, (20, 20, 60), tmp_path) as llm:
        assert llm.stats().disk_pages == 0 and cached(llm, FIRST) == 0


def test_reset_leaves_a_running_request_alone(folder: Path, tmp_path: Path) -> None:
    """Also one that runs on a prefix that was found, on disk among others."""
    long_answer = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with tiered(folder, (60, 0, 0), enable_prefix_caching=False) as llm:
        expected = tokens(ask(llm, SECOND, long_answer))
    with tiered(folder, (8, 6, 100), tmp_path) as llm:
        ask(llm, FIRST)
        ask(llm, random_prompt(400, 6))
        stream = llm.stream(SECOND, long_answer)
        assert next(stream).num_cached_tokens == 160
        llm.reset_prefix_cache()
        assert llm.stats().idle_pages == 0
        last = list(stream)[-1]
        assert tokens(last) == expected
        idle_engine(llm).integrity_check()
        assert found_now(llm, [FIRST, SECOND]) == [0, 0], "nothing from before the reset"
    with tiered(folder, (8, 6, 100), tmp_path) as llm:
        assert found_now(llm, [FIRST, SECOND]) == [0, 0], "nor for later processes"


# --- the end of requests ---


def test_forks_share_a_known_prefix(folder: Path) -> None:
    """Three answers on a prefix that was found: its pages are held once, and what each writes is its own."""
    three = SamplingParams(temperature=1, seed=5, n=3, max_tokens=24, ignore_eos=True)
    with tiered(folder, (80, 0, 0), enable_prefix_caching=False) as llm:
        expected = [one.token_ids for one in ask(llm, SECOND, three).outputs]
    assert len({tuple(one) for one in expected}) == 3
    with tiered(folder, (80, 0, 0)) as llm:
        ask(llm, FIRST)
        output = ask(llm, SECOND, three)
        assert [one.token_ids for one in output.outputs] == expected
        assert tiers(output) == (COMMON, 0, 0)
        assert llm.stats().peak_pages_in_use <= len(SECOND) // PAGE_SIZE + 3 * 3
        for answer in expected:
            assert cached(llm, SECOND + answer) == (len(SECOND) + 23) // PAGE_SIZE, "each answer's pages are found"


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 5, 8, 11])
def test_an_abort_frees_all_at_once(folder: Path, tmp_path: Path, stage: int) -> None:
    """After so many steps: queued with the pages it expects on disk, while these are fetched, amid its prompt, or
    while it is answered. The other request, in whose way it stands or beside which it runs, goes on."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    other = random_prompt(200, 6)
    with tiered(folder, (8, 12, 100), tmp_path, max_num_seqs=1 + stage % 2) as llm:
        ask(llm, FIRST)
        expected = tokens(ask(llm, other, params))
        engine = idle_engine(llm)
        for beside in (False, True):
            ended = SECOND + random_prompt(60, stage)
            requests = [llm._request(ended, params, 0, None).request]
            if beside:
                requests.insert(stage % 2, llm._request(other, params, 0, None).request)
            engine.add(requests)
            for _ in range(stage):
                engine.step()
            engine.abort([(one.request_id, None) for one in requests if one.prompt_token_ids == ended])
            engine._cache.integrity_check()
            if not beside:
                assert engine.stats().pages_in_use == engine.stats().num_running == engine.stats().num_waiting == 0
            engine.integrity_check()
            drawn = [output for _ in range(300) for output in (engine.step() if engine.has_work else [])]
            engine.integrity_check()
            if beside:
                [mine] = {one.request_id for one in requests if one.prompt_token_ids == other}
                after = [one.token_id for one in drawn if isinstance(one, TokenOutput) and one.request_id == mine]
                assert after and after == expected[-len(after) :]
        assert tokens(ask(llm, other, params)) == expected
        assert cached(llm, FIRST) == COMMON


# --- what is given up first ---


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    """Three prefixes meet in a cache for little more than two; of each the end goes before its beginning."""
    prompts = [random_prompt(85, seed) for seed in (1, 2, 3)]
    one = SamplingParams(temperature=0, max_tokens=1)
    with tiered(folder, (14, 0, 0)) as llm:
        for prompt in (prompts[0], prompts[1], prompts[0]):
            ask(llm, prompt, one)
        ask(llm, prompts[2], one)  # takes 6 pages, 4 of which are free, and fills 5
        assert found_now(llm, prompts) == [5, 3, 5]
        ask(llm, random_prompt(40, 4), one)
        assert found_now(llm, prompts) == [5, 1, 5]


def found_now(llm: LLM, prompts: list[list[int]]) -> list[int]:
    """Pages of each prompt that a request would find, without using them."""
    engine = idle_engine(llm)
    root = root_key(llm.info.fingerprint, None)
    return [len(engine._cache.find(page_keys(root, prompt, PAGE_SIZE))) for prompt in prompts]


def test_the_last_use_outlives_the_process(folder: Path, tmp_path: Path) -> None:
    """A, B, A again, and then a disk for less than both: A is kept, and of B the beginning."""
    first, second = random_prompt(165, 1), random_prompt(165, 2)
    one = SamplingParams(temperature=0, max_tokens=1)
    with tiered(folder, (30, 30, 60), tmp_path) as llm:
        for prompt in (first, second):
            ask(llm, prompt, one)
    with tiered(folder, (30, 30, 60), tmp_path) as llm:
        assert tiers(ask(llm, first, one)) == (0, 0, 10)
    with tiered(folder, (30, 30, 14), tmp_path) as llm:
        assert llm.stats().disk_pages == 14
        assert found_now(llm, [first, second]) == [10, 4]
        # a third one pushes the second out, from its end, while the first is used
        ask(llm, first, one)
        ask(llm, random_prompt(65, 3), one)
        assert cached(llm, random_prompt(65, 3)) == 4
    with tiered(folder, (30, 30, 14), tmp_path) as llm:
        assert found_now(llm, [first, second, random_prompt(65, 3)]) == [10, 0, 4]
        assert listed(Path(llm.info.cache_dir or "")) == 14


def test_idle_pages_never_stand_in_the_way(folder: Path, tmp_path: Path) -> None:
    """A request that takes all tiers is admitted though idle pages fill them, and so are many at a time."""
    pages = (6, 6, 20)
    with tiered(folder, pages, tmp_path) as llm:
        for seed in range(4):
            ask(llm, random_prompt(200, seed), SamplingParams(temperature=0, max_tokens=1))
        assert llm.stats().idle_pages >= 20
        largest = sum(pages) * PAGE_SIZE - 20
        output = ask(llm, random_prompt(largest, 9), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        assert len(tokens(output)) == 20
        outputs = llm.generate([random_prompt(100, seed) for seed in range(20, 28)], PARAMS, use_tqdm=False)
        assert all(one.error is None and len(tokens(one)) == 24 for one in outputs)
        idle_engine(llm).integrity_check()


# --- what pages depend on ---


def other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "change, options",
    [
        (other_weights, {}),
        (lambda folder: edit_config(folder, lambda raw: raw.update(rms_norm_eps=1e-4)), {}),
        (lambda folder: None, {"dtype": "bfloat16"}),
        (lambda folder: None, {"page_size": 32}),
    ],
    ids=["weights", "config", "dtype", "page size"],
)
def test_pages_of_another_model_are_no_hit(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], options: dict[str, Any]
) -> None:
    """They stay for the model that they belong to, which a copy elsewhere is as well."""
    shutil.copytree(folder, tmp_path / "other")
    cache = tmp_path / "cache"
    with tiered(folder, (30, 30, 60), cache) as llm:
        expected = tokens(ask(llm, FIRST))
    change(tmp_path / "other")
    for pages in (0, COMMON if options.get("page_size") != 32 else COMMON // 2):
        with tiered(tmp_path / "other", (60, 60, 120), cache, **options) as llm:
            assert llm.stats().idle_pages > 0 if pages else llm.stats().idle_pages == 0
            [output] = llm.generate([FIRST], PARAMS, use_tqdm=False)
            assert output.num_cached_tokens == pages * llm.info.page_size
    shutil.copytree(folder, tmp_path / "copy")
    for place in (folder, tmp_path / "copy"):
        with tiered(place, (30, 30, 60), cache) as llm:
            again = ask(llm, FIRST)
            assert tiers(again) == (0, 0, COMMON) and tokens(again) == expected
    assert len(list(cache.iterdir())) == 2


# --- writing to disk, and what the disk does ---


@pytest.mark.parametrize("policy", ["write_through", "idle"])
def test_when_pages_are_written(folder: Path, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "write_through" while the request still runs, with "idle" only when it has ended; either way everything is
    there after the end, though memory would have held it."""
    listed_while_running: list[int] = []
    with tiered(folder, (40, 40, 60), tmp_path, disk_write_policy=policy) as llm:
        assert llm.info.cache_dir is not None
        cache = Path(llm.info.cache_dir)
        execute = Rank.execute

        def spy(self: Rank, plan: StepPlan, drawn: Tensor | None) -> Tensor | None:
            if plan.sequences:
                listed_while_running.append(listed(cache))
            return execute(self, plan, drawn)

        monkeypatch.setattr(Rank, "execute", spy)
        params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
        answer = llm.generate([FIRST], params, use_tqdm=False)[0].outputs[0].token_ids
    assert max(listed_while_running) >= 12 if policy == "write_through" else max(listed_while_running) == 0
    assert listed(cache) == (170 + 149) // PAGE_SIZE
    array = zarr.open_array(str(cache / "kv.zarr"), mode="r")
    with closing(Catalogue(cache, read_only=True)) as catalogue:
        names = [(entry.key, entry.parent, entry.tokens) for entry in catalogue.entries()]
        assert all(array[entry.slot].any() for entry in catalogue.entries())
    wanted = page_keys(root_key(json.loads((cache / "model.json").read_bytes())["fingerprint"], None),
        (FIRST + answer)[:-1], PAGE_SIZE)  # fmt: skip
    assert names[::-1] == [astuple(name) for name in wanted]


@damages
@pytest.mark.parametrize("restart", [False, True])
def test_an_idle_page_that_is_damaged(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], restart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is found out at the start or when it is read, computed again, and the answer is right."""
    with tiered(folder, (60, 0, 0), enable_prefix_caching=False) as llm:
        expected = tokens(ask(llm, SECOND))
    llm = tiered(folder, (8, 6, 100), tmp_path)
    try:
        ask(llm, FIRST)
        ask(llm, random_prompt(400, 6))
        cache = Path(llm.info.cache_dir or "")
        if restart:
            llm.close()
        with closing(Catalogue(cache, read_only=True)) as catalogue:
            root = root_key(json.loads((cache / "model.json").read_bytes())["fingerprint"], None)
            keys = [name.digest for name in page_keys(root, FIRST, PAGE_SIZE)]
            [slot] = [entry.slot for entry in catalogue.entries() if entry.key == keys[4]]
            before = len(catalogue.entries())
        damage(cache / "kv.zarr" / f"c.{slot}.0.0.1.0.0")
        if restart:
            llm = tiered(folder, (8, 6, 100), tmp_path)
            is_seen = damage is not flip_bit
            assert llm.stats().disk_pages == before - ((170 + 23) // PAGE_SIZE - 4 if is_seen else 0) == listed(cache)
            assert found_now(llm, [FIRST]) == [4 if is_seen else COMMON]
        for turn in range(2):
            output = ask(llm, SECOND)
            assert tokens(output) == expected
            if restart and not turn:  # what was found and had to be computed again does not count
                assert sum(tiers(output)) == (4 if is_seen else COMMON - 1)
        assert found_now(llm, [SECOND]) == [len(SECOND) // PAGE_SIZE]
    finally:
        llm.close()
    with tiered(folder, (8, 6, 100), tmp_path) as llm:
        output = ask(llm, SECOND)
        assert tokens(output) == expected and tiers(output) == (0, 0, (len(SECOND) - 1) // PAGE_SIZE)
        assert llm.stats().pages_recomputed == 0
