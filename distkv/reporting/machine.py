"""What all benchmarks share: the facts of the machine that go with every figure, and the JSON file of the figures."""

import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distkv import __version__
from distkv.reporting.figure import Figure
from distkv.reporting.out_file import writing


def machine_facts() -> dict[str, Any]:
    """Processor or GPU, threads, versions, date and the command."""
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "distkv": __version__,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["distkv", *sys.argv[1:]]),
    }


def write_json(json_file: Path | None, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes the figures where a file was asked for; a `Figure` as its median, min and max. Raises StoreError."""
    if json_file is not None:
        text = json.dumps({**facts, "rows": rows}, indent=1, default=Figure.to_json)
        with writing(json_file):
            json_file.write_text(text + "\n", encoding="utf-8")


def percentile(values: Iterable[float], share: float) -> float:
    """The least value that `share` (above 0, at most 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
