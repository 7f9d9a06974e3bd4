"""`distkv stress`: one request with a context as long as one likes, over all tiers, measured and verified."""

import gc
import random
import resource
import sysconfig
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console

from distkv.config import EngineConfig, EngineOptions
from distkv.engine.client import EngineClient
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.room import room_for
from distkv.errors import CapacityError, ConfigError
from distkv.frontend.tokenizer import TOKENIZER_FILES, Tokenizer
from distkv.launch.launch import launch
from distkv.models.shapes import shape_folder
from distkv.reporting.kv_formula import kv_formula
from distkv.reporting.machine import machine_facts
from distkv.reporting.out_file import check_out_file, check_plot_file
from distkv.sampling_params import MAX_LOGPROBS, SamplingParams
from distkv.storage.dtypes import ITEM_BYTES, torch_dtype
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import pages_for
from distkv.storage.process_limits import available_bytes
from distkv.stress.reference import Reference
from distkv.stress.report import print_table, write_json, write_plot
from distkv.stress.stage import Stage, run_stage
from distkv.stress.verify import Verdict, compare_runs, compare_with_reference
from distkv.stress.view import StressView
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.weights import DummySource, SafetensorsSource

PREFILL_STEP = 2048  # tokens of a step, unless given
RANDOM_STEP = 256  # with random KV only the last page of the prompt is read, and a small window shall hold a step
PLOT_STAGES = 4
WARM_UP = 32  # tokens


@dataclass(frozen=True)
class StressOptions:
    """What to run; see `distkv stress --help`. None leaves the choice to `run`."""

    context: int  # tokens
    new_tokens: int  # at least 2
    model: Path | None  # either this
    shape: str | None  # or that, see `distkv.models.shapes`
    fill: str | None  # "prefill" or "random"
    stages: int | None  # contexts that are run, each half of the next
    seed: int
    verify: bool
    json_file: Path | None
    plot_file: Path | None
    max_num_batched_tokens: int | None
    engine: EngineOptions  # further ones


def run(options: StressOptions) -> bool:
    """Runs, measures, verifies and reports; returns whether nothing was found to be wrong.

    Raises DistKVError, before anything runs, for options that cannot be used.
    """
    synthetic_fill = _check(options)
    console = Console(highlight=False)
    with _model_folder(options) as folder:
        model = ModelConfig.load(folder)
        config = _config(options, folder, synthetic_fill)
        free = _free_bytes(config)
        with closing(launch(config)) as engine:
            info = engine.info
            resident = _all_resident(config, info)
            is_small = _kv_bytes(resident) <= free // 2
            has_reference = synthetic_fill and config.kv_policy is None
            if options.verify and not is_small and not has_reference:
                raise ConfigError(
                    f"--verify needs all KV pages in memory, {_kv_bytes(resident)} bytes, and at most half of the "
                    f"{free} that are free may be taken; lower --context, or use --fill random, no codec and no policy"
                )
            _check_room(options, info)
            requests = _requests(options, _prompt(folder, model, options, synthetic_fill), synthetic_fill)
            stages = _run_stages(console, engine, requests)
        facts = _facts(options, config, model, synthetic_fill)
        print_table(console, info, stages, _formula(model, config, info))
        console.print(f"peak memory of this process: {facts['peak_rss_bytes'] / 2**30:.2f} GiB")
        if options.json_file is not None:  # now, since a verification may take long
            write_json(options.json_file, facts, info, stages, None)
        if options.plot_file is not None:
            write_plot(options.plot_file, info, stages, _title(facts))
        del engine  # and with it the weights
        verdict = _verify(console, config, model, stages, resident if is_small else None) if options.verify else None
        if verdict is not None and options.json_file is not None:
            write_json(options.json_file, facts, info, stages, verdict)
    if verdict is None:
        console.print("done, not verified; --verify compares the answers")
        return True
    console.print(f"{'verified' if verdict.passed else 'WRONG'}: {verdict.text}", soft_wrap=True)
    return verdict.passed


