"""How the prefill kernel walks over the keys of each chunk of a prompt, as plain arrays.

Keys are visited in logical order, in one launch where all pages are resident. Otherwise the walk is cut into segments,
one for each load that brings pages of it; the state is carried from one to the next, so the cuts change no bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distkv.workers.attention.step_loads import Member, StepLoads


@dataclass(frozen=True)
class PrefillPlan:
    """The chunks of a step; the first launch is of those that are wholly resident."""

    table: np.ndarray  # where each page of each sequence lies, see `StepLoads`
    # [C, 8], a row for each segment: first row of the step, tokens, position of the first token, first entry of the
    # table, first key and end of the keys of the segment, first row of the saved state, index in `filled` of the page
    # that holds the tokens, or -1
    chunks: np.ndarray
    blocks: np.ndarray  # [N, 2]: (row of `chunks`, first query row of the block), by launch
    num_blocks: list[int]  # of the wholly resident chunks, then of each load
    loads: list[int]  # the numbers of those that bring pages of the chunks, see `StepLoads`
    num_saved: int  # tokens whose state is carried between launches
    filled: np.ndarray  # with a codec: slots of the pages that the chunks fill


def plan_prefill(
    members: list[Member], first: int, brought: StepLoads, page_size: int, group_size: int, block_rows: int,
    has_codec: bool = False,
) -> PrefillPlan:  # fmt: skip
    """Plans the attention of chunks of prompts.

    Args:
        first: index of the first of them among the sequences of `brought`, of which they are the last.
        group_size: query heads per KV head.
        block_rows: query rows `(token, head of the group)` of one program.
        has_codec: chunks are cut at the borders of pages too, since rows meet their own page otherwise than the others.
    """
    chunks: list[tuple[int, ...]] = []
    blocks: dict[int, list[np.ndarray]] = {}  # by load, -1 for none
    num_saved = num_filled = 0
    filled: list[np.ndarray] = []
    start_entry = brought.first_entry[first]
    for number, (first_row, step) in enumerate(members, first):
        count = len(step.token_ids)
        end_key, entry = step.start + count, int(brought.first_entry[number] - start_entry)
        pieces = [(step.start, end_key, -1)]
        if has_codec:
            pieces = list(_pieces(step.start, end_key, page_size, num_filled))
            filled.append(step.pages[step.start // page_size : end_key // page_size])
            num_filled += len(filled[-1])
        segments = list(_segments(brought, number))
        for first_page, end_page, load in segments:
            for start, end, own in pieces:
                keys = first_page * page_size, min(end_page * page_size, end)
                if keys[0] < keys[1]:
                    rows = np.arange(0, (end - start) * group_size, block_rows)
                    blocks.setdefault(load, []).append(np.stack([np.full(len(rows), len(chunks)), rows], 1))
                    at = start - step.start
                    chunks.append((first_row + at, end - start, start, entry, *keys, num_saved + at, own))
        if len(segments) > 1:
            num_saved += count
    launches = [np.concatenate(blocks.get(load, [_NO_BLOCKS])) for load in sorted({-1, *blocks})]
    return PrefillPlan(
        brought.table[start_entry:], np.array(chunks, dtype=np.int64), np.concatenate(launches),
        [len(one) for one in launches], sorted(blocks.keys() - {-1}), num_saved,
        np.concatenate([np.zeros(0, dtype=np.int64), *filled]),
    )  # fmt: skip


_NO_BLOCKS = np.zeros((0, 2), dtype=np.int64)


def _pieces(start: int, end: int, page_size: int, num_filled: int) -> Iterator[tuple[int, int, int]]:
    """Of new tokens `start .. end` those of each page: position of the first, end, and index among the pages that the
    step fills, of which `num_filled` come before; -1 where the page stays open."""
    for page in range(start // page_size, -(-end // page_size)):
        border = (page + 1) * page_size
        own = num_filled + page - start // page_size if border <= end else -1
        yield max(start, page * page_size), min(border, end), own


def _segments(brought: StepLoads, number: int) -> Iterator[tuple[int, int, int]]:
    """`(first page, end, load)` of each segment of a sequence's walk; the load is -1 where all is resident."""
    num_pages, first_cell = int(brought.num_pages[number]), brought.first_cell[number]
    loads = brought.load_of_cell[first_cell : first_cell + -(-num_pages // brought.cell_pages)]
    cold = np.flatnonzero(loads >= 0)
    if not len(cold):
        yield 0, num_pages, -1
        return
    changes = cold[np.flatnonzero(np.diff(loads[cold], prepend=-1))]  # the first cell of each load
    begins = [0, *(changes[1:] * brought.cell_pages).tolist()]
    yield from zip(begins, [*begins[1:], num_pages], loads[changes].tolist(), strict=True)
