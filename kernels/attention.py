"""Exact attention over paged keys and values, as partial states of page-aligned splits and their merge.

The split of the KV axis is fixed by the page grid, a constant and where a step's chunk of a prompt begins, never by
where a page lies, and states are merged in logical page order in fp32. This is what makes answers independent of
residency.

Dims: T tokens, B sequences, R query rows of one KV head (tokens * group), P pages, K KV heads, G query heads per KV
head (group), S page_size, D head_dim.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

# Tokens of prefix that one prefill split covers; a multiple of every page_size up to itself.
PREFILL_SPLIT = 2048

# Query rows up to which the CPU kernel's bits can depend on being given a single (n, h).
LONE_ROWS = 32

State = tuple[Tensor, Tensor]
"""Partial softmax state `(out, lse)`: the normalised output over some keys and the log-sum-exp of their scores, so
that states of disjoint sets of keys merge exactly (Dao et al. 2022, https://arxiv.org/abs/2205.14135)."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> State:
    """Softmax attention of dense blocks: the one piece of arithmetic that every path below shares.

    Shapes: q `[N, H, R, D]`; k, v `[N, H, S, D]` (strides are free, so views of pages and stride-0 expansions cost no
    copy); mask, added to the scores, `[N, 1, R or 1, S]` in q's dtype. Scores are scaled by `D ** -0.5`. `causal` lets
    row i see keys 0..i and takes no mask. Each row must see at least one key.
    Returns out `[N, H, R, D]` in q's dtype and lse fp32 `[N, H, R]`.
    """
    if q.device.type == "cpu":
        return _attend_on_cpu(q, k, v, mask, causal)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        rows, keys = scores.shape[-2:]
        scores.masked_fill_(torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu_(1), -math.inf)
    if mask is not None:
        scores += mask
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp_(scores.sub_(lse[..., None])).to(v.dtype) @ v, lse


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> State:
    """The flash kernel behind torch's scaled_dot_product_attention; only this entry returns the log-sum-exp.

    Its bits for one (n, h) depend neither on the other n and h, nor on the threads, nor on a mask of zeros being given,
    with two exceptions that are kept away from it: rows that are no multiple of 4 may take another matrix product, and
    a single (n, h) is computed outside torch's threads, where the product brings its own.
    """
    count, heads, rows, _ = q.shape
    if padding := -rows % 4:
        q = pad(q, (0, 0, 0, padding))
    if mask is not None:
        one_for_all = mask.shape[2] == 1
        mask = mask.expand(-1, -1, rows + padding, -1) if one_for_all else pad(mask, (0, 0, 0, padding))
    if count * heads == 1 and rows <= LONE_ROWS:
        q, k, v = (x.expand(2, -1, -1, -1) for x in (q, k, v))
        mask = None if mask is None else mask.expand(2, -1, -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    return out[:count, :, :rows], lse[:count, :, :rows]


def merge_states(out: Tensor, lse: Tensor, dim: int) -> State:
    """Merges the partial states along `dim`, which lists them in logical page order; a state with lse -inf is empty.

    Shapes: out `[..., R, D]` with one more leading dim than the result, lse the same without D. Every row needs one
    state that is not empty.
    Returns fp32 out and lse without `dim`; their bits do not depend on how the states lie in memory.
    """
    lse = lse.float().movedim(dim, 0).contiguous()
    merged = torch.logsumexp(lse, dim=0)
    weight = torch.exp(lse - merged).unsqueeze(-1)
    return (out.movedim(dim, 0).float().contiguous() * weight).sum(0), merged


def merge_next(out: Tensor, lse: Tensor, next_out: Tensor, next_lse: Tensor) -> State:
    """Merges the state of later keys into an fp32 state, in place: for states too large to be held side by side.

    Shapes: out, next_out `[..., R, D]`; lse, next_lse `[..., R]`.
    """
    merged = torch.logaddexp(lse, next_lse)
    out.mul_(torch.exp(lse - merged)[..., None]).addcmul_(next_out, torch.exp(next_lse - merged)[..., None])
    return out, merged


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    runs: Sequence[tuple[int, int]],
    row_owner: Tensor | None,
    mask: Tensor,
    order: Tensor | None,
) -> State:
    """Attention of a few query tokens per sequence, one split a page.

    The pages of all sequences are visited in the order of the pool, in runs of neighbours, each run a view of the pool;
    `order` puts their states back into logical order.

    Shapes:
        q `[B, K, R, D]`: R = tokens per sequence * group, the same for all sequences
        k_pages, v_pages `[pages, K, S, D]`: all K and all V pages of one layer
        runs: `(first page, pages)` in visiting order; their lengths add up to P
        row_owner int64 `[P]`: the sequence whose queries meet the visited page; None when there is one sequence
        mask `[P, 1, R or 1, S]` in q's dtype: 0 where the row may see the key, else -inf; a row that sees no key of a
            page must be given some key of it, and its state is dropped by `order`
        order int64 `[B, max pages of a sequence, R]`: index into the visited `(page, row)` states, `P * R` for none;
            None when there is one page, or one sequence visited in logical order that needs no state dropped
    Returns the merged state: out `[B, K, R, D]` in q's dtype and lse fp32 `[B, K, R]`.
    """
    outs, lses = [], []
    first = 0
    for start, count in runs:
        span = slice(first, first + count)
        rows = q.expand(count, -1, -1, -1) if row_owner is None else q[row_owner[span]]
        out, lse = attend(rows, k_pages[start : start + count], v_pages[start : start + count], mask=mask[span])
        outs.append(out)
        lses.append(lse)
        first += count
    out, lse = (outs[0], lses[0]) if len(runs) == 1 else (torch.cat(outs), torch.cat(lses))
    if order is None:
        if first == 1:
            return out, lse
        merged, merged_lse = merge_states(out, lse, dim=0)
        return merged.to(q.dtype)[None], merged_lse[None]
    # [P, K, R, D] -> [P * R + 1, K, D], the last one empty
    _, heads, _, head_dim = out.shape
    out = torch.cat([out.transpose(1, 2).reshape(-1, heads, head_dim), out.new_zeros(1, heads, head_dim)])
    lse = torch.cat([lse.transpose(1, 2).reshape(-1, heads), lse.new_full((1, heads), -math.inf)])
    # heads before rows, as in the short way above, so that both give the same bits
    merged, merged_lse = merge_states(out[order].transpose(2, 3), lse[order].transpose(2, 3), dim=1)
    return merged.to(q.dtype), merged_lse


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, prefix_pages: Tensor, prefix_len: int
) -> State:
    """Causal attention of one sequence's chunk of a prompt over its prefix in pages and over itself.

    The splits are the prefix in pieces of PREFILL_SPLIT tokens from position 0, then the chunk.

    Shapes:
        q `[T, K, G, D]`, k, v `[T, K, D]`: the chunk, rotated, as stored in its pages; T >= 1
        k_pages, v_pages `[pages, K, S, D]`: all K and all V pages of one layer
        prefix_pages int64 `[ceil(prefix_len / S)]`: the pages of the tokens before the chunk, in logical order
    Returns the merged state: out `[T, K, G, D]` in q's dtype and lse fp32 `[T, K, G]`.
    """
    rows = q.permute(1, 2, 0, 3)  # [K, G, T, D]: KV heads as batch, so that a stride of 0 shares K and V over the group
    group, page_size = rows.shape[1], k_pages.shape[2]

    def share(block: Tensor) -> Tensor:  # [K, S, D] -> [K, G, S, D]
        return block[:, None].expand(-1, group, -1, -1)

    states = []
    per_split = max(1, PREFILL_SPLIT // page_size)
    for first in range(0, len(prefix_pages), per_split):
        split = prefix_pages[first : first + per_split]
        keys = min(len(split) * page_size, prefix_len - first * page_size)
        k_split, v_split = _gather(k_pages, split)[:, :keys], _gather(v_pages, split)[:, :keys]
        states.append(attend(rows, share(k_split), share(v_split)))
    states.append(attend(rows, share(k.transpose(0, 1)), share(v.transpose(0, 1)), causal=True))
    out, lse = states[0]
    if len(states) > 1:
        out = out.float()
        for state in states[1:]:
            out, lse = merge_next(out, lse, *state)
    return out.to(q.dtype).permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def _gather(pages_PKSD: Tensor, index: Tensor) -> Tensor:
    """The chosen pages side by side: `[K, len(index) * S, D]`."""
    return pages_PKSD[index].transpose(0, 1).flatten(1, 2)
