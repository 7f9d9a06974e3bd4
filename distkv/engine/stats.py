"""What an engine tells of itself: figures of this moment, sums since its start, and how times are distributed."""

from collections.abc import Sequence
from typing import Any

import msgspec


class Histogram(msgspec.Struct, frozen=True):
    """How many values were at most each bound, above the bound before; the last count is of those above all."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0  # the sum of the values


class TierStats(msgspec.Struct, frozen=True):
    """A tier of all ranks together. A page that lies in several tiers counts in each of them."""

    num_pages: int  # there is room for
    used_pages: int
    idle_pages: int  # of the used ones, those that no request holds, kept for later ones
    capacity_bytes: int  # as allocated; on disk what the files may take
    used_bytes: int


class RequestStats(msgspec.Struct, frozen=True):
    """What became of requests since the start. Times are those of the engine: from a request's arrival there until a
    token is read from the device, without text and network. Seconds, and tokens."""

    prompt_tokens: int = 0  # of requests whose first token is there, with those that were found
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens of prompts that were looked for, 0 without prefix caching
    prefix_hits: dict[str, int] = {}  # tokens that were found and taken up, by tier
    prefix_recomputed: int = 0  # tokens that were found and computed again, which was faster, see `LoadChoice`
    finished: dict[str, int] = {}  # answers by reason: stop, length, abort, error
    time_to_first_token: Histogram = Histogram()
    inter_token_latency: Histogram = Histogram()
    e2e_latency: Histogram = Histogram()  # this one and all below: of answers that ended by stop or length
    queue_time: Histogram = Histogram()  # until a request is admitted
    prefill_time: Histogram = Histogram()  # from there to its first token
    decode_time: Histogram = Histogram()  # from there to its last one
    prompt_length: Histogram = Histogram()
    answer_length: Histogram = Histogram()


class PolicyStats(msgspec.Struct, frozen=True):
    """What tokens of answers have read by a policy of attention since the start, over all layers and ranks; nothing but
    zeros with attention to all pages."""

    pages_visible: int = 0  # for each token, layer and KV head: those up to its own
    pages_chosen: int = 0  # of these
    num_audited: int = 0  # for each token of the steps with an audit, layer and query head: 1
    mass_covered: float = 0.0  # the sum, over these, of the part of all attention that lies on the chosen pages

    @property
    def share_chosen(self) -> float | None:
        """The share of pages that was read; None before anything was."""
        return self.pages_chosen / self.pages_visible if self.pages_visible else None

    @property
    def mean_covered(self) -> float | None:
        """How much of the attention to all pages the chosen ones have, between 0 and 1; None without an audit."""
        return self.mass_covered / self.num_audited if self.num_audited else None

    def shown(self) -> str | None:
        """Both for people, "28.6% of the pages, on which 97.3% of all attention lies", the second with an audit alone;
        None before anything was read."""
        if self.share_chosen is None:
            return None
        audit = "" if self.mean_covered is None else f", on which {self.mean_covered:.1%} of all attention lies"
        return f"{self.share_chosen:.1%} of the pages{audit}"


class SpeculationStats(msgspec.Struct, frozen=True):
    """What became of drafted tokens since the start; zeros without `speculative_config`."""

    num_drafts: int = 0  # one for each answer and step that had one
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of these, those that were the answer's
    num_drafting_steps: int = 0  # that drafts by the model itself took

    @property
    def tokens_per_sweep(self) -> float | None:
        """Tokens that an answer went on by in a step with a draft, on average; None where there was none."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def acceptance_rate(self) -> float | None:
        """The share of drafted tokens that were the answer's; None where there were none."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    def shown(self) -> str | None:
        """For people, "3.4 tokens a step in 25 steps with drafts, 61.2% of whose tokens were right"; None without a
        draft."""
        if not self.num_drafts:
            return None
        steps = f"{self.num_drafts} {'step' if self.num_drafts == 1 else 'steps'} with drafts"
        tokens = f"{self.tokens_per_sweep:.1f} tokens a step"
        return f"{tokens} in {steps}, {self.acceptance_rate:.1%} of whose tokens were right"


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """State of an engine. A page that lies in several tiers counts for each, and once in `pages_in_use`."""

    pages_in_use: int
    peak_pages_in_use: int
    num_running: int  # answers
    num_waiting: int  # requests
    num_parked: int = 0  # running ones that wait for their turn, see `ColdBudget`
    idle_pages: int = 0  # held by nobody, kept for later requests; they count below, and not in `pages_in_use`
    device_pages: int = 0
    host_pages: int = 0
    disk_pages: int = 0
    # bytes by route since the start, all ranks together: device_to_host, host_to_disk, disk_to_host, host_to_device for
    # whole pages; host_streamed and disk_streamed for the layer slices that passed through the staging ring
    bytes_moved: dict[str, int] = {}
    pages_recomputed: int = 0  # that could not be read back
    num_preemptions: int = 0  # answers that gave their pages up since they were longer than expected
    num_lacking_room: int = 0  # running ones that wait for pages of others
    tiers: dict[str, TierStats] = {}  # device, host and disk
    # seconds that this took, by route, summed over what goes on at a time and over ranks
    seconds_moved: dict[str, float] = {}
    disk_read_bytes: int = 0  # all of this block summed over ranks; what is below the routes from disk and to it
    disk_read_seconds: float = 0.0  # with the check of the content
    disk_written_bytes: int = 0
    disk_write_seconds: float = 0.0
    checksum_failures: int = 0  # parts of pages that came back from disk with another content
    # with pipeline_parallel_size: that ranks were at steps, summed over them, and waited for other stages meanwhile
    stage_seconds: float = 0.0
    stage_wait_seconds: float = 0.0
    pipeline_steps: int = 0
    micro_batches: int = 0  # that these were cut into
    num_engines: int = 1  # that run
    seconds_without_engine: float = 0.0  # since the last one of a pool was lost
    pages_to_save: int = 0  # on their way to disk, or to go there by themselves as soon as they may
    num_refused: int = 0  # answers that found the queue full; whoever owns the engine counts them
    requests: RequestStats = RequestStats()
    policy: PolicyStats = PolicyStats()
    speculation: SpeculationStats = SpeculationStats()


def total(stats: Sequence[EngineStats]) -> EngineStats:
    """What several engines tell together, at least one: the sum of each figure. The peak of all is at most the sum of
    their peaks."""
    summed: EngineStats = _total(stats)
    return summed


def _total(figures: Sequence[Any]) -> Any:
    first = figures[0]
    if isinstance(first, Histogram):
        return _all_values(figures)
    if isinstance(first, msgspec.Struct):
        names = first.__struct_fields__
        return type(first)(**{name: _total([getattr(one, name) for one in figures]) for name in names})
    if isinstance(first, dict):
        names = tuple(dict.fromkeys(name for one in figures for name in one))
        return {name: _total([one[name] for one in figures if name in one]) for name in names}
    return sum(figures)


def _all_values(histograms: Sequence[Histogram]) -> Histogram:
    """All of them have the same bounds, but for those of engines that have counted nothing."""
    counted = [one for one in histograms if one.bounds] or [Histogram()]
    counts = tuple(map(sum, zip(*(one.counts for one in counted), strict=True)))
    return Histogram(counted[0].bounds, counts, sum(one.total for one in counted))
