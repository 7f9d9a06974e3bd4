"""The commands `distkv bench ...`. Heavy imports wait until a command needs them, as in `main.py`."""

from pathlib import Path
from typing import Annotated

import typer

from distkv.bench.options import BenchOptions
from distkv.commands.bench_gpu import bench_gpu, bench_kernels
from distkv.commands.options import Model, engine, measuring, model_folder, path_option, sized, spread
from distkv.config import EngineOptions
from distkv.option_checks import parse_bytes

bench = typer.Typer(help="Measure on this machine.")


@bench.command("decode")
@spread
def bench_decode(
    *,
    model: Model = "smollm2",
    context: Annotated[list[int], typer.Option(help="Context in tokens; may be given again.")] = sized(
        [128, 1024, 4096], [128, 1024]
    ),
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode at each context.", min=1)] = sized(32, 16),
    options: Annotated[EngineOptions, engine("dtype", "num_threads", "trace", dtype="bfloat16")],
    measured: Annotated[BenchOptions, measuring()],
) -> None:
    """Prefill tokens/s and decode ms/token of one request at several contexts."""
    from distkv.bench.decode import run

    run(
        model_folder(model), context, new_tokens, options["dtype"], options["num_threads"], options["trace"], measured,
    )  # fmt: skip


@bench.command("cache")
@spread
def bench_cache(
    *,
    model: Model = "smollm2",
    length: Annotated[list[int], typer.Option(help="Tokens to make; may be given again.")] = sized(
        [32, 64, 128, 256], [16, 32, 64]
    ),
    options: Annotated[EngineOptions, engine("page_size", "num_threads", page_size=64)],
    plot_file: Annotated[Path | None, path_option("--plot", help="Also draw ms per token here, a .png.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 2))],
) -> None:
    """Tokens/s and rows of attention without a KV cache, with one that is concatenated, and with pages; exit code 1
    when answers or counted rows are wrong."""
    from distkv.bench.cache import run

    if not run(model_folder(model), length, options["page_size"], options["num_threads"], plot_file, measured):
        raise typer.Exit(1)


@bench.command("offload")
@spread
def bench_offload(
    *,
    model: Model = "smollm2",
    context: Annotated[int, typer.Option(help="Context in whole pages, one short of the model's limit.")] = sized(
        4096, 2048
    ),
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode in each turn.", min=1)] = sized(32, 8),
    options: Annotated[EngineOptions, engine("dtype", "kv_cache_dtype", "page_size", "num_threads", dtype="bfloat16")],
    disk_kv_codec: Annotated[str, typer.Option(help="How pages are stored on disk: none or lossless.")] = "none",
    cache_dir: Annotated[Path | None, path_option(help="Folder of the disk tier; else a temporary one.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(5, 2))],
) -> None:
    """Decode ms/token with the context on the device, half or wholly on the host, and on disk."""
    from distkv.bench.offload import Sizes, run

    sizes = Sizes(
        model_folder(model), context, new_tokens, options["dtype"], options["page_size"], options["kv_cache_dtype"],
        disk_kv_codec,
    )  # fmt: skip
    run(sizes, options["num_threads"], cache_dir, measured)


@bench.command("cpu-attention")
@spread
def bench_cpu_attention(
    *,
    model: Model = "smollm2",
    context: Annotated[int, typer.Option(help="Context, four times the device's window; of any length.")] = sized(
        32768, 8192
    ),
    link: Annotated[list[str], typer.Option(help="Rate of the simulated link; may be given again.")] = sized(
        ["1GB", "2GB", "4GB"], ["1GB"]
    ),
    share: Annotated[
        list[str], typer.Option(help="Share of the pages for the CPU, a number or auto; may be given again.")
    ] = sized(["0.25", "0.5", "auto"], ["0.5", "auto"]),
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode in each turn.", min=1)] = sized(16, 8),
    options: Annotated[EngineOptions, engine("dtype", "page_size", "num_threads", dtype="bfloat16", num_threads=1)],
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 2))],
) -> None:
    """Decode at four times the device's window, the CPU attending to a share of the pages, over simulated links.

    The device and the CPU's share have --num-threads each. Weights are made up; all shares draw the same tokens.
    """
    from distkv.bench.cpu_attention import Sizes, run

    sizes = Sizes(model_folder(model), context, new_tokens, options["dtype"], options["page_size"])
    rates = [parse_bytes("--link", one) for one in link]
    run(sizes, rates, share, options["num_threads"], measured)


@bench.command("disk-codec")
@spread
def bench_disk_codec(
    *,
    model: Model = "smollm2",
    context: Annotated[int, typer.Option(help="Tokens of the text, in whole pages.")] = sized(4096, 1024),
    text: Annotated[Path | None, path_option(help="A text file; else the sources of Python's library.")] = None,
    options: Annotated[EngineOptions, engine("dtype", "page_size", "num_threads", dtype="bfloat16")],
    cache_dir: Annotated[Path | None, path_option(help="Where to make the folder of the disk tier.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(5, 2))],
) -> None:
    """Size of a text's KV pages on disk, as they are and without loss, and how fast they come back."""
    from distkv.bench.disk_codecs import run

    run(
        model_folder(model), context, text, options["dtype"], options["page_size"], options["num_threads"], cache_dir,
        measured,
    )  # fmt: skip


@bench.command("prefix")
@spread
def bench_prefix(
    *,
    model: Model = "smollm2",
    prefix_tokens: Annotated[
        list[int], typer.Option(help="Tokens of the prefix, in whole pages; may be given again.")
    ] = sized([512, 1024, 2048, 4096, 7680], [512]),
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer, which are compared.", min=1)] = 16,
    options: Annotated[EngineOptions, engine("dtype", "page_size", "num_threads", dtype="bfloat16")],
    cache_dir: Annotated[Path | None, path_option(help="Where to make the folder of the disk tier.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(5, 2))],
) -> None:
    """Time to first token with a prefix on no tier, device, host, or disk after a restart; exit code 1 when wrong."""
    from distkv.bench.prefix import run

    if not run(
        model_folder(model), prefix_tokens, answer_tokens, options["dtype"], options["page_size"],
        options["num_threads"], cache_dir, measured,
    ):  # fmt: skip
        raise typer.Exit(1)


@bench.command("book")
@spread
def bench_book(
    *,
    model: Model = "smollm2",
    book_tokens: Annotated[int, typer.Option(help="Tokens of the text.", min=1)] = sized(7168, 2048),
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer, which are compared.", min=1)] = 16,
    questions: Annotated[
        list[int],
        typer.Option(help="Questions at a time; may be given again, and 1 is what others are held against.", min=1),
    ] = sized([1, 4, 16, 64], [1, 4, 16]),
    options: Annotated[EngineOptions, engine("dtype", "page_size", "num_threads", dtype="bfloat16", page_size=16)],
    cache_dir: Annotated[Path | None, path_option(help="Where to make the folder of the disk tier.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 1))],
) -> None:
    """Bytes per answer and tokens/s of many questions about one text on the host or on disk; exit code 1 when an answer
    is not the one to its question asked alone."""
    from distkv.bench.book import Sizes, run

    sizes = Sizes(
        model_folder(model), book_tokens, answer_tokens, tuple(dict.fromkeys(questions)), options["page_size"],
        options["dtype"],
    )  # fmt: skip
    if not run(sizes, options["num_threads"], cache_dir, measured):
        raise typer.Exit(1)


@bench.command("serve-offline")
@spread
def bench_serve_offline(
    *,
    model: Model = "smollm2",
    num_requests: Annotated[int, typer.Option(help="Requests, all submitted at once.", min=1)] = sized(64, 8),
    longest_prompt: Annotated[int, typer.Option(help="Most tokens of a prompt; lengths are lognormal.")] = sized(
        1024, 128
    ),
    longest_answer: Annotated[int, typer.Option(help="Most tokens of an answer; lengths are uniform.")] = sized(64, 16),
    seed: Annotated[int, typer.Option(help="Of the lengths.")] = 0,
    # with pages of 256, half of these requests' KV were pages being written, which cannot be cold
    options: Annotated[EngineOptions, engine("page_size", "num_threads", page_size=64)],
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 2))],
) -> None:
    """Throughput of many requests with all, half and a quarter of their KV on the device; exit code 1 when answers
    differ.

    The lengths are such that ten runs of the demo model come to an end within minutes on two cores.
    """
    from distkv.bench.serve_offline import run

    if not run(
        model_folder(model), num_requests, longest_prompt, longest_answer, seed, options["page_size"],
        options["num_threads"], measured,
    ):  # fmt: skip
        raise typer.Exit(1)


@bench.command("stages")
@spread
def bench_stages(
    *,
    model: Model = "smollm2",
    stages: Annotated[
        list[int],
        typer.Option(help="Stages of one rank each; may be given again, and the first is compared with.", min=1),
    ] = sized([1, 2], [1, 2]),
    requests: Annotated[list[int], typer.Option(help="Requests at a time; may be given again.", min=1)] = sized(
        [1, 4, 16], [1, 4]
    ),
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = sized(2048, 512),
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode of each answer.", min=1)] = sized(32, 16),
    options: Annotated[
        EngineOptions,
        engine("dtype", "page_size", "num_threads", "ray_address", dtype="bfloat16", page_size=64, num_threads=1),
    ],
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 1))],
) -> None:
    """Tokens/s of prompts and answers with layers split over stages, and how busy the stages are; exit code 1 when
    answers differ.

    Each stage is a rank on Ray with the same number of threads; one stage alone runs in this process.
    """
    from distkv.bench.stages import Sizes, run

    sizes = Sizes(
        model_folder(model), tuple(dict.fromkeys(stages)), tuple(dict.fromkeys(requests)), prompt_tokens, new_tokens,
        options["dtype"], options["page_size"], options["ray_address"],
    )  # fmt: skip
    if not run(sizes, options["num_threads"], measured):
        raise typer.Exit(1)


@bench.command("scheduler")
@spread
def bench_scheduler(
    *,
    num_seqs: Annotated[int, typer.Option(help="Sequences that run at a time.", min=1)] = sized(256, 64),
    context: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = sized(100_000, 20_000),
    steps: Annotated[int, typer.Option(help="Steps of each turn.", min=1)] = sized(300, 100),
    options: Annotated[EngineOptions, engine("page_size")],
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 2))],
) -> None:
    """Milliseconds that a step costs the leader, with ranks that do nothing; exit code 1 when a token is missing."""
    from distkv.bench.scheduler import run

    if not run(num_seqs, context, steps, options["page_size"], measured):
        raise typer.Exit(1)


