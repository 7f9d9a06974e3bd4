"""Simulated ranks as one executor, and the thread that steps run on."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from simulation.model import VALUE_BYTES, ObservedTokens, head_hash, pick, score, token_state
from simulation.rank import SimulatedRank
from simulation.world import Process, World

from distkv.engine.protocol import EngineInfo
from distkv.workers.group import step_plan
from distkv.workers.group.executor import StepResult
from distkv.workers.group.report import ReportCollector
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import SequenceStep
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampled_token import SampledToken, TokenLogprobs

STAGES = ("before", "begun", "computing", "computed", "reported")


class StepFault(Exception):
    """Something that nobody expects is raised in a step."""


class DeviceFault(Exception):
    """The device has failed, which shows when tokens are read."""


class Stuck(Exception):
    """Nothing more comes of a step."""


@dataclass(frozen=True)
class _Tokens:
    process: Process
    tokens: list[list[SampledToken]]
    fails: bool = False

    def result(self) -> list[list[SampledToken]]:
        self.process.point("tokens are read")
        if self.fails:
            self.process.world.count("device fault")
            raise DeviceFault("an illegal memory access was encountered")
        return self.tokens


@dataclass(frozen=True)
class _Scores:
    found: list[TokenLogprobs]

    def result(self) -> list[TokenLogprobs]:
        return self.found


class SimulatedExecutor:
    """An `Executor`. All ranks take part in each step, as they would by their sums: what one of them reads wrong makes
    the values of all wrong."""

    def __init__(self, world: World, process: Process, info: EngineInfo, ranks: list[SimulatedRank]):
        self.world, self.process, self.info, self.ranks = world, process, info, ranks
        self.step_faults = self.device_faults = self.hangs = 0.0  # how often there is one
        self.is_stuck = self.is_running = False
        self.group: Any = None  # that it runs in, where it does
        self._collector = ReportCollector(len(ranks))
        self._sampled: list[int] = []  # by the last run with rows

    def progress(self) -> int:
        """See `RankExecutor.progress`: while a step takes long, its sums go on."""
        return 0 if self.is_stuck else int(1000 * self.world.now)

    def warm_up(self) -> None:
        self.process.point("warming up")

    def run(self, plan: StepPlan, rows: list[SampleRow]) -> StepResult:
        """See `Executor.run`."""
        self.is_running = True
        try:
            return self._run(plan, rows)
        finally:
            self.is_running = False

    def _run(self, plan: StepPlan, rows: list[SampleRow]) -> StepResult:
        world, report = self.world, None
        self.process.point("before a plan")
        encoded = step_plan.encode(plan)
        world.note("plan", encoded)
        world.count("plans")
        if world.chance(self.hangs):
            self.is_stuck = True
            world.count("hang")
            raise Stuck
        stage = world.rng.choice(STAGES) if world.chance(self.step_faults) else ""
        try:
            self._fail_at("before", stage)
            steps = [rank.begin(step_plan.decode(encoded)) for rank in self.ranks]
            self._fail_at("begun", stage)
            assert plan.num_sampled in (0, len(self._sampled)), "the step refers to the one before it"
            wanted, scores = self._compute(plan, steps, stage)
            self.process.point("computed")
            self._fail_at("computed", stage)
            awaited = [] if plan.sequences else plan.await_ids
            report = self._collector.add([rank.report(awaited) for rank in self.ranks])
            self.process.point("before the report")
            self._fail_at("reported", stage)
            scored = _Scores(scores) if scores else None
            if not rows:
                return StepResult(report, scores=scored)
            tokens = [self._sample(row, wanted[row.logits_row]) for row in rows]
            self._sampled = [token for token, _ in tokens]
            world.note("sampled", self._sampled)
            fails = world.chance(self.device_faults)
            return StepResult(report, _Tokens(self.process, [[token] for token in tokens], fails), scored)
        except StepFault as error:  # what the simulation finds wrong is raised
            return StepResult(report, error=error)

    def _fail_at(self, stage: str, chosen: str) -> None:
        if stage == chosen:
            self.world.count(f"step fault: {stage}")
            raise StepFault(stage)

    def _compute(
        self, plan: StepPlan, steps: list[list[SequenceStep]], stage: str
    ) -> tuple[list[bytes], list[TokenLogprobs]]:
        """Runs the sequences; returns the logits that are wanted, and the scores."""
        wanted: list[bytes] = []
        scores: list[TokenLogprobs] = []
        for number, part in enumerate(plan.sequences):
            token_ids = [token if token >= 0 else self._sampled[-1 - token] for token in part.token_ids]
            logits = self._run_sequence([own[number] for own in steps], token_ids)
            first = len(logits) - part.num_logits
            wanted += logits[first:]
            for row, token in zip(logits[first - len(part.scored) : first], part.scored, strict=True):
                scores.append(TokenLogprobs(score(row, token), 1, []))
            self.world.count("drafting", part.resident_only)
            if not number:
                self.process.point("amid computing")
                self._fail_at("computing", stage)
        return wanted, scores

    def _run_sequence(self, steps: list[SequenceStep], token_ids: list[int]) -> list[bytes]:
        """Runs one sequence on all ranks; returns the logits of its tokens."""
        hashes: list[tuple[int, Any]] = []
        for rank, step in zip(self.ranks, steps, strict=True):
            for head, content in zip(rank.heads, rank.read(step), strict=True):
                hashes.append((head, head_hash(head)))
                hashes[-1][1].update(content)
        written: list[bytearray] = [bytearray() for _ in hashes]
        logits = []
        memories = self._memories(steps)
        for position, token in enumerate(token_ids, steps[0].position):
            digests: dict[int, bytes] = {}
            for head, one in hashes:
                digest = one.copy().digest()
                if digests.setdefault(head, digest) != digest:  # ranks that share a head have read different things
                    digests[head] = bytes(a ^ b for a, b in zip(digest, digests[head], strict=True))
            read = [digests[head] for head in sorted(digests)]
            if memories and position >= steps[0].prompt_len:
                read[0] += b"".join({one.choose() for one in memories})  # one, where ranks remember the same
            state = token_state(read, token, position)
            if position >= steps[0].prompt_len - self.info.num_observed:
                for memory in memories:
                    memory.observe(state[-8:])
            for values, (head, one) in zip(written, hashes, strict=True):
                value = state[VALUE_BYTES * head : VALUE_BYTES * (head + 1)]
                one.update(value)
                values += value
            logits.append(state[-8:])
        first = 0
        for rank, step in zip(self.ranks, steps, strict=True):
            rank.write(step, [bytes(one) for one in written[first : first + len(rank.heads)]])
            first += len(rank.heads)
            if memories:
                step.memory.end(step.start + len(token_ids))
        return logits

    def _memories(self, steps: list[SequenceStep]) -> list[Any]:
        """What a policy remembers of a sequence, on each rank; empty where none is observed in the step."""
        first = max(0, steps[0].prompt_len - self.info.num_observed)
        if not self.info.num_observed or steps[0].start + len(steps[0].token_ids) <= first:
            return []
        for step in steps:
            step.memory.begin(step.start, first, lambda: [ObservedTokens()])
        return [step.memory.layers[0] for step in steps]

    def _sample(self, row: SampleRow, logits: bytes) -> SampledToken:
        vocab_size = self.info.vocab_size
        pending = None if row.pending is None else self._sampled[row.pending]
        banned: set[int] = set()
        biases: list[tuple[int, float]] = []
        if row.edits is not None:
            edits = row.edits
            biases = sorted(edits.biases.items())
            banned |= set(edits.forbidden) | {token for token, before in edits.forbidden_after if before == pending}
            if edits.allowed is not None:
                bits = np.unpackbits(edits.allowed.view(np.uint8), bitorder="little")[:vocab_size]
                banned |= set(np.flatnonzero(bits == 0).tolist())
        penalties = row.repetition_penalty, row.presence_penalty, row.frequency_penalty
        history = row.output_token_ids if pending is None else [*row.output_token_ids, pending]
        rules = (row.temperature, row.top_p, row.top_k, *penalties, biases)
        token = pick(logits, vocab_size, row.uniform, rules, banned, history if row.penalised else [])
        told = None if row.num_logprobs is None else TokenLogprobs(score(logits, token), 1, [])
        return token, told


class StepThread:
    """In the place of the thread that steps run on. What is submitted runs at once or when somebody wants to know, and
    takes its time either way."""

    def __init__(self, world: World, pace: float):
        """
        Args:
            pace: seconds that a step takes at most.
        """
        self.world, self.pace = world, pace

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "StepFuture":
        future = StepFuture(self, lambda: work(*arguments))
        if self.world.chance(0.5):
            future.run()
        return future

    def shutdown(self) -> None:
        """Nothing runs by itself."""


class StepFuture:
    """What comes of a step."""

    def __init__(self, thread: StepThread, work: Callable[[], Any]):
        self._world, self._work = thread.world, work
        self._end = self._world.now + thread.pace * self._world.rng.random()
        self._has_run = False
        self._outcome: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        if self._has_run:
            return
        self._has_run = True
        try:
            self._outcome = self._work()
        except Stuck:
            self._end = inf
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        return self._has_run and self._world.now >= self._end

    def result(self, timeout: float | None = None) -> Any:
        self.run()
        left = self._end - self._world.now
        if timeout is not None and left > timeout:
            self._world.sleep(timeout)
            raise TimeoutError
        if left > 0:
            self._world.wait(self.done, None if left == inf else left)
        if self._error is not None:
            raise self._error
        return self._outcome
