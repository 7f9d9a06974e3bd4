"""All requests on one engine under a policy of memory, with what runs and what lies in memory after each step."""

import time
from collections.abc import Sequence as Values
from dataclasses import dataclass, field

from distkv.bench.decode_times import DecodeStep, DecodeTimes
from distkv.bench.paging_workload import Conversation
from distkv.engine.client import EngineClient
from distkv.engine.drive import drain, next_tokens
from distkv.engine.sequence import Sequence
from distkv.engine.step import Step
from distkv.errors import DistKVError


@dataclass(frozen=True)
class Moment:
    """The cache after a step. Slots are of one token each, over all layers; those of `held`, `coming` and `unused` are
    taken, and no other request can have them."""

    seconds: float  # since the requests were queued
    running: int  # requests that can go on
    stalled: int  # that have begun and wait for pages of others
    is_full: bool  # others wait for memory
    held: int  # slots with the keys and values of a token
    coming: int  # slots that their request will fill later
    unused: int  # slots that their request will never fill


@dataclass(frozen=True)
class Served:
    """What came of all requests."""

    seconds: float  # until the last token
    answers: dict[str, list[int]]
    moments: list[Moment]
    decode_steps: list[DecodeStep]
    num_preemptions: int

    @property
    def most_running(self) -> int:
        return max(moment.running for moment in self.moments)

    @property
    def was_full(self) -> bool:
        """Whether requests have waited for memory."""
        return any(moment.is_full for moment in self.moments)

    def mean(self, name: str) -> float:
        """The mean of a field of `Moment` over the time in which requests wait for memory: before that and after it
        nothing is scarce."""
        total = weights = 0.0
        before = 0.0
        for moment in self.moments:
            if moment.is_full:
                total += getattr(moment, name) * (moment.seconds - before)
                weights += moment.seconds - before
            before = moment.seconds
        return total / weights


@dataclass
class PageHolders(DecodeTimes):
    """Who holds pages, and how long steps take."""

    holders: dict[str, Sequence] = field(default_factory=dict)  # by request

    def started(self, step: Step) -> None:
        self.holders |= {one.request.request_id: one for one in step.sequences}


def serve(engine: EngineClient, holders: PageHolders, workload: Values[Conversation], reserved: int | None) -> Served:
    """Queues all requests at once and goes on until each answer has its length. It is ended from outside then, as by an
    end token: the step under way may have run a token more.

    Args:
        holders: the engine's observer.
        reserved: slots that a request has from its beginning to its end; None for those of the pages that it holds.

    Raises what a request has failed with, and DistKVError when pages are held by nobody that is known.
    """
    left = {one.request.request_id: one for one in workload}
    ends = {name: one.kv_tokens for name, one in left.items()}
    answers: dict[str, list[int]] = {name: [] for name in left}
    moments = []
    size = engine.info.page_size
    start = time.perf_counter()
    engine.add([one.request for one in workload])
    while left:
        for output in next_tokens(engine):
            answers[output.request_id].append(output.token_id)
        ended = [name for name, one in left.items() if len(answers[name]) == one.answer_tokens]
        engine.abort([(name, None) for name in ended], "stop")
        for name in ended:
            del left[name]
            holders.holders.pop(name)
        seconds, stats = time.perf_counter() - start, engine.stats()
        tables = {name: one.table for name, one in holders.holders.items()}
        pages = sum(len(table.pages) for table in tables.values())
        if pages != stats.pages_in_use:
            raise DistKVError(f"the engine has {stats.pages_in_use} pages in use, its requests {pages}; report it")
        held = coming = unused = 0
        for name, table in tables.items():
            taken = len(table.pages) * size if reserved is None else reserved * bool(table.pages)
            end = max(ends[name], table.num_tokens)  # a step under way may run a token that is not wanted
            held += table.num_tokens
            coming += min(taken, end) - table.num_tokens
            unused += max(0, taken - end)
        stalled = stats.num_lacking_room
        is_full = stats.num_waiting + stalled > 0
        moments.append(Moment(seconds, stats.num_running - stalled, stalled, is_full, held, coming, unused))
    drain(engine)
    return Served(moments[-1].seconds, answers, moments, holders.decode_steps, engine.stats().num_preemptions)