@bench.command("paging")
@spread
def bench_paging(
    *,
    model: Model = "smollm2",
    num_requests: Annotated[int, typer.Option(help="Requests, all submitted at once.", min=1)] = sized(64, 24),
    max_model_len: Annotated[
        int, typer.Option(help="Most tokens of a request; lengths are in proportion to it.", min=64)
    ] = sized(2048, 512),
    reservations: Annotated[
        list[int],
        typer.Option(help="KV memory, in requests of this length that it holds; may be given again.", min=1),
    ] = sized([2, 4], [2]),
    seed: Annotated[int, typer.Option(help="Of the lengths.")] = 0,
    options: Annotated[EngineOptions, engine("dtype", "page_size", "num_threads", dtype="bfloat16", page_size=16)],
    plot_file: Annotated[Path | None, path_option("--plot", help="Also draw what runs over time here, a .png.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 1))],
) -> None:
    """Requests at a time, waste and throughput with KV memory reserved ahead and with pages on demand; exit code 1 when
    answers differ."""
    from distkv.bench.paging import Sizes, run

    sizes = Sizes(
        model_folder(model), num_requests, max_model_len, tuple(dict.fromkeys(reservations)), options["page_size"],
        options["dtype"], seed,
    )  # fmt: skip
    if not run(sizes, options["num_threads"], plot_file, measured):
        raise typer.Exit(1)


@bench.command("gqa")
@spread
def bench_gqa(
    *,
    shape: Annotated[
        str, typer.Option(help="Random weights: tiny, small, llama-3.2-1b, llama-3-8b or llama-3-70b.")
    ] = "small",
    context: Annotated[int, typer.Option(help="Long context with the answer, in whole pages.", min=16)] = sized(
        8192, 4096
    ),
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer, less than a page.", min=3)] = sized(48, 24),
    mha_requests: Annotated[
        int, typer.Option(help="KV memory, in requests of the long context that it holds with MHA.", min=1)
    ] = sized(2, 1),
    options: Annotated[EngineOptions, engine("dtype", "page_size", "num_threads", dtype="bfloat16", page_size=64)],
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 1))],
) -> None:
    """KV bytes, decode time and requests at a time with as many KV heads as query heads, fewer, and one; exit code 1
    when bytes or requests are not those of the formula."""
    from distkv.bench.gqa import Sizes, run

    sizes = Sizes(shape, context, new_tokens, mha_requests, options["page_size"], options["dtype"])
    if not run(sizes, options["num_threads"], measured):
        raise typer.Exit(1)


