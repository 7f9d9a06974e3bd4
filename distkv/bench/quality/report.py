"""The table of `distkv bench quality`, and what it says."""

from collections.abc import Iterable
from statistics import fmean

from distkv.bench.harness import Bench, Row
from distkv.reporting.tables import Column, target

MOST_ADDED = {"fp8_e4m3": 0.005, "int8": 0.005, "int4": 0.03}
"""Of perplexity, that a codec may add."""
TENTH = "top_pages(share=0.1)"


def columns(texts: Iterable[str], contexts: Iterable[int], rows: list[Row]) -> list[Column]:
    """Of all that was measured."""
    tasks = rows[0]["num_questions"]
    return [
        Column("row", "name"),
        Column("page", "page_size"),
        Column("device, B/token", "device_bytes_per_token", form=".0f"),
        Column("host", "host_bytes_per_token", form=".0f"),
        Column("disk", "disk_bytes_per_token", form=".0f"),
        *(Column(f"perplexity, {name}", f"perplexity_{name}", form=".3f") for name in texts),
        *(Column(f"to full, {name}", f"added_{name}", 100, "+.2f", " %") for name in texts),
        Column("to full", "added", 100, "+.2f", " %"),
        Column("KL, 1e-3 nats", "divergence", 1e3, ".2f"),
        *(Column(f"{task} (of {count})", f"score_{task}", 100, ".0f", " %") for task, count in tasks.items()),
        *(Column(f"ms at {context}", f"ms_{context}", form=".1f") for context in contexts),
        Column("read of full", "read_share", 100, ".1f", " %"),
    ]


def explain(bench: Bench) -> None:
    """What the figures mean, and whether the targets are met."""
    unlisted = fmean(value for row in bench.rows for name, value in row.items() if name.startswith("unlisted_"))
    num_top, read, shape = (bench.facts[name] for name in ("num_top", "read_tokens", "shape"))
    bench.line(
        "To full: what perplexity adds to that of the whole and exact cache with the same pages. KL: the divergence of "
        "the distributions of the next token from those of that cache, from below, since what is not among the "
        f"{num_top} likeliest tokens counts as one ({unlisted:.1%} of the probability). Scored are the tokens behind "
        f"the first {read} of a text, as an answer's. A token meets its own page exactly."
    )
    bench.line(
        f"ms per token: shape {shape} with random weights and KV, all but a window on the host. Read: the bytes of "
        "the pages that a step attends to at the longest context, as they lie on the host, of those of full. Answers "
        "begin with the words that lead up to what is asked for, and a policy acts on these too."
    )
    for row in bench.rows:
        most = MOST_ADDED.get(row["kv_cache_dtype"])
        if most is not None:
            what = f"{row['name']}, pages of {row['page_size']}: at most {most:.1%} of perplexity added"
            bench.line(target(what, f"{row['added']:+.2%}", row["added"] <= most))
        if row["attention_policy"] == TENTH and "score_needle" in row:
            [full] = (one for one in bench.rows if one["name"] == "full" and one["page_size"] == row["page_size"])
            figure = f"{row['score_needle']:.0%} beside {full['score_needle']:.0%}"
            what = f"{row['name']}, pages of {row['page_size']}: finds the needle as full does"
            bench.line(target(what, figure, row["score_needle"] >= full["score_needle"] > 0))
