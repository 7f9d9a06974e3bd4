"""`distkv demo`: what distkv does, shown with a real model."""

from typing import Annotated

from distkv.commands.options import Model, engine, model_folder, spread
from distkv.config import EngineOptions


@spread
def demo(*, model: Model = "smollm2", options: Annotated[EngineOptions, engine("tensor_parallel_size")]) -> None:
    """Ask a real model a few questions and show what its KV cache takes."""
    from distkv.demo.demo import run

    run(model_folder(model), options["tensor_parallel_size"])
