"""`distkv batch`: many requests from a file."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from distkv.commands.options import Model, engine, model_folder, path_option, spread, surviving
from distkv.config import EngineConfig, EngineOptions
from distkv.server.options import ServerOptions

RANK_FAILURES = 20  # that are made good unless the user says otherwise
BatchFlags = Annotated[
    EngineOptions,
    engine(*(field.name for field in fields(EngineConfig) if field.name not in ("model", "max_queued_requests"))),
]


@spread
def batch(
    *,
    model: Model,
    input_file: Annotated[
        Path, path_option("--input", "-i", help="Requests in OpenAI's batch-file format, one a line.")
    ],
    output: Annotated[Path, path_option("--output", "-o", help="Gets the answers, in the order in which they end.")],
    errors: Annotated[
        Path | None, path_option("--errors", help="Gets the lines that fail; OUTPUT.errors.jsonl beside the output.")
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try the lines of the error file again that were refused.")
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that lines may call the model by, as given by default; may be given several times."),
    ] = None,
    options: BatchFlags,
) -> None:
    """Answer a file of requests; the same command once more goes on where it was stopped.

    Exit code 1 when some lines have failed."""
    from distkv.batch.files import BatchFiles
    from distkv.batch.run import BatchOptions, run

    names = ServerOptions(served_model_name=served_model_name).served_model_name or [model]
    files = BatchFiles(input_file, output, errors)
    code = run(
        lambda: model_folder(model),
        files,
        BatchOptions(names, retry_errors),
        surviving(options, RANK_FAILURES),
    )
    if code:
        raise typer.Exit(code)
