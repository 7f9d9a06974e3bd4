"""Copies beside computing: an engine with a rank whose device runs far behind the host, in any order that the declared
waits allow, still finds in every page what belongs there; and each of the waits is needed for that.

There is no GPU in these tests. The mover, the staging ring and the read-ahead memory are the real ones.
"""

import logging
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import PAGE_SIZE, VOCAB, engine_info, fill_placeholders
from support.simulated_device import SimulatedDevice, SimulatedMemory, Wait
from torch import Tensor

from distkv.engine.engine import Engine
from distkv.engine.protocol import EngineInfo, EngineRequest, RequestFailed
from distkv.errors import CapacityError, StoreError
from distkv.sampling_params import SamplingParams
from distkv.storage.moving.mover import DISK_THREADS, Mover
from distkv.storage.moving.read_ahead import READ_THREADS, ReadAhead
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.moving.streams import Lane
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, Transfer, decode_location, encode_location
from distkv.workers import bandwidth
from distkv.workers.group.rank_executor import RankExecutor
from distkv.workers.group.report import Report
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.page_directory import PageDirectory, SequenceStep

SPEC = PageSpec(num_layers=2, num_kv_heads=1, page_size=PAGE_SIZE, head_dim=4, dtype="float32")
MARKS = 1000 * (1 + torch.arange(SPEC.num_layers * 2).view(SPEC.num_layers, 2, 1, 1, 1))  # each layer's K and V differ


class FakeDisk:
    """A `DiskPool` in memory, of which reads and writes fail now and then."""

    def __init__(self, num_pages: int, rng: random.Random, faults: float):
        self.pages = torch.zeros(num_pages, *SPEC.page_shape)
        self.rng, self.faults = rng, faults

    def store(self, slot: int, page: Tensor) -> None:
        self.pages[slot] = -1
        if self.rng.random() < self.faults:
            raise StoreError("the disk is full")
        self.pages[slot] = page

    def load(self, slot: int, page: Tensor) -> None:
        page[:] = -2
        if self.rng.random() < self.faults:
            raise StoreError("it is damaged")
        page[:] = self.pages[slot]

    def checksums(self, slot: int) -> bytes:
        return b""

    def parts(self, layer_slice: Tensor) -> Tensor:
        return layer_slice

    def open(self, slots: Sequence[int]) -> "FakePages":
        return FakePages(self, slots)


class FakePages:
    def __init__(self, disk: FakeDisk, slots: Sequence[int]):
        self.disk, self.slots = disk, slots

    def read(self, index: int, layer: int, parts: Tensor) -> None:
        parts[:] = -3
        if self.disk.rng.random() < self.disk.faults / 20:
            raise StoreError("it is damaged")
        parts[:] = self.disk.pages[self.slots[index], layer]

    def close(self) -> None:
        self.slots = []


def any_order(rng: random.Random, source: Tensor, target: Tensor, pairs: Tensor, num_programs: int) -> None:
    """A gather kernel."""
    for a, b in rng.sample(pairs.tolist(), len(pairs)):
        target[b] = source[a]


class Fault(Exception):
    """Raised in the midst of a step."""


