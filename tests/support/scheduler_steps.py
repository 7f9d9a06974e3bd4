"""A scheduler by itself, whose steps all end well."""

from typing import Any

from support.history import GREEDY
from support.memory import engine_info

from distkv.engine.protocol import EngineRequest
from distkv.engine.scheduler import Scheduler
from distkv.engine.sequence import Sequence
from distkv.sampling_params import SamplingParams

BUDGET = 64


class Steps:
    """A scheduler and what runs by it. Prompts have nothing in common unless they begin with the same token."""

    def __init__(self, **options: Any):
        sizes = {"max_num_batched_tokens": BUDGET, "num_pages": 200, "max_model_len": 5000, "page_bytes": 10}
        self.info = engine_info(**(sizes | options))
        self.scheduler = Scheduler(self.info)
        self.cache = self.scheduler.cache

    def add(self, name: str, length: int, *, token: int | None = None, n: int = 1, **options: Any) -> EngineRequest:
        first = ord(name[0]) if token is None else token
        return self.add_tokens(name, [first] * length, n=n, **options)

    def add_tokens(self, name: str, tokens: list[int], *, n: int = 1, **options: Any) -> EngineRequest:
        params = SamplingParams(n=n) if n > 1 else GREEDY
        fields = {"max_tokens": 50, "seed": 0} | options
        request = EngineRequest(name, tokens, params, **fields)
        self.scheduler.check(request)
        self.scheduler.add(request)
        return request

    def step(self, num_held: int = 0, only: Sequence | None = None) -> dict[str, int]:
        """Runs a step; the tokens of each request in it."""
        scheduled = self.scheduler.schedule(num_held, only)
        assert self.cache.reserve(sum(one.table.missing(count) for one, count in scheduled))
        for sequence, count in scheduled:
            sequence.table.append(count)
            sequence.commit(count)
            if sequence.table.num_tokens == len(sequence.token_ids):
                if not sequence.is_alone:
                    for fork, _ in self.scheduler.fork(sequence):
                        fork.token_ids.append(7)
                sequence.token_ids.append(7)
        self.cache.balance()
        transfers, _ = self.cache.take_transfers()
        self.cache.apply([one.id for one in transfers], [], [])
        self.cache.integrity_check()
        found: dict[str, int] = {}
        for sequence, count in scheduled:
            name = sequence.request.request_id
            found[name] = found.get(name, 0) + count
        return found

    def finish(self, name: str) -> None:
        for sequence in self.scheduler.abort(name):
            assert sequence.finished and not sequence.table.pages

    def running(self) -> list[str]:
        return [one.request.request_id for one in self.scheduler.running]

    def waiting(self) -> list[str]:
        return [one.request.request_id for one in self.scheduler.waiting]

    def sequence(self, name: str) -> Sequence:
        return next(one for one in self.scheduler.running if one.request.request_id == name)
