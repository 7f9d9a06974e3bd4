"""What is counted of faults: a record for each try, kept in a file of JSON lines, and a table of all of them."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Try:
    """One fault, injected once, and what came of it."""

    fault: str
    seed: str
    answers: int = 0  # that were compared, whole or up to where an error ended them
    tokens: int = 0  # that were compared
    wrong: list[str] = field(default_factory=list)  # each a token that an undisturbed run does not have there
    errors: list[str] = field(default_factory=list)  # of requests, such as the fault explains
    unexplained: list[str] = field(default_factory=list)  # errors that it does not, and answers that ended too early
    hung: list[str] = field(default_factory=list)  # what did not get on within the limit
    leaked: list[str] = field(default_factory=list)  # what was left behind
    pauses: list[float] = field(default_factory=list)  # seconds until there were tokens again
    moment: str = ""  # when it was injected, and into what

    @property
    def is_clean(self) -> bool:
        """Whether nothing happened that must not."""
        return not (self.wrong or self.unexplained or self.hung or self.leaked)


def append(path: Path, one: Try) -> None:
    """Adds a record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(one)) + "\n")


def read(paths: Iterable[Path]) -> list[Try]:
    """All records of files, those that are not there left out."""
    lines = [line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Try(**json.loads(line)) for line in lines]


def table(tries: list[Try], descriptions: dict[str, str]) -> str:
    """A table in Markdown with a row for each fault, in the order of `descriptions`."""
    head = (
        "fault", "tried", "answers compared", "wrong tokens", "ended with the fault's error", "other errors", "hung",
        "leaked", "pause: median, worst",
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = [head, ("---", *["--:"] * (len(head) - 1))]
    rows += [
        _row(text, own) for name, text in descriptions.items() if (own := [one for one in tries if one.fault == name])
    ]
    rows.append(_row("**all**", tries))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _row(text: str, tries: list[Try]) -> tuple[Any, ...]:
    pauses = [pause for one in tries for pause in one.pauses]
    pause = f"{statistics.median(pauses):.1f} s, {max(pauses):.1f} s" if pauses and not text.startswith("**") else ""
    counts = [sum(len(getattr(one, name)) for one in tries) for name in ("errors", "unexplained", "hung", "leaked")]
    wrong = sum(len(one.wrong) for one in tries)
    return (text, len(tries), sum(one.answers for one in tries), wrong, *counts, pause)
