"""Help for options, written once: each field of a class is explained by the text below it in the source.

`help()` shows the whole text; the command line shows the first line of it.
"""

import ast
import inspect
import sys
from itertools import pairwise
from textwrap import fill, indent
from typing import TypeVar

Options = TypeVar("Options")


def option_help(options: type) -> dict[str, str]:
    """The text below each field of a class by the field's name; empty for a program that is packed without sources."""
    try:
        module = ast.parse(inspect.getsource(sys.modules[options.__module__]))
    except OSError:
        return {}
    found = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == options.__name__:
            for pair in pairwise(node.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        found[name] = inspect.cleandoc(text)
    return found


def explained(options: type[Options]) -> type[Options]:
    """Adds the fields of a class and their texts to its docstring."""
    lines = (f"{name}: {' '.join(text.split())}" for name, text in option_help(options).items())
    fields = "\n".join(fill(line, width=116, subsequent_indent="    ") for line in lines)
    options.__doc__ = f"{inspect.getdoc(options)}\n\nAttributes:\n{indent(fields, '    ')}"
    return options
