"""`distkv learn`: measures on this machine, and writes the report."""

from pathlib import Path

from rich.console import Console

from distkv.bench.options import BenchOptions
from distkv.learn.measure import QUICK, Sizes, measure
from distkv.learn.report import write_report
from distkv.reporting.out_file import check_out_file


def run(model: Path, out: Path, num_threads: int | None, options: BenchOptions, sizes: Sizes | None = None) -> None:
    """See `distkv learn --help`.

    Args:
        out: the HTML file.
        sizes: of the benchmarks; None for those that `options.quick` says.

    Raises ConfigError when the file cannot be written, StoreError when it could not in the end.
    """
    check_out_file(out)
    console = Console(highlight=False)

    def say(what: str) -> None:
        console.print(what, soft_wrap=True)

    say("Measuring on this machine; nothing is fetched or sent.")
    measured = measure(model, sizes or (QUICK if options.quick else Sizes()), num_threads, options, say)
    write_report(out, measured)
    say(f"The report is in {out}; open it in a browser.")
