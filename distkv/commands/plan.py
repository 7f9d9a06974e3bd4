"""`distkv plan`: what fits where, and what a step costs."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distkv.commands.options import Fields, JsonFile, path_option, spread
from distkv.errors import ConfigError
from distkv.option_checks import parse_bytes
from distkv.server.options import ServerOptions

if TYPE_CHECKING:
    from distkv.planner.hardware import Hardware
    from distkv.planner.options import PlanOptions

SERVER_FIELDS = ("host", "port", "api_key", "uvicorn_log_level")

SERVER_FLAGS = {f"--{name.replace('_', '-')}" for name in SERVER_FIELDS}
GUESS_FLAGS = {"--kinds", "--guess", "--context", "--dtype", "--json"}
TABLE_FLAGS = {"--solve", "--ms-per-token", "--price-per-hour", "--kinds", "--guess", "--layouts", "--json", "--plot"}

ServerFlags = Annotated[ServerOptions, Fields(ServerOptions, SERVER_FIELDS, {})]


@spread
def plan(
    call: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder or config.json, or a name such as llama-3.1-8b; a wrong one has them listed."
        ),
    ] = None,
    *,
    context: Annotated[str, typer.Option(help="Tokens of a request, such as 4k,128k; k is 1024.")] = "4k",
    concurrency: Annotated[str, typer.Option(help="Requests at a time, such as 1,8,32.")] = "1",
    gpu: Annotated[
        list[str] | None,
        typer.Option(metavar="<gpu>", help="h100, say, or figures by hand (docs/planning.md); may be given again."),
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measured", help="Plan for this machine, measured now, and for --gpu where that is given.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", "--tensor-parallel-size", help="GPUs that share each layer, such as 1,2,4,8."),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="Stages that share out the layers, of --gpus each.")
    ] = None,
    decode_context_parallel_size: Annotated[
        int | None, typer.Option(help="Neighbouring GPUs of --gpus that share out a request's tokens.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines that the GPUs are in, evenly.")] = None,
    node: Annotated[
        str | None, typer.Option(help="One of them by hand: gpus=8,memory=1TiB,network=400GB (docs/planning.md).")
    ] = None,
    layouts: Annotated[bool, typer.Option("--layouts", help="Compare all layouts over the GPUs of --nodes.")] = False,
    cpu_attention: Annotated[
        str | None, typer.Option(help="Part of the pages that the CPU attends to: off, auto or a share.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Codes of KV below the device: fp8_e4m3, int8 or int4; auto is dtype.")
    ] = "auto",
    attention_policy: Annotated[
        str, typer.Option(help="Which pages a token reads: full, top_pages(share=0.1) (docs/policies.md).")
    ] = "full",
    device_kv_bytes: Annotated[
        str | None, typer.Option(help="KV memory on the devices, all together; else what is left.")
    ] = None,
    host_kv_bytes: Annotated[
        str, typer.Option("--host-kv-bytes", "--host-memory", help="CPU memory for KV, such as 256GiB.")
    ] = "0",
    disk_kv_bytes: Annotated[
        str, typer.Option("--disk-kv-bytes", "--disk", help="Disk for KV below that, such as 2TiB.")
    ] = "0",
    disk_bandwidth: Annotated[
        str | None, typer.Option(help="Bytes per second that the disk reads, such as 7GB.")
    ] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens of a page; the engine's default.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens of a step.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory that may be taken; the engine's default.")
    ] = None,
    solve: Annotated[
        bool, typer.Option("--solve", help="Find the smallest setup; memory and disk are what may be taken.")
    ] = False,
    ms_per_token: Annotated[float | None, typer.Option(help="With --solve, the most that a step may take.")] = None,
    price_per_hour: Annotated[
        list[str] | None,
        typer.Option(metavar="<price>", help="With --solve, such as h100=2.99; may be given again."),
    ] = None,
    kinds: Annotated[bool, typer.Option("--kinds", help="Compare MHA, GQA and MQA for this shape.")] = False,
    guess: Annotated[
        str | None, typer.Option(help="With --kinds, at GPT-4: layers=L,heads=H,head_dim=D,kv_heads=K.")
    ] = None,
    json_file: JsonFile = None,
    plot_file: Annotated[Path | None, path_option("--plot", help="Also draw them here, a .png.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve a page that plans, and its API; a model is what it begins with.")
    ] = False,
    server: ServerFlags,
) -> None:
    """What a model's KV cache takes, what fits on which GPUs, and what a token costs then; runs nothing."""
    if serve:
        _refuse(_given(call) & TABLE_FLAGS, "is for tables, and --serve for a page; leave one of them out")
    else:
        _refuse(_given(call) & SERVER_FLAGS, "has an effect with --serve alone; add that, or leave it out")
        if model is None:
            raise ConfigError("no model is given; name one, such as llama-3.1-8b, or --serve a page to plan with")
        if disk_bandwidth is not None and "--disk-kv-bytes" not in _given(call):
            raise ConfigError("--disk-bandwidth is given without --disk-kv-bytes; add that, or leave it out")
    from distkv.planner.model_shape import UNPUBLISHED
    from distkv.planner.options import DEFAULT_MODEL, PlanOptions

    if kinds and model is not None and model.lower() == UNPUBLISHED:
        _refuse(_given(call) - GUESS_FLAGS, "has no effect on a guess; leave it out")

    fields = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "attention_policy": attention_policy,
        "device_kv_bytes": device_kv_bytes, "host_kv_bytes": host_kv_bytes, "disk_kv_bytes": disk_kv_bytes,
        "page_size": page_size, "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization, "pipeline_parallel_size": pipeline_parallel_size,
        "decode_context_parallel_size": decode_context_parallel_size, "cpu_attention": cpu_attention, "nodes": nodes,
    }  # fmt: skip
    options = PlanOptions(
        model=DEFAULT_MODEL if model is None else model,
        context=context,
        concurrency=concurrency,
        gpu=gpu,
        measured=_measured() if measured else None,
        gpus=gpus,
        node=node,
        layouts=layouts,
        disk_bandwidth=None if disk_bandwidth is None else parse_bytes("disk_bandwidth", disk_bandwidth),
        solve=solve,
        ms_per_token=ms_per_token,
        price_per_hour=price_per_hour,
        kinds=kinds,
        guess=guess,
        json_file=json_file,
        plot_file=plot_file,
        request={name: value for name, value in fields.items() if value is not None},
    )
    if serve:
        _serve(options, server)
    else:
        _show(options)


def _show(options: "PlanOptions") -> None:
    from rich.console import Console

    from distkv.planner.command import run

    run(Console(highlight=False), options)


def _serve(options: "PlanOptions", server: ServerOptions) -> None:
    from distkv.planner.model_shape import find_model
    from distkv.server.plans import HERE, PlanStart
    from distkv.server.serve_planner import serve_planner

    options.check()
    model, stdout = find_model(options.model), sys.stdout
    fields = options.page_start() | ({"gpu": HERE} if options.measured is not None else {})
    start = PlanStart(fields, model, [model.name], hardware=options.measured)
    with redirect_stdout(sys.stderr):  # uvicorn logs requests there
        serve_planner(start, server, lambda url: print(f"distkv plans at {url}/plan", file=stdout, flush=True))


def _measured() -> "Hardware":
    from distkv.bench.measured import measured_machine

    return measured_machine()


def _given(call: typer.Context) -> set[str]:
    """The options that stand on the command line, by their first names."""
    sources = {one.opts[0]: call.get_parameter_source(str(one.name)) for one in call.command.params}
    flags = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return {flag for flag in flags if flag.startswith("-")}


def _refuse(flags: set[str], why: str) -> None:
    if flags:
        raise ConfigError(f"{min(flags)} {why}")
