"""Which rows the copy engine takes in one call: neighbours on both sides, of one part and of one pinned piece."""

import random
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.simulated_device import SimulatedDevice

from distkv.storage.moving.page_copies import PageCopies, copy_runs
from distkv.storage.moving.streams import Lane

LANES = st.sampled_from([Lane.LOAD, Lane.FETCH, Lane.SPILL])


@st.composite
def parts(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Pairs of each part, with runs of neighbours among them; each target once."""
    taken, result = 0, []
    for _ in range(draw(st.integers(1, 4))):
        part: list[tuple[int, int]] = []
        for _ in range(draw(st.integers(0, 4))):
            source, count = draw(st.integers(0, 30)), draw(st.integers(1, 6))
            taken += draw(st.integers(0, 1))
            part += [(source + index, taken + index) for index in range(count)]
            taken += count
        result.append(part)
    return result


@given(parts(), LANES, st.integers(1, 8))
def test_runs_are_of_neighbours_in_one_piece(pairs: list[list[tuple[int, int]]], lane: Lane, piece: int) -> None:
    copies = PageCopies(SimulatedDevice(random.Random(0)))
    rows = np.array([pair for part in pairs for pair in part], dtype=np.int64).reshape(-1, 2)
    prepared = copies.prepare_parts(lane, rows, [len(part) for part in pairs], piece)
    for part, expected in zip(prepared, pairs, strict=True):
        assert part.on_device is None and part.rows.tolist() == [list(pair) for pair in expected]
        assert [(a + index, b + index) for a, b, count in part.runs for index in range(count)] == expected
        before: Any = None
        for a, b, count in part.runs:
            host = b if lane is Lane.SPILL else a
            assert host // piece == (host + count - 1) // piece, "a copy fails that leaves its piece"
            joins = before == (a, b) and host % piece
            assert not joins, "neighbours go together"
            before = a + count, b + count


@given(parts(), LANES)
def test_both_ways_copy_the_same(pairs: list[list[tuple[int, int]]], lane: Lane) -> None:
    """What the kernel is given was uploaded once, for all parts."""
    device = SimulatedDevice(random.Random(0))
    copies, flat = PageCopies(device), [pair for part in pairs for pair in part]
    source, results = torch.randn(40, 3, 5), []
    for kernel in (False, True):
        if kernel:
            copies.kernels[lane] = gather
        target = torch.zeros(200, 3, 5)
        rows = np.array(flat, dtype=np.int64).reshape(-1, 2)
        for part in copies.prepare_parts(lane, rows, [len(part) for part in pairs], 7):
            copies.start(lane, source, target, part)
        device.synchronize()
        results.append(target)
    assert not device.errors and torch.equal(*results)
    for a, b in flat:
        assert torch.equal(results[0][b], source[a])
    assert results[0].any(dim=(1, 2)).sum() == len(flat)


def gather(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor, num_programs: int) -> None:
    for a, b in pairs.tolist():
        target[b] = source[a]


def test_runs_of_strided_rows() -> None:
    """As a layer of host pages and the parts of a device pool are."""
    source, target = torch.randn(6, 4, 2, 8)[:, 1:3].flatten(2), torch.zeros(2, 9, 16).transpose(0, 1)
    copy_runs(source, target, [(0, 3, 2), (5, 0, 1), (2, 7, 2)])
    expected = torch.zeros(9, 2, 16)
    for a, b in ((0, 3), (1, 4), (5, 0), (2, 7), (3, 8)):
        expected[b] = source[a]
    assert torch.equal(target, expected)
