"""`distkv top`: what a server is doing, in a terminal."""

import time
from collections import deque

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from distkv.metrics.reading import Interval, Reading, metrics_url, read
from distkv.reporting.live_view import LiveView

SECONDS = 1.0  # between readings
WINDOW = 10  # readings that latencies and hit rates are taken over
BAR = 32  # characters
TIERS = ("device", "host", "disk")


def watch(console: Console, url: str, api_key: str | None) -> None:
    """Shows what a server is doing until Ctrl-C. Raises ConfigError when it does not answer."""
    address = metrics_url(url)
    readings = deque([read(address, api_key)], maxlen=WINDOW + 1)
    try:
        with TopView(console, address) as view:
            view.show(Interval(readings[0], readings[0]), Interval(readings[0], readings[0]))
            while True:
                time.sleep(SECONDS)
                readings.append(read(address, api_key))
                view.show(Interval(readings[-2], readings[-1]), Interval(readings[0], readings[-1]))
    except KeyboardInterrupt:
        return


class TopView(LiveView):
    """A picture on a terminal, elsewhere a line each time."""

    def __init__(self, console: Console, address: str):
        super().__init__(console)
        self._address = address

    def show(self, last: Interval, window: Interval) -> None:
        """Shows what is, and what has happened in the last second and in a longer window."""
        if self._live is None:
            self._console.print(_line(last, window), soft_wrap=True)
        else:
            self._live.update(_picture(self._address, last, window), refresh=True)


def _picture(address: str, last: Interval, window: Interval) -> RenderableType:
    now = last.after
    models = ", ".join(now.values_of("num_requests_running", "model_name"))
    rows = Table.grid(padding=(0, 2))
    rows.add_row("requests", _requests(now))
    rows.add_row("tokens/s", _tokens(last))
    rows.add_row("first token", _latency(window, "time_to_first_token_seconds"))
    rows.add_row("next token", _latency(window, "inter_token_latency_seconds"))
    rows.add_row("prefixes", _prefixes(window))
    if trouble := _trouble(now):
        rows.add_row("trouble", Text(trouble, style="red"))
    return Group(Text(f"{models} at {address}", style="bold"), rows, _tiers(last), Text(LEGEND, style="dim"))


LEGEND = "█ held by requests  ▒ kept for later ones  · free      Ctrl-C ends this"


def _line(last: Interval, window: Interval) -> str:
    now = last.after
    parts = [_requests(now), f"tokens/s {_tokens(last)}", f"TTFT {_latency(window, 'time_to_first_token_seconds')}"]
    parts.append(f"ITL {_latency(window, 'inter_token_latency_seconds')}")
    for tier in TIERS:
        if now.total("tier_capacity_bytes", tier=tier):
            parts.append(f"{tier} {_occupancy(now, tier)} {_traffic(last, tier)}".rstrip())
    return "; ".join(filter(None, (*parts, _trouble(now))))


def _requests(now: Reading) -> str:
    states = ("running", "waiting", "parked", "lacking_room")
    counts = {state: int(now.total(f"num_requests_{state}")) for state in states}
    return ", ".join(
        f"{count} {state.replace('_', ' ')}" for state, count in counts.items() if count or state in states[:2]
    )


def _tokens(last: Interval) -> str:
    return f"{last.rate('generation_tokens_total'):.1f} out, {last.rate('prompt_tokens_total'):.1f} in"


def _latency(window: Interval, name: str) -> str:
    middle, high = window.quantile(name, 0.5), window.quantile(name, 0.95)
    return "-" if middle is None or high is None else f"{_seconds(middle)} (p50), {_seconds(high)} (p95)"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _prefixes(window: Interval) -> str:
    asked = window.rise("prefix_cache_queries_total")
    if not asked:
        return "-"
    found = {tier: window.rise("prefix_cache_hits_total", tier=tier) / asked for tier in TIERS}
    tiers = ", ".join(f"{tier} {share:.0%}" for tier, share in found.items() if share)
    return f"{sum(found.values()):.0%} of prompts found" + (f" ({tiers})" if tiers else "")


def _trouble(now: Reading) -> str:
    counts = {
        "failed": now.total("request_success_total", finished_reason="error"),
        "preempted": now.total("num_preemptions_total"),
        "checksum failures": now.total("checksum_failures_total"),
        "pages computed again": now.total("pages_recomputed_total"),
    }
    return ", ".join(f"{int(count)} {what}" for what, count in counts.items() if count)


def _tiers(last: Interval) -> Table:
    table = Table.grid(padding=(0, 2))
    for tier in TIERS:
        if last.after.total("tier_capacity_bytes", tier=tier):
            table.add_row(tier, _bar(last.after, tier), _occupancy(last.after, tier), _traffic(last, tier))
    return table


def _bar(now: Reading, tier: str) -> str:
    capacity = now.total("tier_capacity_bytes", tier=tier)
    used, idle = now.total("tier_used_bytes", tier=tier), now.total("tier_idle_bytes", tier=tier)
    filled = min(BAR, round(BAR * used / capacity))
    held = min(filled, round(BAR * (used - idle) / capacity))
    return "█" * held + "▒" * (filled - held) + "·" * (BAR - filled)


def _occupancy(now: Reading, tier: str) -> str:
    used, capacity = now.total("tier_used_bytes", tier=tier), now.total("tier_capacity_bytes", tier=tier)
    unit, name = (2**30, "GiB") if capacity >= 2**30 else (2**20, "MiB")
    return f"{used / unit:.2f}/{capacity / unit:.2f} {name}"


def _traffic(last: Interval, tier: str) -> str:
    """What comes and goes; what passes the staging ring on its way to attention comes to the device."""
    come = last.rate("transfer_bytes_total", to=tier)
    if tier == "device":
        come += last.rate("transfer_bytes_total", to="staging")
    gone = last.rate("transfer_bytes_total", **{"from": tier})
    return ", ".join(f"{_rate(rate)} {way}" for rate, way in ((come, "in"), (gone, "out")) if rate)


def _rate(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s" if value >= 1e8 else f"{value / 1e6:.2f} MB/s"
