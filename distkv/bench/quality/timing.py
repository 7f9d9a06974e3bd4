"""Decode steps of a variant at long contexts, whose pages lie on the host but for a window: a shape with random weights
and random KV, since no model at hand reads so much."""

import random
import statistics
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from distkv.bench.quality.answers import page_spec
from distkv.bench.quality.variants import Variant
from distkv.config import EngineConfig, EngineOptions
from distkv.engine.protocol import EngineRequest
from distkv.launch.launch import launch
from distkv.sampling_params import SamplingParams
from distkv.storage.tier import Tier
from distkv.stress.stage import run_stage
from distkv.workers.model.model_config import ModelConfig

SEED = 1
STEP_TOKENS = 2048  # that a step fills, and the window
WARM_UP = 2  # tokens of each turn that do not count
NO_LIMIT = 2**62


@dataclass(frozen=True)
class Timed:
    """A context's decode steps."""

    ms: float  # the median
    streamed_bytes: int  # that a step brought from the host
    read_share: float  # the bytes of the pages that a step reads, as they lie on the host, of those of the exact cache


def time_steps(
    folder: Path, variant: Variant, contexts: list[int], new_tokens: int, num_threads: int | None
) -> dict[int, Timed]:
    """`new_tokens` steps at each context, one after the other on an engine of their own.

    Args:
        folder: of a shape's config, see `shape_folder`.
    """
    model = ModelConfig.load(folder)
    spec, exact = page_spec(model, variant), page_spec(model, variant.reference)
    longest = max(contexts) + WARM_UP + new_tokens
    options: EngineOptions = {
        **variant.options,
        "load_format": "dummy",
        "seed": SEED,
        "device": "cpu",
        "num_threads": num_threads,
        "max_num_seqs": 1,
        "max_model_len": longest + 1,
        "max_num_batched_tokens": STEP_TOKENS,
        "enable_prefix_caching": False,
        "max_cold_bytes_per_step": NO_LIMIT,
        "device_kv_bytes": (spec.pages_for(STEP_TOKENS) + 2) * spec.page_bytes,
        "host_kv_bytes": (spec.pages_for(longest) + 2) * spec.page_bytes_in(Tier.HOST),
    }
    params = SamplingParams(temperature=0, max_tokens=1 + WARM_UP + new_tokens, ignore_eos=True)
    generator = random.Random(SEED)
    prompt = [generator.randrange(model.vocab_size) for _ in range(max(contexts))]
    found: dict[int, Timed] = {}
    with closing(launch(EngineConfig(folder, **options))) as engine:
        for context in contexts:
            request = EngineRequest(
                str(context), prompt[:context], params, 1 + WARM_UP + new_tokens, SEED, synthetic_kv_seed=SEED
            )  # fmt: skip
            before = engine.stats().policy
            stage = run_stage(engine, request, lambda sample: None)
            after = engine.stats().policy
            visible = after.pages_visible - before.pages_visible
            chosen = (after.pages_chosen - before.pages_chosen) / visible if visible else 1.0
            share = chosen * spec.page_bytes_in(Tier.HOST) / exact.page_bytes
            found[context] = Timed(statistics.median(stage.decode_ms[WARM_UP:]), stage.streamed_per_step, share)
    return found
