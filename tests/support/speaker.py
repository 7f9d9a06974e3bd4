"""A model of memory that speaks: its logits are a function of all tokens so far; and engines that run on it."""

import random
from typing import Any

import torch
from support.history import History
from support.memory import VOCAB, drain, engine_info, fill_placeholders
from torch import Tensor

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo, EngineRequest, TokenOutput
from distkv.sampling_params import SamplingParams
from distkv.storage.tier import Tier, decode_location
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import SequenceStep


class Speaker(History):
    """Its logits are a function of all tokens so far, so that an answer does not depend on what else runs."""

    def __init__(self, info: EngineInfo, **options: Any):
        super().__init__(info, **options)
        self.poison: tuple[str, int] | None = None  # request and position: a step that runs the token there raises
        self.raises_late = False  # when all that the plan asks for has been done
        self.late_damage: set[int] = set()  # numbers of steps whose disk reads all fail
        self.num_steps = self.num_damaged = 0
        self._started: set[int] = set()  # transfers; one that is sent again is passed over
        self._unsent = Report()  # of steps that raised
        self._broken: list[list[int]] = []  # slots that each sequence of the step under way could not read

    def execute(self, plan: StepPlan, sampled: Tensor | None) -> tuple[Tensor | None, Report]:
        self.num_steps += bool(plan.sequences)
        fill_placeholders(plan, sampled)
        parts = [(self.owners[part.table], part, part.start + len(part.token_ids)) for part in plan.sequences]
        known = [owner.token_ids[: part.start] + part.token_ids for owner, part, _ in parts]
        is_poisoned = any(
            (owner.request.request_id, place) == self.poison
            for owner, part, end in parts
            for place in range(part.start, end)
        )
        if is_poisoned and not self.raises_late:
            raise RuntimeError("poison")
        plan.transfers[:] = [one for one in plan.transfers if one.id not in self._started]
        self._started |= {one.id for one in plan.transfers}
        self._broken = []
        logits, report = super().execute(plan, sampled)
        rows = [
            -speak(tokens) if broken else speak(tokens)
            for tokens, broken, (_, part, _) in zip(known, self._broken, parts, strict=True)
            for _ in range(part.num_logits)
        ]
        report.bad_reads += [(slot, "it is damaged") for broken in self._broken for slot in broken]
        unsent, self._unsent = self._unsent, Report()
        report.done[:0], report.failed[:0] = unsent.done, unsent.failed
        report.checksums |= unsent.checksums
        if is_poisoned:
            self._unsent = report
            raise RuntimeError("poison")
        return (torch.stack(rows) if rows else torch.empty(0, VOCAB)) if logits is not None else None, report

    def tokens_of(self, one: SequenceStep) -> list[int | None]:
        cold = [decode_location(place) for place in one.pages.tolist() if place < 0]
        on_disk = [slot for tier, slot in cold if tier is Tier.DISK]
        self._broken.append(on_disk if self.num_steps in self.late_damage else [])
        self.num_damaged += len(self._broken[-1])
        return super().tokens_of(one)


def speak(tokens: list[int]) -> Tensor:
    """The logits `[vocab_size]` of the token after these."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))


def make(**options: Any) -> tuple[Engine, Speaker]:
    """An engine and its memory; `options` are fields of EngineInfo, and `memory` those of the memory."""
    memory_options = options.pop("memory", {})
    info = engine_info(**({"enable_prefix_caching": True, "max_model_len": 1000} | options))
    memory = Speaker(info, **memory_options)
    engine = Engine(info, RankExecutor(memory.execute))
    memory.watch(engine)
    return engine, memory


def requests(count: int, params: SamplingParams, max_tokens: int, first: int = 0) -> list[EngineRequest]:
    """Random prompts of up to 40 tokens; request `n` is the same one in every call."""
    rng = random.Random(5)
    prompts = [[rng.randrange(10, VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(first + count)]
    return [EngineRequest(str(n), prompts[n], params, max_tokens, seed=n) for n in range(first, first + count)]


def answers(outputs: list[Any]) -> dict[tuple[str, int], list[int]]:
    """The tokens of each answer, by request and index."""
    found: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        if isinstance(output, TokenOutput):
            found.setdefault((output.request_id, output.index), []).append(output.token_id)
    return found


def run(added: list[EngineRequest], **options: Any) -> tuple[dict[tuple[str, int], list[int]], list[Any]]:
    """Answers and outputs of an engine of its own, whose books are right at the end."""
    engine, _ = make(**options)
    found = run_all(engine, added)
    engine.integrity_check()
    return found


def run_all(engine: Engine, added: list[EngineRequest]) -> tuple[dict[tuple[str, int], list[int]], list[Any]]:
    """Answers and outputs of an engine that runs these requests to the end."""
    engine.add(added)
    outputs = drain(engine)
    return answers(outputs), outputs
