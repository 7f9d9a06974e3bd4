"""What is shown of the figures: tables on the terminal and in markdown, and how many times as fast distkv is."""

from dataclasses import dataclass
from typing import Any

from distkv.bench.harness import Row
from distkv.reporting.figure import Figure
from distkv.reporting.tables import Column

NOISY = 0.5  # of the cores, as load average


@dataclass(frozen=True)
class Metric:
    """One figure of a turn."""

    field: str
    title: str
    is_rate: bool  # more is better; of a time, less is
    form: str

    @property
    def ratio(self) -> str:
        """The field of a peer's row that says how many times as good distkv is."""
        return f"{self.field}_ratio"


METRICS = {
    "single": (
        Metric("prefill_tokens_per_s", "prefill tokens/s", True, ".0f"),
        Metric("decode_ms_per_token", "decode ms/token", False, ".1f"),
    ),
    "mixed": (Metric("output_tokens_per_s", "output tokens/s", True, ".0f"),),
    "http": (
        Metric("output_tokens_per_s", "output tokens/s", True, ".0f"),
        Metric("first_token_p50_ms", "first token ms, p50", False, ".0f"),
        Metric("first_token_p99_ms", "first token ms, p99", False, ".0f"),
        Metric("between_tokens_p50_ms", "between tokens ms, p50", False, ".1f"),
        Metric("between_tokens_p99_ms", "between tokens ms, p99", False, ".0f"),
    ),
}
"""By parts of the work, see `workloads`."""
TITLES = {
    "single": "One request: prefill and decode",
    "mixed": "Many requests of mixed lengths, submitted at once",
    "http": "Streamed completions over HTTP",
}


def rows_of(part: str, title: str, size: int, turns: dict[str, list[dict[str, float]]]) -> list[Row]:
    """A row for each engine with a `Figure` per metric, and ratios in those of the peers; `turns` has the figures of
    each engine's turns, one at least."""
    rows: list[Row] = []
    for engine, taken in turns.items():
        figures = {one.field: Figure.of([turn[one.field] for turn in taken]) for one in METRICS[part]}
        rows.append({"part": part, "work": title, "size": size, "engine": engine, **figures})
    own = next((row for row in rows if row["engine"] == "distkv"), None)
    for row in rows:
        if own is not None and row is not own:
            for one in METRICS[part]:
                ratio = own[one.field].median / row[one.field].median
                row[one.ratio] = ratio if one.is_rate else 1 / ratio
    return rows


def by_engine(part: str, rows: list[Row]) -> tuple[list[Column], list[Row]]:
    """The table of a part: a line per work and metric, and for each engine a column, with a second one for a peer."""
    own = [row for row in rows if row["part"] == part]
    columns = [Column("", "work"), Column("figure", "figure")]
    for engine in dict.fromkeys(row["engine"] for row in own):
        columns.append(Column(engine, engine))
        if engine != "distkv":
            columns.append(Column("distkv is", f"{engine} ratio", form=".2f", ending="x"))
    lines: list[Row] = []
    for work in dict.fromkeys(row["work"] for row in own):
        for n, one in enumerate(METRICS[part]):
            line: Row = {"work": "" if n else work, "figure": one.title}
            for row in own:
                if row["work"] == work:
                    line |= {row["engine"]: row[one.field].show(one.form), f"{row['engine']} ratio": row.get(one.ratio)}
            lines.append(line)
    return columns, lines


def noise(facts: dict[str, Any]) -> str:
    """A warning where other work had a good part of the cores; empty where it had not."""
    load, cores = facts["load_average"], facts["cores"]
    if load < NOISY * cores:
        return ""
    return (
        f"NOISY: before the first turn the load average was {load:.1f} on {cores} cores; beside other work "
        "engines may seem several times as slow as they are: measure again when the machine is quiet"
    )


def markdown(facts: dict[str, Any], rows: list[Row], picture: str) -> str:
    """The whole report; `picture` is the name of its file."""
    lines = [
        "# distkv beside its peers",
        "",
        f"{facts['model']} in {facts['dtype']}, {facts['threads']} threads, at most {facts['max_model_len']} tokens a "
        f"request and {facts['kv_bytes'] / 2**30:.3g} GiB of KV for each engine, greedy, no prefix cache, random "
        f"tokens; medians of {facts['repeats']} turns, with the least and the greatest. {facts['machine']}, "
        f"{facts['date']}, load average {facts['load_average']:.1f} before the first turn. An x says how many times as "
        "fast distkv is.",
        "",
        f"`{facts['command']}`",
        "",
    ]
    titles = ("engine", "version", "torch", "Python", "start s, offline", "start s, server", "cores while it waits")
    lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, engine in facts["engines"].items():
        fields = ("version", "torch", "python", "start_offline_s", "start_http_s", "cores_while_waiting")
        lines.append(f"| {name} | " + " | ".join(_cell(engine.get(field)) for field in fields) + " |")
    lines += [text for why in facts["missing"] for text in ("", f"**Not measured**: {why}")]
    lines += ["", noise(facts)] if noise(facts) else []
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += ["", f"## {TITLES[part]}", "", *_table(*by_engine(part, rows))]
    shown = ["", f"![the same as a picture]({picture})"] if rows else []
    return "\n".join([*lines, *shown, ""])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


def _table(shown: list[Column], rows: list[Row]) -> list[str]:
    lines = ["| " + " | ".join(one.title for one in shown) + " |", "|---" * len(shown) + "|"]
    return [*lines, *("| " + " | ".join(one.show(row) for one in shown) + " |" for row in rows)]
