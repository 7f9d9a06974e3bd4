"""Those of the commands `distkv bench ...` that need a GPU; `bench.py` adds them to the others."""

from typing import Annotated

import typer

from distkv.bench.options import BenchOptions
from distkv.commands.options import measuring, sized, spread


@spread
def bench_kernels(
    *,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Part to measure: ceilings, decode, prefill, products, elementwise or pages; may be given again."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sequences of decode; may be given again.", min=1, show_default="1, 8, 32; 1 with --quick"),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of each; may be given again.",
            min=1,
            show_default="8192, 32768, 131072; 8192 with --quick",
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of prefill; may be given again.",
            min=1,
            show_default="8192, 32768; 8192 with --quick",
        ),
    ] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(20, 5))],
) -> None:
    """Each Triton kernel beside what the GPU gives at most, at the shape of Llama-3-8B in bfloat16.

    Needs a CUDA device with 45 GB of free memory and 3 GB on the host.
    Of decode, what does not fit is left out.
    By estimate it takes four minutes; --only is for who works on one kernel.
    """
    from distkv.bench.kernels import run

    run(only or [], batch or [], context or [], prompt or [], measured)


@spread
def bench_gpu(
    *,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Part to measure: streaming, model or residency; may be given again."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens on the device while a longer context streams.",
            min=1,
            show_default="65536; 16384 with --quick",
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Context that streams; may be given again.",
            min=1,
            show_default="65536, 262144, 1048576; 16384, 65536 with --quick",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model that streams; else those that the host has room for.", min=1)
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode at each context.", min=2)] = sized(32, 8),
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 2))],
) -> None:
    """Streaming, a whole model beside transformers, and equal bits, on random weights of Llama-3-8B's shape.

    Needs a CUDA device with 45 GB of free memory and 40 GB on the host.
    Streaming takes four of the layers at most, so that a million tokens fit.
    By estimate it takes seven minutes; --only is for who has a time limit.
    """
    from distkv.bench.gpu import CONTEXTS, QUICK_CONTEXTS, QUICK_WINDOW, WINDOW, Sizes, run
    from distkv.bench.parts import check_effect

    only = only or []
    for name, value in (("window", window), ("context", context), ("layers", layers)):
        check_effect({name: (value, "streaming")}, only)
    usual = (QUICK_WINDOW, QUICK_CONTEXTS) if measured.quick else (WINDOW, CONTEXTS)
    sizes = Sizes(window or usual[0], tuple(context or usual[1]), layers, new_tokens)
    run(only, sizes, measured)