@bench.command("quality")
@spread
def bench_quality(
    *,
    model: Model = "smollm2",
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTIONS",
            help='Row to measure, by dtype, kv_cache_dtype, attention_policy and page_size: "kv_cache_dtype=int4; '
            'page_size=64", or full; may be given again. Without it, those of docs/quality.md.',
        ),
    ] = None,
    text: Annotated[Path | None, path_option(help="File to read instead of licences and sources.")] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of each text.", min=2)] = sized(8191, 2047),
    read_tokens: Annotated[
        int, typer.Option(help="First tokens of a text that are its prompt; those behind them are scored.", min=1)
    ] = sized(1024, 256),
    shape: Annotated[str, typer.Option(help="Random weights to time steps with, as in distkv stress.")] = "small",
    context: Annotated[list[int], typer.Option(help="Context to time steps at; may be given again.", min=4096)] = sized(
        [8192, 65536, 524288], [8192, 65536]
    ),
    new_tokens: Annotated[int, typer.Option(help="Tokens to time at each context.", min=1)] = sized(8, 4),
    options: Annotated[EngineOptions, engine("num_threads")],
    plot_file: Annotated[Path | None, path_option("--plot", help="Also draw quality over bytes here, a .png.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(2, 1))],
) -> None:
    """What codecs and policies of attention cost: perplexity and divergence on long texts, questions about long texts,
    bytes and ms per token at contexts beyond the model's."""
    from distkv.bench.quality.quality import Sizes, run

    sizes = Sizes(
        model_folder(model), tuple(row or ()), text_tokens, read_tokens, text, shape, tuple(dict.fromkeys(context)),
        new_tokens,
    )  # fmt: skip
    run(sizes, options["num_threads"], plot_file, measured)


@bench.command("spec")
@spread
def bench_spec(
    *,
    model: Model = "smollm2",
    method: Annotated[
        list[str] | None,
        typer.Option(help="How to draft: ngram, say; may be given again. Else all that need no other model."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the text, in whole pages.")] = sized(4096, 1024),
    below: Annotated[
        list[int], typer.Option(help="Percent of the text's pages below the device; may be given again.")
    ] = sized([0, 50, 95], [0, 95]),
    tier: Annotated[list[str], typer.Option(help="Where they lie, host or disk; may be given again.")] = sized(
        ["host", "disk"], ["disk"]
    ),
    task: Annotated[list[str] | None, typer.Option(help="Task to measure, by its name; may be given again.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = sized(128, 48),
    options: Annotated[EngineOptions, engine("dtype", "page_size", "num_threads", dtype="bfloat16", page_size=64)],
    cache_dir: Annotated[Path | None, path_option(help="Where to make the folder of the disk tier.")] = None,
    measured: Annotated[BenchOptions, measuring(repeats=sized(3, 1))],
) -> None:
    """Tokens/s with drafts and without, where a part of the context lies below the device, at tasks that quote it and
    others; exit code 1 when answers differ."""
    from distkv.bench.speculation.speculation import Sizes, run

    sizes = Sizes(
        model_folder(model), tuple(method or ()), context, tuple(dict.fromkeys(below)), tuple(dict.fromkeys(tier)),
        tuple(task or ()), new_tokens, options["dtype"], options["page_size"],
    )  # fmt: skip
    if not run(sizes, options["num_threads"], cache_dir, measured):
        raise typer.Exit(1)


@bench.command("plan")
@spread
def bench_plan(
    *,
    shape: Annotated[str, typer.Option(help="Model of random weights, as in distkv stress.")] = "small",
    context: Annotated[
        list[int], typer.Option(help="Context to plan and to measure, in pages of 256 tokens; may be given again.")
    ] = sized([4096, 8192, 16384, 49152], [2048, 4096, 8192, 12288]),
    probe: Annotated[
        list[int], typer.Option(help="Context that measures the machine; to be given twice, for two of them.")
    ] = sized([2048, 32768], [1024, 10240]),
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode in each turn.", min=2)] = sized(24, 16),
    options: Annotated[EngineOptions, engine("num_threads")],
    measured: Annotated[BenchOptions, measuring(repeats=sized(5, 3))],
) -> None:
    """What distkv plan says of a decode step beside what it takes, with KV on the device, the host and on disk.

    The machine is measured in the same turns, at other contexts than those that are planned.
    It runs on the CPU.
    """
    from distkv.bench.plan import run

    run(shape, context, probe, new_tokens, options["num_threads"], measured)


@bench.command("peers")
@spread
def bench_peers(
    *,
    model: Model = "smollm2",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=PYTHON]",
            help="Engine to compare with: vllm, vllm-eager (not compiled) or hf (transformers), and the Python it is "
            "installed for unless that is this one; may be given again.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Part to measure: single, mixed or http; may be given again.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a single prompt (128, 1024, 4096, 8000; 128, 1024 with --quick); may be given again.", min=1
        ),
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(help="Streams at a time over HTTP (1, 8, 32; 1, 8 with --quick); may be given again.", min=1),
    ] = None,
    time_limit: Annotated[int, typer.Option(help="Seconds that a start or a turn may take.", min=1)] = 600,
    out: Annotated[Path | None, path_option(help="Folder for peers.json, .md, .png and the engines' logs.")] = None,
    options: Annotated[
        EngineOptions,
        engine("dtype", "num_threads", "device_kv_bytes", dtype="bfloat16", device_kv_bytes="2GiB"),
    ],
    measured: Annotated[BenchOptions, measuring()],
) -> None:
    """The same work on distkv and on other engines, in turns: one request, many, and through HTTP servers.

    A peer that is missing or fails is left out, and the report says why.
    """
    from distkv.bench.parts import check_effect
    from distkv.bench.peers.compare import run
    from distkv.bench.peers.workloads import sizes

    for name, value in (("context", (context, "single")), ("streams", (streams, "http"))):
        check_effect({name: value}, only or [])
    run(
        model_folder(model), peer or [], only or [], sizes(measured.quick, context, streams), options["dtype"],
        parse_bytes("--device-kv-bytes", options["device_kv_bytes"]), options["num_threads"], time_limit, out, measured,
    )  # fmt: skip


bench.command("kernels")(bench_kernels)
bench.command("gpu")(bench_gpu)
