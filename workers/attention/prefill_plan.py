"""How the prefill kernel walks over the keys of each chunk of a prompt, as plain arrays.

Keys are visited in logical order, in one launch where all pages are resident. Otherwise the walk is cut into segments
of which each needs no more cold pages than a buffer of the staging ring holds; the state is carried from one to the
next, so the cuts change no bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distkv.kernels.page_entries import buffer_entry
from distkv.storage.moving.staging_ring import Load
from distkv.storage.paging import pages_for
from distkv.workers.attention.decode_plan import Member


@dataclass(frozen=True)
class PrefillPlan:
    """The chunks of a step; the first launch is of those that are wholly resident."""

    table: np.ndarray  # where each page of each sequence lies: a device slot, or the `buffer_entry` of its load
    # [C, 8], a row for each segment: first row of the step, tokens, position of the first token, first entry of the
    # table, first key and end of the keys of the segment, first row of the saved state, index in `filled` of the page
    # that holds the tokens, or -1
    chunks: np.ndarray
    blocks: np.ndarray  # [N, 2]: (row of `chunks`, first query row of the block), by launch
    num_blocks: list[int]  # of each launch
    loads: list[Load | None]  # of each launch; None when all its pages are resident
    num_saved: int  # tokens whose state is carried between launches
    filled: np.ndarray  # with a codec: slots of the pages that the chunks fill


def plan_prefill(
    members: list[Member], page_size: int, group_size: int, buffer_pages: int, segment_tokens: int, block_rows: int,
    has_codec: bool = False,
) -> PrefillPlan:  # fmt: skip
    """Plans the attention of chunks of prompts.

    Args:
        group_size: query heads per KV head.
        segment_tokens: segments end at multiples of so many keys, or of a page where that is larger.
        block_rows: query rows `(token, head of the group)` of one program.
        has_codec: chunks are cut at the borders of pages too, since rows meet their own page otherwise than the others.
    """
    chunks: list[tuple[int, ...]] = []
    blocks: list[np.ndarray] = []
    resident: list[np.ndarray] = []
    loads: list[Load | None] = []
    tables, num_entries, num_saved = [], 0, 0
    filled: list[np.ndarray] = []
    num_filled = 0
    unit = max(1, segment_tokens // page_size)
    for first_row, step in members:
        count = len(step.token_ids)
        end_key = step.start + count
        table = step.pages[: pages_for(end_key, page_size)].copy()
        pieces = [(step.start, end_key, -1)]
        if has_codec:
            pieces = list(_pieces(step.start, end_key, page_size, num_filled))
            filled.append(table[step.start // page_size : end_key // page_size])
            num_filled += len(filled[-1])
        segments = list(_segments(table, unit, buffer_pages))
        for first_page, end_page, load in segments:
            mine = []
            for start, end, own in pieces:
                keys = first_page * page_size, min(end_page * page_size, end)
                if keys[0] < keys[1]:
                    rows = np.arange(0, (end - start) * group_size, block_rows)
                    mine.append(np.stack([np.full(len(rows), len(chunks)), rows], 1))
                    at = start - step.start
                    chunks.append((first_row + at, end - start, start, num_entries, *keys, at, own))
            if len(segments) == 1 and load is None:
                resident += mine
            else:
                blocks.append(np.concatenate(mine))
                loads.append(load)
        if len(segments) > 1:
            num_saved = max(num_saved, count)
        tables.append(table)
        num_entries += len(table)
    if resident:
        blocks.insert(0, np.concatenate(resident))
        loads.insert(0, None)
    return PrefillPlan(
        np.concatenate(tables), np.array(chunks, dtype=np.int64), np.concatenate(blocks),
        [len(one) for one in blocks], loads, num_saved, np.concatenate([np.zeros(0, dtype=np.int64), *filled]),
    )  # fmt: skip


def _pieces(start: int, end: int, page_size: int, num_filled: int) -> Iterator[tuple[int, int, int]]:
    """Of new tokens `start .. end` those of each page: position of the first, end, and index among the pages that the
    step fills, of which `num_filled` come before; -1 where the page stays open."""
    for page in range(start // page_size, -(-end // page_size)):
        border = (page + 1) * page_size
        own = num_filled + page - start // page_size if border <= end else -1
        yield max(start, page * page_size), min(end, border), own


def _segments(table: np.ndarray, unit: int, buffer_pages: int) -> Iterator[tuple[int, int, Load | None]]:
    """`(first page, end, load)` of each segment; puts the entries of the buffer into the table."""
    cold = np.flatnonzero(table < 0)
    first = done = 0  # page, index into cold
    while done < len(cold):
        # pages before `end` hold no more cold ones than a buffer, and `end` lies on the grid
        most = done + buffer_pages
        end = len(table) if most >= len(cold) else int(cold[most]) // unit * unit
        here = cold[done : np.searchsorted(cold, end)]
        order = np.argsort(-table[here], kind="stable")  # by tier and slot
        load = table[here[order]].tolist()
        table[here[order]] = buffer_entry(np.arange(len(here)))
        yield first, end, load
        first, done = end, done + len(here)
    if first < len(table):
        yield first, len(table), None
