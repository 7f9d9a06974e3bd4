"""The law of `docs/invariance.md`: what a request answers depends on the request alone, bit for bit."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.damage import all_damages, flip_bit, page_files
from support.invariance import WHOLE, answers_alone, assert_answers, random_requests, said
from support.llms import idle_engine
from support.processes import run_code
from support.prompts import random_prompt
from support.runs import GREEDY, run

from distkv import LLM, SamplingParams

HEAD_DIM = 48
CODECS = ["auto", "int4", "int8", "fp8_e4m3"]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    heads, kv_heads, biased = {"float32": (6, 3, True), "bfloat16": (6, 3, False), "float16": (4, 1, False)}[
        request.param
    ]
    dynamic = {"rope_type": "dynamic", "factor": 16.0, "rope_theta": 10000.0}
    rope = {"rope_parameters": dynamic} if request.param == "float16" else {}  # no prefix of such a model is kept
    folder = save_llama(
        tmp_path_factory.mktemp("model"), max_position_embeddings=256 if rope else 4096, num_attention_heads=heads,
        num_key_value_heads=kv_heads, hidden_size=96, head_dim=HEAD_DIM, intermediate_size=113, attention_bias=biased,
        **rope,
    )[0]  # fmt: skip
    return folder, request.param


CHOOSING = "top_pages(share=0.3)"
REMEMBERING = "decay(share=0.3, half_life=20)"
SEEDS = [
    *((seed, "full") for seed in range(3)),
    (100, CHOOSING),
    (200, REMEMBERING),
    *(pytest.param(seed, "full", marks=pytest.mark.slow) for seed in range(3, 60)),
    *(pytest.param(seed, CHOOSING, marks=pytest.mark.slow) for seed in range(101, 130)),
    *(pytest.param(seed, REMEMBERING, marks=pytest.mark.slow) for seed in range(201, 230)),
]


@pytest.mark.parametrize(("seed", "policy"), SEEDS)
def test_answers_do_not_depend_on_what_else_happens(
    model: tuple[Path, str], tmp_path: Path, seed: int, policy: str
) -> None:
    """Neighbours in the batch, borders of chunks, hits of any length in any tier, tiers, rings, threads, restarts;
    with each codec, and where a policy chooses."""
    folder, dtype = model
    rng = random.Random(seed)
    prompts, params = random_requests(rng)
    page_size = rng.choice([16, 32, 64, 256] if policy == "full" else [16, 32])
    codec = CODECS[(seed + ["float32", "bfloat16", "float16"].index(dtype)) % len(CODECS)]
    common: dict[str, Any] = {"dtype": dtype, "page_size": page_size, "host_kv_bytes": "64MiB"}
    common |= {"kv_cache_dtype": codec} if policy == "full" else {"attention_policy": policy}
    with LLM(folder, device_kv_bytes="64MiB", enable_prefix_caching=False, **common, **WHOLE) as alone:
        expected = answers_alone(alone, prompts, params)
    page = 2 * 2 * 3 * HEAD_DIM * page_size * 4  # bytes at most
    for round in range(2):  # the second finds what the first has left
        budget = rng.choice([16, 17, 64, 100, 333, 4096] if round == 0 else [16, 256])
        options: dict[str, Any] = {
            "max_num_batched_tokens": budget, "max_num_seqs": min(8, budget),
            "num_threads": rng.choice([1, 2]), "host_kv_bytes": 12 * page, "disk_kv_bytes": 600 * page,
            "device_kv_bytes": page * (12 + -(-budget // page_size)), "cache_dir": str(tmp_path),
        }  # fmt: skip
        with LLM(folder, **common | options) as llm:
            assert_answers(llm, rng, prompts, params, expected, round)


def cold_request(dtype: str, cache_dir: Path) -> tuple[list[int], SamplingParams, dict[str, Any]]:
    """A request, and options with which nearly all of its pages lie on disk while it runs."""
    page = 2 * 2 * 3 * HEAD_DIM * 16 * 2
    options = {
        "dtype": dtype, "page_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 4, "device_kv_bytes": 4 * page,
        "host_kv_bytes": 6 * page, "disk_kv_bytes": 60 * page, "cache_dir": str(cache_dir),
    }  # fmt: skip
    params = SamplingParams(temperature=1, seed=7, max_tokens=40, logprobs=5, ignore_eos=True)
    return random_prompt(500, 2), params, options


@all_damages
@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)
def test_a_repair_leaves_no_trace(model: tuple[Path, str], tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Files of pages are damaged while a request decodes, and before the next process reads them."""
    assert_repairs_leave_no_trace(model, tmp_path, damage)


