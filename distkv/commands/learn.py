"""`distkv learn`: a page that explains, with figures of this machine."""

from pathlib import Path
from typing import Annotated

from distkv.bench.options import BenchOptions
from distkv.commands.options import Fields, Model, engine, model_folder, path_option, sized, spread
from distkv.config import EngineOptions


@spread
def learn(
    *,
    model: Model = "smollm2",
    out: Annotated[Path, path_option("--out", "-o", help="The file, an .html.")] = Path("learn.html"),
    options: Annotated[EngineOptions, engine("num_threads")],
    measured: Annotated[BenchOptions, Fields(BenchOptions, ("repeats", "quick"), {"repeats": sized(3, 1)})],
) -> None:
    """Explain the KV cache, from recomputation to pages and tiers, in one HTML file with this machine's own figures.

    It measures for some minutes, about two with --quick, then writes the file and opens nothing.
    """
    from distkv.learn.run import run

    run(model_folder(model), out, options["num_threads"], measured)
