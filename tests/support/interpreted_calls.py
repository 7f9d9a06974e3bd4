"""Calls of Triton's interpreter that take no longer than they must.

It readies `triton.language` at each launch, and again whenever a kernel calls a function, for which it looks through
all names of that module, a quarter of the time of the interpreted tests, and finds them as the launch has left them.

Another quarter goes to whether sums and products of integers overflow: it computes each once more in 64 bits and
compares, and asserts what comes of it where kernels are debugged alone, which these tests do not do.
"""

from dataclasses import replace
from typing import Any


def use_quick_calls() -> None:
    """Has the interpreter of this process ready the language once a launch for each module whose functions are called,
    and not look for overflows that nobody is told of. To be called before a kernel runs."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    launch, ready = GridExecutor.__call__, interpreter._patch_lang
    readied: set[int] = set()  # globals of modules for which it is ready, since the launch began

    def launch_anew(self: GridExecutor, *arguments: Any, **options: Any) -> None:
        readied.clear()
        launch(self, *arguments, **options)

    def ready_once(function: Any) -> Any:
        if (names := id(function.__globals__)) in readied:
            return None
        readied.add(names)
        return ready(function)

    GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = ready_once