@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("policy", [CHOOSING, REMEMBERING])
def test_a_repair_leaves_no_trace_where_pages_are_chosen(model: tuple[Path, str], tmp_path: Path, policy: str) -> None:
    """Tokens of the answer that are computed again choose the pages that they chose before."""
    assert_repairs_leave_no_trace(model, tmp_path, flip_bit, attention_policy=policy)


@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("policy", ["full", CHOOSING, REMEMBERING])
def test_a_repair_leaves_no_trace_where_pages_are_codes(model: tuple[Path, str], tmp_path: Path, policy: str) -> None:
    """Also in steps that fill a page, whose other tokens are rounded before anybody knows that a page was damaged."""
    assert_repairs_leave_no_trace(model, tmp_path, flip_bit, kv_cache_dtype="int4", attention_policy=policy)


def assert_repairs_leave_no_trace(
    model: tuple[Path, str], tmp_path: Path, damage: Callable[[Path], None], **changes: str
) -> None:
    folder, dtype = model
    prompt, params, options = cold_request(dtype, tmp_path)
    options |= changes
    with LLM(folder, dtype=dtype, page_size=16, **changes, **WHOLE | {"host_kv_bytes": "1MiB"}) as alone:
        expected = said(alone.generate([prompt], params, use_tqdm=False)[0])
    with LLM(folder, **options) as llm:
        engine = idle_engine(llm)
        forward, struck = engine._runner.executor.forward, {501, 511, 527}  # the last two fill a page

        def spy(plan: Any, drawn: Any) -> Any:
            starts = {one.start for one in plan.sequences if len(one.token_ids) == 1} & struck
            if starts:
                struck.difference_update(starts)
                for file in page_files(tmp_path)[::5]:
                    damage(file)
            return forward(plan, drawn)

        engine._runner.executor.forward = spy
        assert said(llm.generate([prompt], params, use_tqdm=False)[0]) == expected
        assert llm.stats().pages_recomputed >= 3
    for file in page_files(tmp_path)[1::7]:
        damage(file)
    with LLM(folder, **options) as llm:
        assert said(llm.generate([prompt], params, use_tqdm=False)[0]) == expected


KILLED = """
import json, sys
from distkv import LLM, SamplingParams
from support.kill_points import kill_at
from support.prompts import random_prompt
folder, options, number = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
llm = LLM(folder, **options)
kill_at("os.rename", number)  # as a page's file gets its name
llm.generate([random_prompt(500, 2)], SamplingParams(temperature=1, seed=7, max_tokens=40, ignore_eos=True))
llm.close()
"""


@pytest.mark.parametrize("model", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("number", [2, 30])
def test_a_killed_process_leaves_no_trace(model: tuple[Path, str], tmp_path: Path, number: int) -> None:
    """The next one goes on from the pages that it has left."""
    folder, dtype = model
    prompt, params, options = cold_request(dtype, tmp_path)
    with LLM(folder, dtype=dtype, page_size=16, **WHOLE) as alone:
        expected = said(alone.generate([prompt], params, use_tqdm=False)[0])
    ended = run_code(KILLED, folder, json.dumps(options), number)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with LLM(folder, **options) as llm:
        [output] = llm.generate([prompt], params, use_tqdm=False)
        assert said(output) == expected
        assert number < 30 or output.num_cached_tokens > 0


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_demo_model_in_chunks_of_any_size(demo_model: Path, dtype: str) -> None:
    """Logits of real shapes: of a prompt in one chunk, in many, and after it one token at a time."""
    prompt = random_prompt(300, 5, 40_000)
    options: dict[str, Any] = {"page_size": 64, "dtype": dtype, "max_num_seqs": 1}
    whole = run(demo_model, [prompt], GREEDY, max_num_batched_tokens=512, **options)
    for budget in (16, 130):
        run(demo_model, [prompt], GREEDY, max_num_batched_tokens=budget, **options).assert_same(whole)
