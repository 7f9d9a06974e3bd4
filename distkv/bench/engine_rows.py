"""Rows of `distkv bench gpu`: an engine with random weights that decodes one request."""

import random
import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distkv.bench.device import LinkCeiling, MemoryCeiling, Turns
from distkv.bench.harness import Figure
from distkv.bench.offload import check_answers
from distkv.bench.transformers_runner import transformers_runner
from distkv.config import EngineConfig
from distkv.engine.client import EngineClient
from distkv.engine.protocol import EngineRequest
from distkv.errors import DistKVError
from distkv.launch.launch import launch
from distkv.planner.model_shape import ModelShape
from distkv.sampling_params import MAX_LOGPROBS, SamplingParams
from distkv.storage.dtypes import ITEM_BYTES, torch_dtype
from distkv.storage.page_spec import PageSpec
from distkv.stress.stage import Stage, run_stage
from distkv.workers.model.layout import Layout
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec

SEED = 1
WARM_UP = 8  # tokens, less than a page: no copy of one to the host takes room from what is measured


@dataclass(frozen=True)
class Shape:
    """A model folder without weights, and how its engine cuts up a context."""

    folder: Path
    page_size: int
    step_tokens: int  # of a step, at most
    device: str  # "cuda", or "cpu" in tests
    dtype: str = "bfloat16"

    @cached_property
    def model(self) -> ModelConfig:
        return ModelConfig.load(self.folder)

    @cached_property
    def spec(self) -> PageSpec:
        return model_page_spec(self.model, self.page_size, self.dtype)

    def engine(self, longest: int, device_pages: int) -> EngineClient:
        """The same as `start`, with nothing on its way any more that is compiled beside an engine's first steps."""
        engine = self.start(longest, device_pages)
        if self.device == "cuda":
            from distkv.workers.runners.compile_ahead import join_compilers  # imports triton

            join_compilers()
        return engine

    def start(self, longest: int, device_pages: int) -> EngineClient:
        """With room for a request of `longest` tokens on the host, beside so many pages on the device."""
        page_bytes, host_pages = self.spec.page_bytes, self.spec.pages_for(longest) + 2
        return launch(
            EngineConfig(
                self.folder, load_format="dummy", dtype=self.dtype, device=self.device, page_size=self.page_size,
                max_model_len=longest, max_num_seqs=1, max_num_batched_tokens=self.step_tokens,
                device_kv_bytes=device_pages * page_bytes, host_kv_bytes=host_pages * page_bytes,
                enable_prefix_caching=False,
            )
        )  # fmt: skip


def streaming_rows(
    turns: Turns, link: LinkCeiling, shape: Shape, window: int, contexts: tuple[int, ...], new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Decode of random contexts with `window` tokens on the device, and a page for those that are new.

    The link is measured before and after each context.
    """
    longest = max(contexts) + new_tokens
    device_pages = shape.spec.pages_for(window + new_tokens)
    turns.meter.forget_peak()
    ours = turns.meter.peak_bytes()  # buffers to measure with
    with closing(shape.engine(longest, device_pages)) as engine:
        _run(shape, engine, WARM_UP, 2, synthetic_kv=True)
        for context in contexts:
            repeats = range(turns.bench.options.repeats)
            turns.bench.doing(f"a context of {context} tokens")
            taken = [turns.meter.seconds(link.to_device) for _ in repeats]
            turns.meter.forget_peak()
            stage = _run(shape, engine, context, new_tokens, synthetic_kv=True)
            peak = turns.meter.peak_bytes()
            taken += [turns.meter.seconds(link.to_device) for _ in repeats]
            ms, cold = Figure.of(stage.decode_ms), _streamed(shape, stage)
            rate, ceiling = 1e3 * cold / ms.median, link.num_bytes / statistics.median(taken)
            yield {
                "part": "streaming",
                "layers": shape.model.num_hidden_layers,
                "context": context,
                "device_tokens": device_pages * shape.page_size,
                "new_tokens": new_tokens,
                "ms_per_token": ms,
                "cold_bytes_per_step": cold,
                "cold_bytes_per_s": rate if cold else None,
                "link_bytes_per_s": ceiling,
                "share": rate / ceiling if cold else None,
                "kv_bytes": context * shape.spec.bytes_per_token,
                "peak_device_bytes": peak - ours,
            }


def model_rows(
    turns: Turns, memory: MemoryCeiling, link: LinkCeiling, shape: Shape, resident: int, cold: int, new_tokens: int
) -> list[dict[str, Any]]:
    """A context of `resident` tokens on the device and one of `cold` tokens of which the device holds the least, by
    distkv and by transformers, in turns with what bounds them."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    model, spec = shape.model, shape.spec
    with turns.device:
        config = AutoConfig.from_pretrained(shape.folder, trust_remote_code=False)
        network = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(spec.dtype), trust_remote_code=False
        ).eval()
    in_memory = transformers_runner(network)
    on_cuda = turns.device.type == "cuda"  # it knows no other device to take a cache out of
    offloaded = transformers_runner(network, lambda: DynamicCache(config=network.config, offloading=on_cuda))
    device_pages = max(spec.pages_for(resident + new_tokens + 1), spec.pages_for(shape.step_tokens) + 1)
    peers = {"on the device": (resident, in_memory), "on the host": (cold, offloaded)}
    taken: dict[tuple[str, int], list[float]] = {}
    streamed = {resident: 0, cold: 0}
    reads, copies = [], []
    with closing(shape.engine(cold + new_tokens + 1, device_pages)) as engine:
        for _, where in turns.bench.turns([*peers, "ceilings"], "the whole model"):
            if where not in peers:
                reads.append(turns.meter.seconds(memory.read))
                copies.append(turns.meter.seconds(link.to_device))
                continue
            context, peer = peers[where]
            stage = _run(shape, engine, context, new_tokens + 1)
            streamed[context] = _streamed(shape, stage)
            seconds = {
                "distkv": (stage.times[-1] - stage.times[0]) / new_tokens,
                "transformers": peer(stage.request.prompt_token_ids, new_tokens),
            }
            for name, one in seconds.items():
                taken.setdefault((name, context), []).append(one)
    num_bytes = weight_bytes(model, ITEM_BYTES[spec.dtype])
    read_seconds, copy_seconds = statistics.median(reads[1:]), statistics.median(copies[1:])
    weights_ms = 1e3 * num_bytes / memory.read_bytes * read_seconds
    rows = []
    for (name, context), times in taken.items():
        whole = 0 if context == resident else context * spec.bytes_per_token  # transformers takes out all of it
        cold_bytes = streamed[context] if name == "distkv" else whole
        ms, cold_ms = Figure.of(times[1:]).scaled(1e3), 1e3 * cold_bytes / link.num_bytes * copy_seconds
        rows.append(
            {
                "part": "model",
                "engine": name,
                "layers": model.num_hidden_layers,
                "context": context,
                "cache": "on the device" if context == resident else "on the host",
                "new_tokens": new_tokens,
                "ms_per_token": ms,
                "weight_bytes": num_bytes,
                "weights_ms": weights_ms,
                "cold_bytes_per_step": cold_bytes,
                "cold_ms": cold_ms,
                "ratio": ms.median / max(weights_ms, cold_ms),
            }
        )
    return rows


