"""`distkv generate`: a prompt is continued."""

from pathlib import Path
from typing import Annotated

import typer

from distkv.commands.options import EngineFlags, Model, model_folder, path_option, piecemeal, sampling, spread
from distkv.commands.streams import note, read_prompt
from distkv.config import EngineConfig
from distkv.errors import RequestError
from distkv.sampling_params import SamplingParams


@spread
def generate(
    *,
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The prompt; without it and --prompt-file, stdin is read.")] = None,
    prompt_file: Annotated[Path | None, path_option(help="File with the prompt, UTF-8.")] = None,
    params: Annotated[SamplingParams, sampling(max_tokens=256)],
    options: EngineFlags,
) -> None:
    """Continue a prompt; tokens are printed as they come, and on stderr what fits and what a token costs."""
    text = read_prompt(prompt, prompt_file)
    if not text:
        raise RequestError("the prompt is empty; give some text with --prompt, --prompt-file or on stdin")
    folder = model_folder(model)
    from distkv.launch.start_lines import start_lines
    from distkv.launch.this_machine import engine_hardware
    from distkv.llm import LLM

    with LLM(folder, **options) as llm:
        config = EngineConfig(folder, **options)
        for line in start_lines(config, llm.info, engine_hardware(config, llm.info)):
            note(line)
        for output in llm.stream(text, piecemeal(params)):
            print(output.outputs[0].text, end="", flush=True)
        print()
        told = llm.stats()
        if read := told.policy.shown():
            note(f"the answer has read {read}")
        if drafted := told.speculation.shown():
            note(f"the answer has had {drafted}")
