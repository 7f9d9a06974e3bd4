"""The command `distkv`. Heavy imports wait until a command needs them, so that --help is instant."""

import signal
import sys
from itertools import chain
from typing import Annotated, Any

import typer

from distkv import __version__
from distkv.commands import streams
from distkv.commands.batch import batch
from distkv.commands.bench import bench
from distkv.commands.cache import cache
from distkv.commands.chat import chat
from distkv.commands.demo import demo
from distkv.commands.doctor import doctor
from distkv.commands.fetch import fetch
from distkv.commands.generate import generate
from distkv.commands.learn import learn
from distkv.commands.metrics import metrics, top
from distkv.commands.plan import plan
from distkv.commands.serve import serve
from distkv.commands.stress import stress
from distkv.commands.submit import submit
from distkv.errors import ConfigError, DistKVError
from distkv.signals import exit_on_sigterm
from distkv.storage.process_limits import lack_of_memory

# click's, which newer releases of typer carry under a name of their own
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="LLaMA inference with a paged KV cache, on one machine or a Ray cluster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut long names
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, serve, batch, fetch, plan, learn, demo, stress, doctor, top):
    app.command()(command)
app.command(context_settings={"allow_interspersed_args": False})(submit)  # what follows is a command of its own
groups = {"bench": bench, "cache": cache, "metrics": metrics}
for name, group in groups.items():
    app.add_typer(group, name=name)
for each in chain.from_iterable(one.registered_commands for one in (app, *groups.values())):
    each.short_help = " ".join((each.callback.__doc__ or "").partition("\n\n")[0].split())  # whole, in lists


def main() -> None:
    """Runs the command line. An error that names its cure is one line on stderr and exit code 2; when the reader of
    stdout has left, as `head` does, the exit code is 141, after Ctrl-C it is 130 and after SIGTERM 143, all without a
    word."""
    code, unexplained = 0, None
    try:
        with exit_on_sigterm(), streams.guarded() as stdout:
            try:
                code = _run()
            except (OSError, SystemExit) as error:  # what writing to stdout raises, and what typer makes of it
                unexplained = error
    except ConfigError as error:
        sys.exit(_fail(str(error)))
    failure = None if stdout is None else stdout.failure
    if isinstance(failure, BrokenPipeError):
        code = code or 128 + signal.SIGPIPE
    elif failure is not None:
        code = code or _fail(f"stdout cannot be written: {failure.strerror}")
    elif unexplained is not None:
        raise unexplained
    if code:
        sys.exit(code)


def _run() -> int:
    """Runs a command; returns the exit code."""
    try:
        return app(standalone_mode=False) or 0
    except DistKVError as error:
        return _fail(str(error))
    except UsageError as error:
        return _fail(error.format_message().rstrip(".") + "; see distkv --help")
    except (MemoryError, RuntimeError, ImportError) as error:
        if (lack := lack_of_memory(error)) is None:
            raise
        return _fail(lack)
    except typer.Abort as abort:  # what older releases of typer make of Ctrl-C, and all of them of EOFError
        if isinstance(abort.__cause__, EOFError):
            raise abort.__cause__ from None
        return 130


def _fail(message: str) -> int:
    streams.complain(message)
    return 2


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"distkv {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
