"""Logits of one rank against transformers' LlamaForCausalLM, which reads the same folder."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import edit_config, edit_weights, save_llama
from support.measures import largest_error
from support.plans import sequence_step, step_plan
from support.prompts import seeded
from support.ranks import load_rank, run_chunks
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from distkv.workers.sizes import PoolSizes

TOLERANCE = 1e-4  # of the largest logit
TEXT = Path(argparse.__file__)  # long real text that every Python has


def token_ids(count: int, vocab_size: int = 128, seed: int = 5) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=seeded(seed)).tolist()


@torch.inference_mode()
def hf_logits(folder: Path, tokens: list[int], chunks: list[int] | None = None) -> Tensor:
    """fp32 logits `[tokens, vocab_size]` of a fresh model ("dynamic" keeps state from call to call), cached over
    `chunks` if given."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache, logits, start = None, [], 0
    for count in chunks or [len(tokens)]:
        result = model(torch.tensor([tokens[start : start + count]]), past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, start + count
        logits.append(result.logits[0])
    return torch.cat(logits)


def assert_like_hf(folder: Path, tokens: list[int]) -> None:
    """Whole, in chunks that end inside and at the end of pages, and mostly token by token."""
    expected = hf_logits(folder, tokens)
    rank = load_rank(folder)
    count = len(tokens)
    for chunks in ([count], [16, 20, 1, 9, count - 46], [2] + [1] * (count - 10) + [8]):
        logits = run_chunks(rank, tokens, chunks)
        assert logits.dtype == torch.float32
        error = largest_error(logits, expected)
        assert error < TOLERANCE, f"{len(chunks)} chunks: {error}"
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_key_value_heads": 4}, id="MHA"),
        pytest.param({"num_key_value_heads": 2}, id="GQA"),
        pytest.param({"num_key_value_heads": 1}, id="MQA"),
        pytest.param({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}, id="three KV heads"),
        pytest.param({"head_dim": 32}, id="wide heads"),
        pytest.param({"head_dim": 10}, id="narrow heads"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"attention_bias": True}, id="attention bias"),
        pytest.param({"mlp_bias": True}, id="MLP bias"),
        pytest.param({"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, id="all biases"),
        pytest.param({"rms_norm_eps": 0.1}, id="large eps"),
        pytest.param({"vocab_size": 131, "intermediate_size": 67}, id="odd sizes"),
        pytest.param({"num_hidden_layers": 5}, id="five layers"),
    ],
)
def test_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder, _ = save_llama(tmp_path, **shape)
    assert_like_hf(folder, token_ids(90))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("theta", [500.0, None], ids=["theta 500", "default theta"])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "rope_scaling with type"])
@pytest.mark.parametrize("rope_type", list(ROPE))
def test_rope(tmp_path: Path, rope_type: str, spelling: str, theta: float | None) -> None:
    """Each type in each spelling of `config.json`; the prompt is longer than max_position_embeddings."""

    def spell(raw: dict[str, Any]) -> None:
        for field in ("rope_parameters", "rope_scaling", "rope_theta"):
            raw.pop(field, None)
        raw["max_position_embeddings"] = 40
        rope = {"type" if spelling.endswith("with type") else "rope_type": rope_type, **ROPE[rope_type]}
        if spelling == "rope_parameters":
            raw["rope_parameters"] = rope | ({} if theta is None else {"rope_theta": theta})
        else:
            raw["rope_scaling"] = rope
            if theta is not None:
                raw["rope_theta"] = theta

    folder, _ = save_llama(tmp_path)
    edit_config(folder, spell)
    assert_like_hf(folder, token_ids(90))


def test_rope_types_differ(tmp_path: Path) -> None:
    """The comparison above can tell the types apart."""
    folder, _ = save_llama(tmp_path)
    seen = []
    for rope_type, fields in ROPE.items():
        rope = {"rope_type": rope_type, "rope_theta": 500.0, **fields}
        edit_config(folder, lambda raw, rope=rope: raw.update(rope_parameters=rope, max_position_embeddings=40))
        seen.append(run_chunks(load_rank(folder), token_ids(90), [90]))
    for index, logits in enumerate(seen):
        for other in seen[:index]:
            assert largest_error(logits, other) > 100 * TOLERANCE


def test_older_config_without_rope_fields(tmp_path: Path) -> None:
    """LLaMA 1 and 2 say `rope_scaling: null` and nothing else."""
    folder, _ = save_llama(tmp_path)

    def spell(raw: dict[str, Any]) -> None:
        for field in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "dtype"):
            raw.pop(field, None)
        raw |= {"rope_scaling": None, "torch_dtype": "float16"}

    edit_config(folder, spell)
    assert_like_hf(folder, token_ids(70))


def test_both_rope_spellings_at_once(tmp_path: Path) -> None:
    """`rope_scaling` wins, as in transformers."""
    folder, _ = save_llama(tmp_path)
    edit_config(
        folder,
        lambda raw: raw.update(
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
        ),
    )
    assert_like_hf(folder, token_ids(90))