class DeviceMemory:
    """A rank that writes its tokens into pages and reads them back, on the device: each layer holds their numbers."""

    def __init__(self, info: EngineInfo, seed: int, faults: float, forgets: Wait | None):
        self.rng = random.Random(seed)
        rng, self.faults = self.rng, faults
        self.device = SimulatedDevice(rng, forgets)
        self.pace = rng.choice([0, 0.5, 0.9, 0.98])
        memory = SimulatedMemory(self.device)
        copies = memory.make_copies()
        for lane in (Lane.LOAD, Lane.FETCH, Lane.SPILL):
            if rng.random() < 0.5:
                copies.kernels[lane] = partial(any_order, rng)
        self.pool = DevicePool(SPEC, info.num_pages, memory)
        self.host = HostPool(SPEC, info.num_host_pages, pinned=memory.pinned)
        self.host.piece_pages = 3  # as if they were so large that more are not pinned together
        disk: Any = FakeDisk(info.num_disk_pages, rng, faults) if info.num_disk_pages else None
        self.mover = Mover(self.pool, self.host, disk, copies)
        self.mover._disk_threads = self.device.threads(DISK_THREADS)
        read_ahead = None
        buffer_pages = rng.randint(1, 4)
        if disk is not None:
            read_ahead = ReadAhead(SPEC, buffer_pages + rng.choice([0, 1, 5, 20]), disk, pinned=False)
            read_ahead.threads = self.device.threads(READ_THREADS)
        self.ring = StagingRing(
            SPEC, NUM_BUFFERS * buffer_pages, self.host, disk, read_ahead, memory, copies, self.mover.filling
        )
        self.ring.buffers.fill_(-4)
        self.directory = PageDirectory(PAGE_SIZE)
        self.read: list[list[int]] = []  # what sequences found in their pages
        self.counts: Counter[str] = Counter()

    def execute(self, plan: StepPlan, drawn: Tensor | None) -> tuple[Tensor | None, Report]:
        fill_placeholders(plan, drawn)
        steps = self.directory.update(plan)
        waits = self.device.num_host_waits
        self.mover.start(plan.transfers, plan.await_ids)
        for source, target in plan.copies:
            self.compute(partial(self.pool.copy, source, target))
        self.compute(partial(self.pool.clear, list(plan.clear)))
        bad_reads = {}
        if steps:
            bad_reads = self.run(steps)
            assert self.device.num_host_waits == waits, "a step waits for nothing but the disk"
        else:
            self.mover.wait(plan.await_ids)
        self.device.go_on(self.pace)
        moved = self.mover.report()
        if not steps:
            told = {*moved.done, *(id for id, _ in moved.failed)}
            assert told >= {one.id for one in plan.transfers} & set(plan.await_ids)
        wanted = sum(one.num_logits for one in steps)
        report = Report(moved.done, moved.failed, moved.checksums, list(bad_reads.items()))
        return torch.randn(wanted, VOCAB) if steps else None, report

    def run(self, steps: list[SequenceStep]) -> dict[int, str]:
        rng, size = self.rng, self.ring.buffer_pages
        cold = sorted({place for one in steps for place in one.pages.tolist() if place < 0}, reverse=True)
        if rng.random() < 0.3:  # a page may come twice, in any order
            cold = rng.sample(cold, len(cold)) + rng.sample(cold, len(cold) // 2)
        loads = [cold[first : first + size] for first in range(0, len(cold), size)]
        found: list[dict[int, Tensor]] = [{} for _ in range(SPEC.num_layers)]
        breaks_at = rng.randrange(2 + SPEC.num_layers * (1 + len(loads))) if rng.random() < self.faults / 5 else -1
        if breaks_at == 0:
            raise Fault("before anything is computed")
        bad_reads = self.layers(steps, loads, found, breaks_at) if loads else {}
        for layer in range(SPEC.num_layers) if not loads else []:
            self.one_layer(layer, steps, found[layer])
        if breaks_at > 0:
            self.counts["broken"] += 1
            raise Fault("at the end")
        self.counts["steps that stream"] += bool(loads)
        self.counts["bad reads"] += len(bad_reads)
        on_disk = [place for place in cold if decode_location(place)[0] is Tier.DISK]
        bad = {place for place in on_disk if decode_location(place)[1] in bad_reads}
        for one in steps:
            if bad.isdisjoint(one.pages.tolist()):
                self.compute(partial(self.look, one, found))
        return bad_reads

    def layers(
        self, steps: list[SequenceStep], loads: list[list[int]], found: list[dict[int, Tensor]], breaks_at: int
    ) -> dict[int, str]:
        stream = self.ring.begin(loads)
        try:
            for layer in range(SPEC.num_layers):
                self.one_layer(layer, steps, found[layer])
                kept = None
                for load in loads:
                    taken = stream.take(), load
                    # a load is there until the next call but one
                    for buffer, places in [taken] if self.rng.random() < 0.7 else [kept or taken, taken]:
                        self.compute(partial(keep, found[layer], places, buffer))
                    kept = taken
                    self.device.go_on(self.pace)
                    breaks_at -= 1
                    if breaks_at == 0:
                        self.counts["broken"] += 1
                        raise Fault("between two loads")
        finally:
            stream.close()
        return stream.bad_reads

    def one_layer(self, layer: int, steps: list[SequenceStep], found: dict[int, Tensor]) -> None:
        """Writes the new tokens, and keeps what resident pages hold."""
        pool = self.pool.layer(layer)
        for one in steps:
            self.compute(partial(write, pool, layer, one))
            resident = [place for place in one.pages.tolist() if place >= 0]
            self.compute(partial(keep, found, resident, pool.transpose(0, 1), resident))

    def compute(self, work: Any) -> None:
        self.device.run(Lane.COMPUTE, work)
        if self.rng.random() < 0.3:
            self.device.go_on(self.pace)

    def look(self, one: SequenceStep, found: list[dict[int, Tensor]]) -> None:
        """On the device: what a sequence finds in its pages."""
        pages = [torch.stack([layer[place] for layer in found]) for place in one.pages.tolist()]
        count = one.start + len(one.token_ids)
        values = (torch.cat(pages, dim=3) - MARKS)[:, :, :, :count]
        tokens = values[0, 0, 0, :, 0]
        assert bool((values == tokens[:, None]).all()), "a page of two contents"
        self.read.append(tokens.int().tolist())


def write(pool: Tensor, layer: int, one: SequenceStep) -> None:
    for position, token in enumerate(one.token_ids, one.start):
        pool[:, one.pages[position // PAGE_SIZE], :, position % PAGE_SIZE] = token + MARKS[layer, :, 0]


def keep(found: dict[int, Tensor], places: list[int], pages: Tensor, rows: Sequence[int] | None = None) -> None:
    for place, row in zip(places, rows if rows is not None else range(len(places)), strict=True):
        value = pages[row].clone()
        # what cannot be read is zeros
        same = place not in found or not value.any() or not found[place].any() or torch.equal(found[place], value)
        assert place >= 0 or same, "a load changes while it is read"
        found[place] = value


def run_requests(seed: int, faults: float, forgets: Wait | None = None) -> tuple[DeviceMemory, list[str]]:
    """Random requests, forks and aborts; returns what went wrong."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    info = engine_info(
        max_num_seqs=rng.choice([4, 8]), max_num_batched_tokens=rng.choice([8, 17, 40]),
        num_pages=rng.choice([7, 9, 12, 16, 24]), num_host_pages=rng.choice([2, 3, 8]),
        num_disk_pages=rng.choice([0, 40, 40]), enable_prefix_caching=rng.random() < 0.7,
    )  # fmt: skip
    known = [rng.randrange(3, VOCAB) for _ in range(60)]  # what many prompts begin with
    memory = DeviceMemory(info, seed, faults, forgets)
    engine = Engine(info, RankExecutor(memory.execute))
    requests: dict[str, EngineRequest] = {}
    answers: dict[tuple[str, int], list[int]] = {}
    step = 0
    while engine.has_work or step < 50:
        assert step < 5000, "it does not come to an end"
        if step < 50 and rng.random() < 0.4:
            prompt = known[: rng.choice([0, 0, 16, 33, 60])] + rng.choices(range(3, VOCAB), k=rng.randint(1, 40))
            params = SamplingParams(n=rng.choice([1, 1, 2, 3]), temperature=1.0)
            request = EngineRequest(str(step), prompt, params, max_tokens=rng.randint(1, 40), seed=step)
            try:
                engine.add([request])
                requests[request.request_id] = request
            except CapacityError:
                pass
        if requests and step < 50 and rng.random() < 0.05:
            engine.abort([(rng.choice(list(requests)), rng.choice([None, 0, 1]))])
        try:
            outputs = engine.step()
        except Fault:  # while a lost page was computed again, which is tried once more
            outputs = []
        for output in outputs:
            if not isinstance(output, RequestFailed):
                answers.setdefault((output.request_id, output.index), []).append(output.token_id)
        step += 1
    engine.integrity_check()
    memory.device.synchronize()
    wrong = [str(error) for error in memory.device.errors]
    texts = [
        requests[request_id].prompt_token_ids + answers.get((request_id, index), [])
        for request_id, request in requests.items()
        for index in range(request.params.n)
    ]
    wrong += [str(tokens) for tokens in memory.read if not any(tokens == text[: len(tokens)] for text in texts)]
    return memory, wrong


@pytest.mark.parametrize("faults", [0.0, 0.2])
def test_pages_hold_what_belongs_there_however_late_the_device_is(faults: float) -> None:
    total: Counter[str] = Counter()
    for seed in range(7):
        memory, wrong = run_requests(seed, faults)
        assert not wrong, (seed, wrong[:3])
        total += memory.counts
        total += Counter(f"{a.name} to {b.name}" for a, b in memory.mover.bytes)
        total["read"] += len(memory.read)
        memory.mover.close()
    assert total["read"] > 250 and total["steps that stream"] > 50
    assert {"DEVICE to HOST", "HOST to DEVICE", "HOST to DISK", "DISK to HOST"} <= total.keys()
    if faults:
        assert total["broken"] > 5 and total["bad reads"]


def test_the_faster_way_of_copying_is_chosen_for_each_lane(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel has to be faster by a tenth."""
    rng = random.Random(0)
    memory = SimulatedMemory(SimulatedDevice(rng))
    copies = memory.make_copies()
    pool, host = DevicePool(SPEC, 12, memory), HostPool(SPEC, 9, pinned=memory.pinned)
    ring = StagingRing(SPEC, NUM_BUFFERS * 4, host, None, None, memory, copies)
    tiers: Any = SimpleNamespace(copies=copies, device=pool, host=host, ring=ring, disk=None)
    seconds = iter([1.0, 0.5, 1.0, 0.95, 1.0, 2.0, 0.25])
    ways = []

    def measured(measure: Any) -> float:
        assert measure() > 0
        ways.append(len(copies.kernels))
        return next(seconds)

    monkeypatch.setattr(bandwidth, "fastest", measured)
    caplog.set_level(logging.INFO, "distkv")
    kernel = partial(any_order, rng)
    bandwidth.choose_copies(tiers, kernel)
    assert copies.kernels == {Lane.LOAD: kernel} and ways == [0, 1, 1, 2, 1, 2]
    assert [line.rsplit(" ", 3)[1:] for line in caplog.messages] == [["kernel", "is", "used"]] + 2 * [
        ["engine", "is", "used"]
    ]
    most = bandwidth.ENQUEUED_COPIES[1]
    assert bandwidth.measure_bandwidth(tiers).host == most * 4 * SPEC.layer_slice_bytes / 0.25


# --- without a leader: slots change hands as fast as `mover.py` lets them ---


class Slots:
    """What a leader may ask for, at random: it waits for reports of all but spills, which it awaits."""

    def __init__(self, seed: int, forgets: Wait | None):
        rng = self.rng = random.Random(seed)
        self.device = SimulatedDevice(rng, forgets)
        memory = SimulatedMemory(self.device)
        copies = memory.make_copies()
        for lane in (Lane.LOAD, Lane.FETCH, Lane.SPILL):
            if rng.random() < 0.5:
                copies.kernels[lane] = partial(any_order, rng)
        self.pool, self.host = DevicePool(SPEC, 3, memory), HostPool(SPEC, 3, pinned=memory.pinned)
        disk: Any = FakeDisk(3, rng, faults=0)
        self.mover = Mover(self.pool, self.host, disk, copies)
        self.mover._disk_threads = self.device.threads(DISK_THREADS)
        read_ahead = ReadAhead(SPEC, rng.randint(2, 8), disk, pinned=False)
        read_ahead.threads = self.device.threads(READ_THREADS)
        self.ring = StagingRing(SPEC, NUM_BUFFERS * 2, self.host, disk, read_ahead, memory, copies, self.mover.filling)
        self.content = {(tier, slot): 3 * tier + slot for tier in Tier for slot in range(3)}  # as the leader sees it
        for (tier, slot), value in self.content.items():
            pages = {Tier.DEVICE: self.pool.rows(), Tier.HOST: self.host.rows(), Tier.DISK: disk.pages}[tier]
            pages[slot] = value
        self.busy: dict[int, Transfer] = {}  # what was not reported
        self.num_ids, self.num_pages = 0, len(self.content)

    def step(self) -> None:
        """A plan and its step, which may break in the midst of a load."""
        rng, content = self.rng, self.content
        transfers, awaited = [], []
        for _ in range(rng.randint(0, 4)):
            source, target = rng.choice([(Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DEVICE), (Tier.HOST, Tier.DISK),
                                         (Tier.DISK, Tier.HOST)])  # fmt: skip
            one = Transfer(self.num_ids, source, rng.randrange(3), target, rng.randrange(3))
            read, filled = (source, one.source_slot), (target, one.target_slot)
            if not self.is_there(*read) or not self.is_free(*filled):
                continue
            self.num_ids += 1
            transfers.append(one)
            content[filled] = content[read]
            if source is Tier.DEVICE:
                awaited.append(one.id)
            else:
                self.busy[one.id] = one
        self.mover.start(transfers, awaited)
        expected = content.copy()
        for slot in range(3):
            if self.is_there(Tier.DEVICE, slot):
                self.device.run(
                    Lane.COMPUTE, partial(self.check, self.pool.data[:, :, slot], expected[Tier.DEVICE, slot])
                )
            if self.is_free(Tier.DEVICE, slot) and rng.random() < 0.5:
                self.num_pages += 1
                content[Tier.DEVICE, slot] = self.num_pages
                self.device.run(Lane.COMPUTE, partial(self.pool.data[:, :, slot].fill_, self.num_pages))
        cold = [one for one in content if one[0] is not Tier.DEVICE and self.is_there(*one)]
        rng.shuffle(cold)
        loads = [cold[first : first + 2] for first in range(0, len(cold), 2)]
        if loads:
            self.stream(loads, rng.randrange(2 * len(loads) * SPEC.num_layers))
        self.device.go_on(rng.choice([0, 0, 0.5, 0.9]))
        for id in self.mover.report().done:
            self.busy.pop(id, None)

    def stream(self, loads: list[list[tuple[Tier, int]]], count: int) -> None:
        stream = self.ring.begin([[encode_location(*one) for one in load] for load in loads])
        for number in range(min(count, len(loads) * SPEC.num_layers)):
            load = loads[number % len(loads)]
            for page, one in zip(stream.take(), load, strict=True):
                self.device.run(Lane.COMPUTE, partial(self.check, page, self.content[one]))
        stream.close()

    def is_there(self, tier: Tier, slot: int) -> bool:
        return all((one.target, one.target_slot) != (tier, slot) for one in self.busy.values())

    def is_free(self, tier: Tier, slot: int) -> bool:
        return self.is_there(tier, slot) and all(
            (one.source, one.source_slot) != (tier, slot) for one in self.busy.values()
        )

    def check(self, page: Tensor, value: int) -> None:
        assert bool((page == value).all()), (page.unique(), value)


def move_pages(seed: int, forgets: Wait | None = None) -> list[Exception]:
    """What goes wrong in some steps."""
    slots = Slots(seed, forgets)
    for _ in range(15):
        slots.step()
    slots.device.synchronize()
    slots.mover.close()
    return slots.device.errors


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_slots_change_hands_while_the_device_is_behind(seed: int) -> None:
    assert move_pages(seed) == []


ALL_WAITS = [
    (Lane.COMPUTE, Lane.LOAD), (Lane.COMPUTE, Lane.SPILL), (Lane.LOAD, Lane.COMPUTE), (Lane.LOAD, Lane.SPILL),
    (Lane.FETCH, Lane.COMPUTE), (Lane.FETCH, Lane.SPILL), (Lane.SPILL, Lane.COMPUTE), (None, Lane.COMPUTE),
    (None, Lane.LOAD), (None, Lane.SPILL),
]  # fmt: skip


@pytest.mark.parametrize("wait", ALL_WAITS, ids=lambda wait: f"{getattr(wait[0], 'name', 'thread')} for {wait[1].name}")
def test_each_wait_is_needed(wait: Wait) -> None:
    """Without it some page is read too early or filled too early."""
    assert any(move_pages(seed, wait) for seed in range(300))
