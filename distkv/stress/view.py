"""What `distkv stress` shows while it runs: bars on a terminal, else a line now and then."""

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from distkv.engine.protocol import EngineInfo
from distkv.reporting.live_view import LiveView
from distkv.storage.tier import Tier
from distkv.stress.stage import TIERS, Sample

LINE_SECONDS = 5.0
SHOW_SECONDS = 0.1  # between pictures on a terminal
RATE_SECONDS = 0.25  # that rates are taken over


class StressView(LiveView):
    """A context manager; `stage` begins a stage, and `watch` takes the samples of `run_stage`."""

    def __init__(self, console: Console, info: EngineInfo):
        super().__init__(console, transient=True)
        self._info = info
        self._num_pages = dict(zip(TIERS, (info.num_pages, info.num_host_pages, info.num_disk_pages), strict=True))
        self._context = self._new_tokens = 0
        self._before: Sample | None = None  # where the rates are taken from
        self._rates: dict[str, float] | None = None  # bytes/s by route, once they are known
        self._speed = ""
        self._shown = 0.0

    def stage(self, context: int, new_tokens: int) -> None:
        """A request of so many prompt tokens begins."""
        self._context, self._new_tokens = context, new_tokens
        self._before, self._rates, self._speed, self._shown = None, None, "", 0.0

    def watch(self, sample: Sample) -> None:
        """Takes a sample in and shows it."""
        before = self._before
        decode_begins = before is not None and bool(sample.new_tokens) > bool(before.new_tokens)
        if before is None or decode_begins or sample.seconds - before.seconds >= RATE_SECONDS:
            if decode_begins:  # what was measured is the fill
                self._rates, self._speed = None, ""
            elif before is not None:
                self._measure(before, sample)
            self._before = sample
        if not decode_begins and sample.seconds - self._shown < (LINE_SECONDS if self._live is None else SHOW_SECONDS):
            return
        self._shown = sample.seconds
        if self._live is not None:
            self._live.update(self._bars(sample), refresh=True)
        else:
            self._console.print(self._line(sample), soft_wrap=True)

    def _measure(self, before: Sample, now: Sample) -> None:
        seconds = now.seconds - before.seconds
        if now.tokens > before.tokens:
            self._speed = f", {1e3 * seconds / (now.tokens - before.tokens):.3g} ms per token"
        moved = {route: count - before.bytes_moved.get(route, 0) for route, count in now.bytes_moved.items()}
        self._rates = {route: count / seconds for route, count in moved.items() if count}

    def _line(self, sample: Sample) -> str:
        pages = ", ".join(
            f"{tier} {sample.pages[tier]}/{total} pages" for tier, total in self._num_pages.items() if total
        )
        return "; ".join(filter(None, (self._progress(sample), pages, self._traffic())))

    def _bars(self, sample: Sample) -> RenderableType:
        bars = Table.grid(padding=(0, 2))
        for tier, total in self._num_pages.items():
            if total:
                pages = sample.pages[tier]
                size = pages * self._info.page_bytes_in(Tier[tier.upper()]) / 2**30
                bar = ProgressBar(total=total, completed=pages, width=40)
                bars.add_row(tier, bar, f"{pages}/{total} pages", f"{size:.3f} GiB")
        return Group(self._progress(sample), bars, self._traffic())

    def _progress(self, sample: Sample) -> str:
        """Phase, tokens done and speed."""
        phase, done, total = (
            ("decode", sample.new_tokens, self._new_tokens)
            if sample.new_tokens
            else ("fill", sample.tokens, self._context)
        )
        return f"context {self._context}: {phase} {done}/{total} tokens{self._speed}"

    def _traffic(self) -> str:
        if self._rates is None:
            return ""
        return ", ".join(f"{route} {rate / 1e9:.2f} GB/s" for route, rate in self._rates.items()) or "nothing moves"