def residency_rows(shape: Shape, context: int, new_tokens: int) -> list[dict[str, Any]]:
    """The same prompt, read in steps and answered, with all of its pages on the device, half of them, and as few as can
    be; the host holds the rest.

    The model's vocabulary is small enough that each token brings the log-probabilities of all of it, which stand for
    the logits. Raises DistKVError when they differ in any bit, or when nothing was streamed that had to be.
    """
    model, spec = shape.model, shape.spec
    assert model.vocab_size <= MAX_LOGPROBS
    pages = spec.pages_for(context + new_tokens)
    windows = {
        "on the device": pages,
        "half on the host": pages // 2,
        "on the host": spec.pages_for(shape.step_tokens) + 1,
    }
    answers, rows = {}, []
    for name, device_pages in windows.items():
        with closing(shape.engine(context + new_tokens, device_pages)) as engine:
            stage = _run(shape, engine, context, new_tokens, logprobs=model.vocab_size)
        answers[name] = [(output.token_id, output.logprobs) for output in stage.outputs]
        streamed = stage.bytes_moved.get("host_streamed", 0)
        if (streamed > 0) != (device_pages < pages):
            raise DistKVError(f"with the context {name}, {streamed} bytes were streamed; report it")
        rows.append(
            {
                "part": "residency",
                "cache": name,
                "layers": model.num_hidden_layers,
                "context": context,
                "new_tokens": new_tokens,
                "streamed_bytes": streamed,
                "num_logprobs": new_tokens * model.vocab_size,
                "same": "yes",  # else `check_answers` has raised
            }
        )
    check_answers(answers)
    return rows


def weight_bytes(model: ModelConfig, itemsize: int) -> int:
    """The bytes of all weights that a token's step reads: everything but the embedding, of which it is one row."""
    return ModelShape("the model", model).rank_parameters(Layout(), 0).read_per_step * itemsize


def _run(
    shape: Shape, engine: EngineClient, context: int, max_tokens: int, *, synthetic_kv: bool = False,
    logprobs: int | None = None,
) -> Stage:  # fmt: skip
    """One request of random tokens. With `synthetic_kv` none but the last page of them is read, see
    `EngineRequest.synthetic_kv_seed`."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)
    generator, size = random.Random(SEED), shape.model.vocab_size
    prompt = [generator.randrange(size) for _ in range(context)]
    request = EngineRequest(
        str(context), prompt, params, max_tokens, SEED, synthetic_kv_seed=SEED if synthetic_kv else None
    )
    stage = run_stage(engine, request, lambda sample: None)
    if cached := sum(stage.outputs[0].num_cached_tokens):
        raise DistKVError(f"{cached} tokens of the prompt were found in the cache; report it")
    return stage


def _streamed(shape: Shape, stage: Stage) -> int:
    """Bytes that a step streamed; raises DistKVError unless they are those of the cold pages."""
    streamed, cold = stage.streamed_per_step, stage.cold_pages * shape.spec.page_bytes
    if streamed != cold:
        raise DistKVError(f"a step streamed {streamed} bytes and its cold pages take {cold}; report it")
    return streamed
