"""A model of memory in the place of the ranks: pages of tokens instead of keys and values."""

import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from distkv.engine.answer_lengths import NUM_KEPT
from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo
from distkv.storage.tier import Tier, Transfer, decode_location
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import PageDirectory, SequenceStep

PAGE_SIZE, VOCAB, EOS = 16, 50, 2


def engine_info(**options: Any) -> EngineInfo:
    """A small engine without host and disk; `options` are other values of its fields."""
    fields: dict[str, Any] = {
        "max_model_len": 100, "max_num_seqs": 8, "max_num_batched_tokens": 40, "page_size": PAGE_SIZE, "num_pages": 40,
        "num_host_pages": 0, "num_disk_pages": 0, "page_bytes": 1, "pool_bytes": 1, "kv_bytes_per_token": 1,
        "vocab_size": VOCAB, "eos_token_ids": (EOS,), "seed": 0, "cache_dir": None,
    }  # fmt: skip
    return EngineInfo(**(fields | options))


class Memory:
    """Pages of tokens instead of keys and values, in three tiers; a step plan is all it is told.

    Transfers end in a later step than they began, unless the plan waits for them, and those of the disk fail now and
    then, as do reads of a step from it.
    """

    def __init__(self, info: EngineInfo, seed: int = 0, fault_rate: float = 0.0, takes_writes: bool = False):
        """`takes_writes` has the disk fail in reading alone."""
        self.info = info
        self.random = random.Random(seed)
        self.fault_rate, self.takes_writes = fault_rate, takes_writes
        self.tiers: list[list[list[int | None] | None]] = [
            [[None] * PAGE_SIZE for _ in range(count)]
            for count in (info.num_pages, info.num_host_pages, info.num_disk_pages)
        ]
        self.directory = PageDirectory(PAGE_SIZE)
        self.on_their_way: list[Transfer] = []
        self.read: list[list[int | None]] = []  # what the sequences of the last step find in their pages
        self.bytes_moved: Counter[str] = Counter()

    def execute(self, plan: StepPlan, sampled: Tensor | None) -> tuple[Tensor | None, Report]:
        report = Report()
        fill_placeholders(plan, sampled)
        steps = self.directory.update(plan)
        for transfer in plan.transfers:
            slot = transfer.target, transfer.target_slot
            if not any((one.source, one.source_slot) == slot for one in self.on_their_way):  # those end first
                self.tiers[transfer.target][transfer.target_slot] = None  # neither the old page nor the new one
            self.on_their_way.append(transfer)
        for transfer in list(self.on_their_way):
            if transfer.id in plan.await_ids or self.random.random() < 0.3:
                self.end(transfer, report)
        device = self.tiers[Tier.DEVICE]
        for source, target in plan.copies:
            device[target] = list(self.page(source))
        for slot in plan.clear:
            device[slot] = [None] * PAGE_SIZE
        assert sum(len(one.token_ids) for one in steps) <= max(self.info.max_num_batched_tokens, PAGE_SIZE)
        for one in steps:
            for position, token in enumerate(one.token_ids, one.start):
                self.page(one.pages[position // PAGE_SIZE])[position % PAGE_SIZE] = token
        self.read = []
        for one in steps:
            cold = [decode_location(place) for place in one.pages if place < 0]
            on_disk = [slot for tier, slot in cold if tier is Tier.DISK]
            bad = [slot for slot in on_disk if self.random.random() < self.fault_rate / 20]
            report.bad_reads += [(slot, "it is damaged") for slot in bad]
            if not bad:
                self.read.append(self.tokens_of(one))
        wanted = sum(one.num_logits for one in steps)
        return torch.randn(wanted, VOCAB) if steps else None, report

    def end(self, transfer: Transfer, report: Report) -> None:
        """Has a transfer come to its end, or fail."""
        self.on_their_way.remove(transfer)
        may_fail = transfer.source is Tier.DISK or (transfer.target is Tier.DISK and not self.takes_writes)
        if may_fail and self.random.random() < self.fault_rate:
            report.failed.append((transfer.id, "the disk is full"))
            return
        content = self.tiers[transfer.source][transfer.source_slot]
        assert content is not None and None not in content, "only full pages move"
        self.tiers[transfer.target][transfer.target_slot] = list(content)
        report.done.append(transfer.id)
        if transfer.target is Tier.DISK:
            report.checksums[transfer.id] = b""
        self.bytes_moved[f"{transfer.source.name} to {transfer.target.name}"] += 1

    def page(self, place: int) -> list[int | None]:
        """The tokens of a page, wherever it lies."""
        tier, slot = decode_location(place) if place < 0 else (Tier.DEVICE, place)
        content = self.tiers[tier][slot]
        assert content is not None
        return content

    def tokens_of(self, one: SequenceStep) -> list[int | None]:
        """What a sequence reads in its pages."""
        places = range(one.start + len(one.token_ids))
        return [self.page(one.pages[place // PAGE_SIZE])[place % PAGE_SIZE] for place in places]


def fill_placeholders(plan: StepPlan, sampled: Tensor | None) -> None:
    """Puts in the tokens that a plan refers to."""
    assert (sampled is None) == (plan.num_sampled == 0)
    tokens = [] if sampled is None else sampled.tolist()
    assert len(tokens) == plan.num_sampled
    for part in plan.sequences:
        part.token_ids[:] = [token if token >= 0 else tokens[-1 - token] for token in part.token_ids]


def drain(engine: Engine) -> list[Any]:
    """All outputs to the end."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def expect_short_answers(engine: Engine) -> None:
    """Has an engine take all answers for short ones: it lets more requests begin than there is room for."""
    for _ in range(NUM_KEPT):
        engine._scheduler._lengths.add(1)
