"""`distkv bench spec`: what drafts give where a part of the context lies below the device.

A long real text is read once. Behind it come tasks that quote it and others that do not; each is answered without
drafts and with them in turns, by one engine, which streams what lies below the device once for each step. Answers must
be the same token for token, wherever the text lies and however they were drafted; the command fails otherwise.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distkv.bench.harness import Bench, Figure, Row
from distkv.bench.options import BenchOptions
from distkv.bench.speculation.decoding import Decoded, Place, SpeculatingEngine
from distkv.bench.speculation.tasks import QUICK_TASKS, TARGETS, TASKS, Prompt, make_prompts
from distkv.errors import ConfigError
from distkv.reporting.out_file import temporary_folder
from distkv.reporting.tables import Column
from distkv.speculative_config import METHODS
from distkv.storage.paging import check_page_size
from distkv.workers.model.model_config import ModelConfig

SELF_CONTAINED = tuple(name for name in METHODS if name != "draft_model")
"""Methods that need nothing beside the model."""
TIERS = ("host", "disk")
COLUMNS = [
    Column("context", "place"),
    Column("task", "task"),
    Column("drafts", "method"),
    Column("tokens/s without", "plain_tokens_per_s", form=".1f"),
    Column("with", "tokens_per_s", form=".1f"),
    Column("ratio", "ratio", form=".2f", ending="x"),
    Column("target", "verdict"),
    Column("accepted", "accepted", form=".0%"),
    Column("tokens/sweep", "tokens_per_sweep", form=".2f"),
    Column("MB/token without", "plain_streamed_bytes_per_token", 1e-6, ".1f"),
    Column("with", "streamed_bytes_per_token", 1e-6, ".1f"),
    Column("quoted", "quoted", form=".0%"),
]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: Path
    methods: tuple[str, ...]  # empty for all that need nothing beside the model
    context: int  # tokens, whole pages
    shares: tuple[int, ...]  # percent of the context below the device
    tiers: tuple[str, ...]  # where they lie
    tasks: tuple[str, ...]  # by name; empty for all
    new_tokens: int
    dtype: str
    page_size: int

    @property
    def places(self) -> list[Place]:
        """The context on the device but once."""
        below = [Place(tier, share) for tier in self.tiers for share in self.shares if share]
        return [Place("host", 0)] * (0 in self.shares) + below


def run(sizes: Sizes, num_threads: int | None, cache_dir: Path | None, options: BenchOptions) -> bool:
    """Measures and prints a table; see `distkv bench spec --help`. Returns whether all answers to a task were the
    same. Raises ConfigError for what cannot be measured."""
    prompts = _prompts(sizes, options.quick)
    bench = Bench(
        "spec", options, num_threads, model=sizes.model.name, dtype=sizes.dtype, context=sizes.context,
        page_size=sizes.page_size, new_tokens=sizes.new_tokens,
    )  # fmt: skip
    with bench:
        wrong = measure(bench, sizes, prompts, num_threads, cache_dir)
        bench.table(COLUMNS, across=True)
        for line in (
            "Tokens/s are of decoding alone, behind a text that was found in the cache. Accepted is the share of "
            "drafted tokens that were the answer's, tokens/sweep how far an answer went on in a step with a draft.",
            "Quoted is how much of an answer is the passage that was asked for, from its first token on.",
            _page_cache_line(bench.rows),
        ):
            bench.line(line)
        return bench.verdict(wrong, f"All {sizes.new_tokens} tokens of each answer are the same in all turns.")


def measure(bench: Bench, sizes: Sizes, prompts: list[Prompt], num_threads: int | None, cache_dir: Path | None) -> str:
    """Adds a row for each place, method and task; returns what is wrong."""
    expected: dict[str, list[int]] = {}
    wrong = ""
    longest = max(len(one.token_ids) for one in prompts) - sizes.context + sizes.new_tokens
    for place in sizes.places:
        for method in sizes.methods or SELF_CONTAINED:
            if method == "self" and not place.share:
                continue  # what is resident is never drafted for by itself, and an engine without a host refuses it
            bench.doing(f"{place.name}, {method}: reading the text")
            with (
                temporary_folder(cache_dir) as folder,
                SpeculatingEngine(
                    sizes.model, place, method, sizes.context, longest, sizes.page_size, sizes.dtype, num_threads,
                    folder,
                ) as engine,
            ):  # fmt: skip
                engine.answer(prompts[0], 2, drafts=False)  # after which the text lies where it stays
                for prompt in prompts:
                    works = {
                        name: partial(engine.answer, prompt, sizes.new_tokens, name == method)
                        for name in ("none", method)
                    }
                    taken = bench.in_turns(works, f"{place.name}, {prompt.task.name}", warm_up=0)
                    bench.add(make_row(place, method, prompt, taken["none"], taken[method]))
                    wrong = wrong or differing(f"{place.name}, {method}", prompt, taken, expected)
    return wrong


def differing(where: str, prompt: Prompt, taken: dict[str, list[Decoded]], expected: dict[str, list[int]]) -> str:
    """What is wrong when an answer to a task is not the first one that there was, which `expected` keeps; else
    nothing."""
    name = prompt.task.name
    for method, turns in taken.items():
        for turn, one in enumerate(turns):
            first = expected.setdefault(name, one.tokens)
            if one.tokens != first:
                pairs = zip(one.tokens, first, strict=False)
                place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(first)))
                return f"{where}: {name!r} differs in turn {turn} with drafts {method} from token {place} on; report it"
    return ""


def make_row(place: Place, method: str, prompt: Prompt, plain: list[Decoded], drafted: list[Decoded]) -> Row:
    """The figures of one task at one place; each turn is compared with the one beside it."""
    ratio = Figure.of(
        (ours.timed_tokens / ours.seconds) / (none.timed_tokens / none.seconds)
        for none, ours in zip(plain, drafted, strict=True)
    )
    goal = TARGETS.get(prompt.task.kind)
    is_target = goal is not None and method == "ngram" and (prompt.task.kind == "free" or place.tier == "disk")
    told = [one.speculation for one in drafted]
    num_drafts, num_drafted, num_accepted = (
        sum(getattr(one, name) for one in told) for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    fetched = [one.bytes_from_disk for one in plain if one.bytes_from_disk is not None]
    return {
        "place": place.name,
        "tier": place.tier if place.share else "device",
        "share_below": place.share,
        "task": prompt.task.name,
        "kind": prompt.task.kind,
        "temperature": prompt.task.temperature,
        "method": method,
        "plain_tokens_per_s": _rate(plain),
        "tokens_per_s": _rate(drafted),
        "ratio": ratio,
        "target": goal if is_target else None,
        "verdict": f"{goal:g}x {'met' if ratio.median >= goal else 'MISSED'}" if is_target and goal else None,
        "num_drafts": num_drafts,
        "num_draft_tokens": num_drafted,
        "num_accepted_tokens": num_accepted,
        "accepted": num_accepted / num_drafted if num_drafted else None,
        "tokens_per_sweep": 1 + num_accepted / num_drafts if num_drafts else None,
        "steps": [one.num_steps for one in drafted],
        "plain_streamed_bytes_per_token": _streamed(plain),
        "streamed_bytes_per_token": _streamed(drafted),
        "plain_bytes_from_disk_per_token": (
            sum(fetched) / sum(one.timed_tokens for one in plain) if len(fetched) == len(plain) else None
        ),
        "plain_seconds": [one.seconds for one in plain],
        "seconds": [one.seconds for one in drafted],
        "quoted": prompt.quoted(drafted[0].tokens),
    }


def _rate(turns: list[Decoded]) -> Figure:
    return Figure.of(one.timed_tokens / one.seconds for one in turns)


def _streamed(turns: list[Decoded]) -> float:
    return sum(one.host_bytes + one.disk_bytes for one in turns) / sum(one.timed_tokens for one in turns)


def _prompts(sizes: Sizes, quick: bool) -> list[Prompt]:
    """Raises ConfigError for sizes that do not go together."""
    for given, known, what in (
        (sizes.methods, tuple(METHODS), "method"),
        (sizes.tiers, TIERS, "tier"),
        (sizes.tasks, tuple(task.name for task in TASKS), "task"),
    ):
        for name in given:
            if name not in known or name == "draft_model":
                usable = [one for one in known if one != "draft_model"]
                raise ConfigError(f"--{what} is {name!r}; use one of {', '.join(usable)}")
    for share in sizes.shares:
        if not 0 <= share <= 95:
            raise ConfigError(f"--below is {share}; use a percentage from 0 to 95")
    if set(sizes.methods) == {"self"} and not any(sizes.shares):
        raise ConfigError("--method self drafts for what lies below the device alone; give --below a share above 0 too")
    check_page_size(sizes.page_size)
    if sizes.context % sizes.page_size or sizes.context < 4 * sizes.page_size:
        raise ConfigError(
            f"context {sizes.context} is not a whole number of pages of {sizes.page_size} tokens, at least 4; use "
            f"{max(4, -(-sizes.context // sizes.page_size)) * sizes.page_size}"
        )
    chosen = tuple(task for task in TASKS if task.name in sizes.tasks) or (QUICK_TASKS if quick else TASKS)
    prompts = make_prompts(sizes.model, sizes.context, sizes.new_tokens, chosen)
    positions = ModelConfig.load(sizes.model).max_position_embeddings
    longest = max(len(one.token_ids) for one in prompts) + sizes.new_tokens
    if longest > positions:
        raise ConfigError(
            f"context {sizes.context}, question and answer take {longest} tokens and the model has {positions} "
            "positions; lower the context"
        )
    return prompts


def _page_cache_line(rows: list[Row]) -> str:
    """Whether dropping the page cache had the effect that it must have."""
    on_disk = [row for row in rows if row["tier"] == "disk"]
    if not on_disk:
        return "Nothing lay on disk."
    if any(row["plain_bytes_from_disk_per_token"] is None for row in on_disk):
        return "Whether pages on disk came from there or from the page cache, the system does not say."
    fetched = sum(row["plain_bytes_from_disk_per_token"] for row in on_disk)
    wanted = sum(row["plain_streamed_bytes_per_token"] for row in on_disk)
    if fetched < 0.9 * wanted:
        return (
            f"WARNING: {fetched / max(1.0, wanted):.0%} of what was streamed from disk came from the disk itself, the "
            "rest from memory, so this is no measure of a disk; name a folder on one with --cache-dir."
        )
    return "The page cache was dropped before each step: pages on disk came from the disk itself."