@pytest.mark.parametrize("inside", [64, None])
@pytest.mark.parametrize("beside", [20, None])
def test_original_length_of_llama3_rope(tmp_path: Path, inside: int | None, beside: int | None) -> None:
    """The one beside the table wins over the one in it; without any it is the model's."""
    folder, _ = save_llama(tmp_path)
    rope = LLAMA3 | {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": inside}
    rope = {name: value for name, value in rope.items() if value is not None}
    top = {} if beside is None else {"original_max_position_embeddings": beside}
    edit_config(folder, lambda raw: raw.update(rope_parameters=rope, max_position_embeddings=100, **top))
    assert_like_hf(folder, token_ids(90))


def test_original_length_means_nothing_to_other_types(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    edit_config(folder, lambda raw: raw.update(rope_parameters=rope, original_max_position_embeddings=20))
    assert_like_hf(folder, token_ids(90))


def test_dynamic_rope_begins_past_max_position_embeddings(tmp_path: Path) -> None:
    """Whatever original_max_position_embeddings says, which transformers does not read for this type."""
    folder, _ = save_llama(tmp_path)
    rope = {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 500.0, "original_max_position_embeddings": 20}
    edit_config(folder, lambda raw: raw.update(rope_parameters=rope, max_position_embeddings=40))
    assert_like_hf(folder, token_ids(90))


def test_head_that_is_there_though_the_config_ties_it(tmp_path: Path) -> None:
    """A checkpoint whose `lm_head.weight` differs from the embedding is not tied, as in transformers."""
    folder, _ = save_llama(tmp_path)
    edit_config(folder, lambda raw: raw.update(tie_word_embeddings=True))
    assert_like_hf(folder, token_ids(90))


@pytest.mark.parametrize("tied", [True, False])
def test_names_without_a_prefix(tmp_path: Path, tied: bool) -> None:
    """As a LlamaModel is saved by itself, with a head beside it or without."""
    folder, model = save_llama(tmp_path, tie_word_embeddings=tied)
    expected = hf_logits(folder, token_ids(90))
    if tied:
        model.model.save_pretrained(folder)
        assert_like_hf(folder, token_ids(90))
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaModel"]
    else:

        def rename(tensors: dict[str, Tensor]) -> None:
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        edit_weights(folder, rename)
    assert largest_error(run_chunks(load_rank(folder), token_ids(90), [90]), expected) < TOLERANCE


def test_weights_in_float64(tmp_path: Path) -> None:
    folder, model = save_llama(tmp_path)
    model.double().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float64"
    assert_like_hf(folder, token_ids(90))


def test_a_single_file_beside_older_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is read, as in transformers, and that is told once."""
    save_llama(tmp_path, seed=1, max_shard_size="100KB")
    older = {path: path.read_bytes() for path in tmp_path.glob("model*")}
    save_llama(tmp_path)
    for path, content in older.items():
        path.write_bytes(content)
    caplog.clear()
    assert_like_hf(tmp_path, token_ids(90))
    [told] = [record.getMessage() for record in caplog.records if record.name.startswith("distkv")]
    assert str(tmp_path) in told and "model.safetensors beside the shards" in told


@pytest.mark.parametrize("prompt_len", [30, 60])
def test_dynamic_rope_in_generation(tmp_path: Path, prompt_len: int) -> None:
    """Decoding on, past max_position_embeddings 40, with what transformers' generate caches: keys keep the angles that
    they were given."""
    folder, _ = save_llama(tmp_path)
    rope = {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 500.0}
    edit_config(folder, lambda raw: raw.update(rope_parameters=rope, max_position_embeddings=40))
    tokens = token_ids(prompt_len + 25)
    expected = hf_logits(folder, tokens, [prompt_len] + [1] * 25)
    rank = load_rank(folder)
    for prompt_chunks in ([prompt_len], [16, prompt_len - 16]):
        logits = run_chunks(rank, tokens, [*prompt_chunks, *[1] * 25], prompt_len)
        assert largest_error(logits, expected) < TOLERANCE


def test_sharded_checkpoint_equals_a_single_file(tmp_path: Path) -> None:
    single, model = save_llama(tmp_path / "single")
    sharded, _ = save_llama(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert (sharded / "model.safetensors.index.json").is_file()
    assert len(list(single.glob("*.safetensors"))) == 1
    tokens = token_ids(50)
    logits = run_chunks(load_rank(sharded), tokens, [50])
    assert torch.equal(logits, run_chunks(load_rank(single), tokens, [50]))
    with torch.inference_mode():
        assert largest_error(logits, model(torch.tensor([tokens])).logits[0]) < TOLERANCE


def test_mixed_steps(tiny_model: Path) -> None:
    """Three sequences at different stages in one step, with logits for some rows: each as if it were alone."""
    rank = load_rank(tiny_model)
    tokens = [token_ids(60, seed=seed) for seed in range(3)]
    expected = [hf_logits(tiny_model, ids) for ids in tokens]
    slots = [[9, 2, 14, 0], [5, 6, 7, 8], [4, 3, 1, 10]]

    def step(*parts: tuple[int, int, int, int]) -> None:
        """(sequence, start, end, wanted logits)"""
        plans = [
            sequence_step(tokens[i][start:end], start, slots[i][: -(-end // 16)], 60, wanted)
            for i, start, end, wanted in parts
        ]
        logits = rank.execute(step_plan(plans))
        wanted = [expected[i][end - wanted : end] for i, _, end, wanted in parts]
        assert largest_error(logits, torch.cat(wanted)) < TOLERANCE

    step((0, 0, 33, 1), (1, 0, 5, 5))
    step((0, 33, 34, 1), (1, 5, 40, 0), (2, 0, 17, 17))
    step((2, 17, 18, 1), (1, 40, 41, 1), (0, 34, 37, 3))
    step((1, 41, 44, 1), (0, 37, 60, 2), (2, 18, 21, 3))
    step((2, 21, 22, 1), (1, 44, 45, 1))


def test_copies_come_before_clears_and_both_before_the_sequences(tiny_model: Path) -> None:
    """A forked sequence goes on from a copied page, and the page that it was copied from may change hands."""
    rank = load_rank(tiny_model)
    tokens = token_ids(24)
    expected = run_chunks(rank, tokens, [20, 4])[-1:]
    rank.allocate(PoolSizes(device=8))
    rank.execute(step_plan([sequence_step(tokens[:20], 0, [0, 1], 24, 0)]))
    logits = rank.execute(step_plan([sequence_step(tokens[20:], 20, [0, 5], 24, 1)], [(1, 5)], [1, 6]))
    assert torch.equal(logits, expected)
    assert not rank.pools.device.data[:, :, [1, 6]].any()


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.06), ("float16", 0.01)], ids=["bf16", "fp16"])
def test_half_precision(tiny_model: Path, dtype: str, limit: float) -> None:
    rank = load_rank(tiny_model, dtype=dtype)
    tokens = token_ids(90)
    for chunks in ([90], [30, 1, 1, 58]):
        logits = run_chunks(rank, tokens, chunks)
        assert logits.dtype == torch.float32
        assert largest_error(logits, hf_logits(tiny_model, tokens)) < limit


def test_page_size_does_not_matter(tiny_model: Path) -> None:
    tokens = token_ids(200)
    expected = hf_logits(tiny_model, tokens)
    for page_size in (16, 64, 512):
        logits = run_chunks(load_rank(tiny_model, page_size=page_size), tokens, [150, 1, 49])
        assert largest_error(logits, expected) < TOLERANCE


def test_dummy_weights_are_those_of_the_seed(tiny_model: Path, tmp_path: Path) -> None:
    """No weights file is needed, and the seed alone decides."""
    shutil.copy(tiny_model / "config.json", tmp_path)
    tokens = token_ids(20)
    first, again, other = (
        run_chunks(load_rank(tmp_path, load_format="dummy", seed=seed), tokens, [20]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert first.isfinite().all()
    assert largest_error(first, other) > 0.1


@torch.inference_mode()
@pytest.mark.slow
def test_demo_model_on_real_text(demo_model: Path) -> None:
    """3000 tokens in two chunks and one decode step; the last 100 tokens of each are compared."""
    tokens = AutoTokenizer.from_pretrained(demo_model)(TEXT.read_text(encoding="utf-8"))["input_ids"][:3000]
    assert len(tokens) == 3000
    rows = torch.tensor([*range(2048 - 100, 2048), *range(2999 - 100, 3000)])
    hf = LlamaForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    expected = hf(torch.tensor([tokens]), logits_to_keep=rows, use_cache=False).logits[0]

    rank = load_rank(demo_model, page_size=256, num_pages=16)
    logits = run_chunks(rank, tokens, [2048, 951, 1], wanted=100)

    assert largest_error(logits, expected) < TOLERANCE
    # where two tokens are all but tied, rounding may choose
    two = expected.topk(2).values
    clear = two[:, 0] - two[:, 1] > 2 * TOLERANCE * expected.abs().max()
    assert clear.sum() > 190
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_a_rank_takes_no_more_threads_than_cores(
    tiny_model: Path, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota of the container leaves torch's own default as it is; who says a number gets it, see test_threads.py."""
    for cores, before, given, after in ((1, 2, None, 1), (8, 2, None, 2), (1, 1, 2, 2)):
        monkeypatch.setattr("distkv.workers.threads.usable_cores", lambda cores=cores: cores)
        set_threads(before)
        load_rank(tiny_model, num_threads=given)
        assert torch.get_num_threads() == after