def _check(options: StressOptions) -> bool:
    """Raises ConfigError for options that contradict each other; returns whether the fill is random."""
    if (options.model is None) == (options.shape is None):
        raise ConfigError("give exactly one of --model and --shape")
    if options.fill not in (None, "prefill", "random"):
        raise ConfigError(f"--fill is {options.fill!r}; use prefill or random")
    check_out_file(options.json_file)
    check_plot_file(options.plot_file)
    synthetic_fill = options.fill == "random" or (options.fill is None and options.shape is not None)
    if options.seed and options.model is not None and not synthetic_fill and _has_tokenizer(options.model):
        raise ConfigError("--seed has no part in a text that a model reads; leave it out, or use --fill random")
    return synthetic_fill


def _check_room(options: StressOptions, info: EngineInfo) -> None:
    """Raises CapacityError, before the shorter stages run, when the longest could not."""
    needed = pages_for(options.context + options.new_tokens - 1, info.page_size)
    held = info.num_pages + info.num_host_pages + info.num_disk_pages
    if needed > held:
        raise CapacityError(
            f"{options.context} tokens and {options.new_tokens} more take {needed} KV pages, "
            f"{info.bytes_of(needed)} bytes, and the tiers hold {held}; {room_for(info, needed)}, or lower "
            f"--context to {held * info.page_size + 1 - options.new_tokens}"
        )


def _model_folder(options: StressOptions) -> AbstractContextManager[Path]:
    if options.shape is not None:
        return shape_folder(options.shape)
    assert options.model is not None
    return nullcontext(options.model)


def _config(options: StressOptions, folder: Path, synthetic_fill: bool) -> EngineConfig:
    page = options.engine["page_size"] * options.engine["decode_context_parallel_size"]
    step = max(RANDOM_STEP, page) if synthetic_fill else PREFILL_STEP
    engine: EngineOptions = {
        **options.engine,
        "max_model_len": options.context + options.new_tokens,
        "max_num_seqs": 1,
        "max_num_batched_tokens": step if options.max_num_batched_tokens is None else options.max_num_batched_tokens,
        "load_format": "auto" if options.shape is None else "dummy",
        "seed": options.seed,
        "enable_prefix_caching": False,  # what it reads it has written itself
    }
    return EngineConfig(folder, **engine)


def _prompt(folder: Path, model: ModelConfig, options: StressOptions, synthetic_fill: bool) -> list[int]:
    """A real text where there is a tokenizer and the model reads it, else random tokens."""
    if not synthetic_fill and _has_tokenizer(folder):
        return _text(Tokenizer(folder), options.context)
    generator = random.Random(options.seed)
    return [generator.randrange(model.vocab_size) for _ in range(options.context)]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _text(tokenizer: Tokenizer, count: int) -> list[int]:
    """`count` tokens of the sources of Python's standard library."""
    token_ids: list[int] = []
    for path in cycle(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        if len(token_ids) >= count:
            break
        token_ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace") + "\n")
    return token_ids[:count]


def _requests(options: StressOptions, prompt: list[int], synthetic_fill: bool) -> list[EngineRequest]:
    """One for each stage, the longest last."""
    stages = options.stages
    if stages is None:
        stages = 1 if options.plot_file is None else PLOT_STAGES
    params = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=options.new_tokens, logprobs=MAX_LOGPROBS, seed=options.seed
    )
    contexts = sorted({max(1, options.context >> halvings) for halvings in range(stages)})
    return [
        EngineRequest(
            request_id=str(context),
            prompt_token_ids=prompt[:context],
            params=params,
            max_tokens=options.new_tokens,
            seed=options.seed,
            synthetic_kv_seed=options.seed if synthetic_fill else None,
        )
        for context in contexts
    ]


