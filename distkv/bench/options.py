"""What every benchmark is told; without torch, since the command line shows it in --help."""

from dataclasses import dataclass
from pathlib import Path

from distkv.option_checks import check_whole


@dataclass(frozen=True)
class BenchOptions:
    """How often a benchmark measures, and where its figures go."""

    repeats: int = 3
    """Turns of each variant after those that warm up; medians count."""
    quick: bool = False
    """Take sizes that are done in about a minute, for what is not given."""
    json: Path | None = None
    """Also write the figures here, each row as it comes."""

    def __post_init__(self) -> None:
        """Raises ConfigError for repeats that are no whole number above 0."""
        check_whole("repeats", self.repeats)
