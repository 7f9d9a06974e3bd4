"""The command `distkv`. Heavy imports wait until a command needs them, so that --help is instant."""

import sys
from typing import Annotated, Any, NoReturn

import typer

from distkv import __version__
from distkv.commands.bench import bench
from distkv.commands.cache import cache
from distkv.commands.chat import chat
from distkv.commands.demo import demo
from distkv.commands.fetch import fetch
from distkv.commands.generate import generate
from distkv.commands.stress import stress
from distkv.errors import DistKVError

# click's, which newer releases of typer carry under a name of their own
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="LLaMA inference with a paged KV cache, on one machine or a Ray cluster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, fetch, demo, stress):
    app.command()(command)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")


def main() -> None:
    """Runs the command line; an error that names its cure is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except DistKVError as error:
        _fail(str(error))
    except UsageError as error:
        _fail(error.format_message().rstrip(".") + "; see distkv --help")
    except typer.Abort:  # Ctrl-C in older releases of typer
        sys.exit(130)
    if code:  # of typer.Exit
        sys.exit(code)


def _fail(message: str) -> NoReturn:
    print("distkv: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"distkv {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
