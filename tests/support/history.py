"""A model of memory in which each place knows all tokens before it: a page that is taken for another one is noticed by
whoever reads it."""

from typing import Any

from support.memory import Memory, engine_info, fill_placeholders
from torch import Tensor

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.engine.sequence import Sequence
from distkv.sampling_params import SamplingParams
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import SequenceStep

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


class History(Memory):
    """A `Memory` whose places hold, for a token, the number of all tokens up to it and of the salt: what keys and
    values are a function of."""

    def __init__(self, info: EngineInfo, seed: int = 0, fault_rate: float = 0.0, takes_writes: bool = False):
        super().__init__(info, seed, fault_rate, takes_writes)
        self.owners: dict[int, Sequence] = {}  # by number of the table
        self.begun: dict[int, int] = {}  # by number of the table, the first token that was run
        self._numbers: dict[tuple[Any, int], int] = {}  # (number of what is before, token) -> number
        self._before: dict[int, int] = {}  # number -> that of what is before

    def watch(self, engine: Engine) -> None:
        """Notes who owns which table."""
        scheduler = engine._scheduler
        add, fork = scheduler.add, scheduler.fork

        def spy_add(request: EngineRequest) -> None:
            known = set(scheduler.waiting)
            add(request)
            [sequence] = set(scheduler.waiting) - known
            self.owners[sequence.number] = sequence

        def spy_fork(sequence: Sequence) -> Any:
            forks = fork(sequence)
            self.owners |= {one.number: one for one, _ in forks}
            return forks

        scheduler.add, scheduler.fork = spy_add, spy_fork  # type: ignore[method-assign]

    def execute(self, plan: StepPlan, sampled: Tensor | None) -> tuple[Tensor | None, Report]:
        fill_placeholders(plan, sampled)
        for part in plan.sequences:
            owner = self.owners[part.table]
            # one that is not known yet and not its own either is noticed by the step that reads it
            for mine, token in zip(owner.token_ids[part.start :], part.token_ids, strict=False):
                assert mine == token, "a sequence runs its own tokens"
            tokens = owner.token_ids[: part.start] + part.token_ids
            self.begun.setdefault(part.table, part.start)
            part.token_ids[:] = self.numbers(owner.request.cache_salt, tokens)[part.start :]
        return super().execute(plan, sampled)

    def numbers(self, salt: str | None, tokens: list[int]) -> list[int]:
        """The number of each token with all that is before it."""
        found: list[int] = []
        for token in tokens:
            before = found[-1] if found else -1
            number = self._numbers.setdefault((before if found else salt, token), len(self._numbers))
            self._before[number] = before
            found.append(number)
        return found

    def tokens_of(self, one: SequenceStep) -> list[int | None]:
        """What the sequence reads, which must be its own history."""
        read = super().tokens_of(one)
        wanted: list[int] = [one.token_ids[-1]]
        while self._before[wanted[-1]] >= 0:
            wanted.append(self._before[wanted[-1]])
        assert read == wanted[::-1], "a page of something else was read"
        return read


def caching_engine(memory_options: dict[str, Any] | None = None, **options: Any) -> tuple[Engine, History]:
    """An engine with prefix caching and its memory; `options` are fields of EngineInfo."""
    info = engine_info(**({"enable_prefix_caching": True, "eos_token_ids": ()} | options))
    memory = History(info, **(memory_options or {}))
    engine = Engine(info, RankExecutor(memory.execute), survives=False)  # what the memory finds wrong is raised
    memory.watch(engine)
    return engine, memory