def _run_stages(console: Console, engine: EngineClient, requests: list[EngineRequest]) -> list[Stage]:
    """Runs the requests one after the other, and the first tokens of the first one before them, unseen, to warm up."""
    stages: list[Stage] = []
    first = requests[0]
    short = msgspec.structs.replace(first, prompt_token_ids=first.prompt_token_ids[:WARM_UP], max_tokens=2)
    run_stage(engine, short, lambda sample: None)
    with StressView(console, engine.info) as view:
        for request in requests:
            view.stage(len(request.prompt_token_ids), request.max_tokens)
            stages.append(run_stage(engine, request, view.watch))
    return stages


def _free_bytes(config: EngineConfig) -> int:
    """Memory for KV pages, as far as this process can see it: of the GPUs where there are any, else of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] * config.tensor_parallel_size
    return available_bytes()


def _all_resident(config: EngineConfig, info: EngineInfo) -> EngineConfig:
    """The same engine with all pages on the device, and with copies of them on the host where codes need that."""
    num_pages = pages_for(info.max_model_len, info.page_size)
    host = 0 if config.kv_cache_dtype == "auto" else num_pages * info.cold_page_bytes
    return replace(
        config, device_kv_bytes=num_pages * info.page_bytes, host_kv_bytes=host, disk_kv_bytes=None,
        cache_dir=None, staging_pages=None, trace=None,
    )  # fmt: skip


def _kv_bytes(config: EngineConfig) -> int:
    assert isinstance(config.device_kv_bytes, int) and isinstance(config.host_kv_bytes, int)
    return config.device_kv_bytes + config.host_kv_bytes


def _verify(
    console: Console, config: EngineConfig, model: ModelConfig, stages: list[Stage], resident: EngineConfig | None
) -> Verdict:
    """Against a run with `resident`, if it is given and its memory can be had, else against the float64 reference."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    requests = [stage.request for stage in stages]
    if resident is not None:
        console.print("verifying by a run with all pages on the device ...")
        try:
            with closing(launch(resident)) as engine:
                return compare_runs(stages, _run_stages(console, engine, requests))
        except CapacityError:
            if config.kv_policy is not None or any(request.synthetic_kv_seed is None for request in requests):
                raise
    console.print("verifying by a float64 reference ...")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch_dtype(model.run_dtype(config.dtype))
    dummy = config.load_format == "dummy"
    with DummySource(config.seed, dtype, device) if dummy else SafetensorsSource(Path(config.model)) as source:
        return compare_with_reference(stages, Reference(source, model, dtype, device, config.plan_page_size))


def _facts(options: StressOptions, config: EngineConfig, model: ModelConfig, synthetic_fill: bool) -> dict[str, Any]:
    """What goes into the JSON file beside the figures."""
    given = asdict(options)
    given |= given.pop("engine")
    return {
        "benchmark": "stress",
        **machine_facts(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "fill": "random" if synthetic_fill else "prefill",
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "model": options.shape or Path(config.model).name,
        "shape": {
            "layers": model.num_hidden_layers,
            "hidden_size": model.hidden_size,
            "query_heads": model.num_attention_heads,
            "kv_heads": model.num_key_value_heads,
            "head_dim": model.head_dim,
            "dtype": model.run_dtype(config.dtype),
        },
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _title(facts: dict[str, Any]) -> str:
    ranks = facts["options"]["tensor_parallel_size"]
    return (
        f"{facts['model']}, {facts['shape']['dtype']}, {facts['fill']} fill, {ranks} rank{'s' * (ranks > 1)}\n"
        f"{facts['machine']}, {facts['date']}"
    )


def _formula(model: ModelConfig, config: EngineConfig, info: EngineInfo) -> str:
    """The KV bytes per token below the device, written out."""
    dtype, layers = model.run_dtype(config.dtype), model.num_hidden_layers
    heads = info.kv_bytes_per_token // (2 * layers * model.head_dim * ITEM_BYTES[dtype])
    copies = "" if heads == model.num_key_value_heads else " (with those that several ranks hold)"
    return kv_formula(PageSpec(layers, heads, config.page_size, model.head_dim, dtype, config.kv_cache_dtype), copies)
