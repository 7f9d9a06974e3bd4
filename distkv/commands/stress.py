"""`distkv stress`: one context as long as one likes."""

from pathlib import Path
from typing import Annotated

import typer

from distkv.commands.options import JsonFile, engine, model_folder, path_option, spread
from distkv.config import EngineOptions

StressFlags = Annotated[
    EngineOptions,
    engine(
        "device_kv_bytes", "host_kv_bytes", "disk_kv_bytes", "cache_dir", "staging_pages", "page_size",
        "tensor_parallel_size", "decode_context_parallel_size", "ray_address", "dtype", "kv_cache_dtype", "num_threads",
        "trace", "attention_policy", "attention_audit",
    ),
]  # fmt: skip


@spread
def stress(
    *,
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
    options: StressFlags,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a step; 2048, or with random KV 256 or a page.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, prompt and random KV.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with a run without tiers, or float64.")] = False,
    json_file: JsonFile = None,
    plot_file: Annotated[Path | None, path_option("--plot", help="Also draw them here, a .png.")] = None,
) -> None:
    """Run one long context over all tiers, measure it, and verify the answer; exit code 1 when it is wrong."""
    from distkv.stress.stress import StressOptions, run

    folder = None if model is None else model_folder(model)
    if not run(
        StressOptions(
            context, new_tokens, folder, shape, fill, stages, seed, verify, json_file, plot_file,
            max_num_batched_tokens, options,
        )
    ):  # fmt: skip
        raise typer.Exit(1)
