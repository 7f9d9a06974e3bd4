"""`distkv plan`: what fits where, and what a step costs."""

from typing import Annotated

import typer

from distkv.commands.options import JsonFile
from distkv.option_checks import parse_bytes


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder or config.json, or a name such as llama-3.1-8b; a wrong one has them listed."
        ),
    ],
    *,
    context: Annotated[str, typer.Option(help="Tokens of a request, such as 4k,128k; k is 1024.")] = "4k",
    concurrency: Annotated[str, typer.Option(help="Requests at a time, such as 1,8,32.")] = "1",
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="Such as h100, or memory=48GiB,bandwidth=900GB,matrix=200T,link=32GB; may be given again."),
    ] = None,
    gpus: Annotated[
        str,
        typer.Option("--gpus", "--tensor-parallel-size", help="GPUs that share the model, such as 1,2,4,8."),
    ] = "1",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    kv_dtype: Annotated[
        str, typer.Option(help="Of KV, to see what another would change: also fp8, int8 and int4.")
    ] = "auto",
    device_kv_bytes: Annotated[
        str | None, typer.Option(help="KV memory on the devices, all together; else what is left.")
    ] = None,
    host_kv_bytes: Annotated[
        str,
        typer.Option("--host-kv-bytes", "--host-memory", help="CPU memory for KV, such as 256GiB."),
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
    json_file: JsonFile = None,
) -> None:
    """What a model's KV cache takes, what fits on which GPUs, and what a token costs then; runs nothing."""
    from rich.console import Console

    from distkv.planner.command import PlanOptions, run

    given = {
        "page_size": page_size, "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
    }  # fmt: skip
    run(
        Console(highlight=False),
        PlanOptions(
            model, context, concurrency, gpu or ["h100"], gpus,
            {
                "dtype": dtype, "kv_dtype": kv_dtype, "device_kv_bytes": device_kv_bytes,
                "host_kv_bytes": host_kv_bytes, "disk_kv_bytes": disk_kv_bytes,
                **{name: value for name, value in given.items() if value is not None},
            },
            None if disk_bandwidth is None else parse_bytes("disk_bandwidth", disk_bandwidth),
            json_file,
        ),
    )  # fmt: skip
