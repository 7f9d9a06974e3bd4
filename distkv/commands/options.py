"""Options that several commands take, each with its help, and what a model may be given as."""

from pathlib import Path
from typing import Annotated

import typer

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


def model_folder(model: str) -> Path:
    """The folder of a model given as a path or as the name of one that can be fetched."""
    from distkv.models.fetch import MODELS, fetch_model

    return fetch_model(model) if model in MODELS and not Path(model).exists() else Path(model)
