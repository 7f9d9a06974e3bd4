"""All checks, printed as they come."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from distkv.doctor.cluster import check_cluster
from distkv.doctor.disk import check_disk
from distkv.doctor.finding import Finding, State
from distkv.doctor.gpu import check_gpus
from distkv.doctor.processor import check_limits, check_memory, check_packages, check_processor
from distkv.reporting.machine import machine_facts, write_json
from distkv.reporting.out_file import check_out_file

STYLES = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "bold red"}


def examine(cache_dir: Path, ray_address: str | None) -> Iterator[Finding]:
    """All that there is to look at."""
    yield from check_packages()
    yield from check_processor()
    yield from check_memory()
    yield from check_limits()
    yield from check_gpus()
    yield from check_disk(cache_dir)
    yield from check_cluster(ray_address)


def run(console: Console, cache_dir: Path, ray_address: str | None, json_file: Path | None) -> bool:
    """Prints what is found, a line each, with the cure below where something is wrong. Returns whether everything
    works. Raises ConfigError for a file that cannot be written."""
    check_out_file(json_file)
    findings = []
    for finding in examine(cache_dir, ray_address):
        findings.append(finding)
        line = Text.assemble(
            (f"{finding.state:<8}", STYLES[finding.state]), (finding.what, "bold"), f": {finding.said}"
        )
        console.print(line, soft_wrap=True)
        if finding.cure:
            console.print(Text(f"         {finding.cure}"), soft_wrap=True)
    counts = Counter(finding.state for finding in findings)
    write_json(json_file, machine_facts(), [asdict(finding) for finding in findings])
    console.print(f"{counts[State.PROBLEM]} problems, {counts[State.WARNING]} warnings", highlight=False)
    return not counts[State.PROBLEM]
