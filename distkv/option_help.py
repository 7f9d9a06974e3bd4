"""Help for options, written once: each field of a class is explained by the text below it in the source.

`help()` shows the whole text; the command line shows the first line of it.
"""

import ast
import inspect
import sys
from contextlib import suppress
from itertools import pairwise
from textwrap import fill, indent
from typing import TypeVar

Options = TypeVar("Options")


def option_help(options: type) -> dict[str, str]:
    """The text below each field of a class by the field's name; empty for a program that is packed without sources."""
    found = {}
    for pair in pairwise(_source(options).body):
        match pair:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = inspect.cleandoc(text)
    return found


def explained(options: type[Options]) -> type[Options]:
    """Adds the fields of a class and their texts to its docstring."""
    summary, texts = ast.get_docstring(_source(options)), option_help(options)
    if summary is None:  # without sources
        return options
    lines = (f"{name}: {' '.join(text.split())}" for name, text in texts.items())
    fields = "\n".join(fill(line, width=116, subsequent_indent="    ") for line in lines)
    options.__doc__ = f"{summary}\n\nAttributes:\n{indent(fields, '    ')}"
    return options


def _source(options: type) -> ast.ClassDef:
    """The source of a class, which `python -OO` leaves its docstring; an empty one where there is no source."""
    with suppress(OSError):
        for node in ast.parse(inspect.getsource(sys.modules[options.__module__])).body:
            if isinstance(node, ast.ClassDef) and node.name == options.__name__:
                return node
    return ast.ClassDef(options.__name__, [], [], [], [])
