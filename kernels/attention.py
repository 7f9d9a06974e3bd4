"""Exact attention over paged keys and values on a CPU, as partial states of page-aligned splits and their merge.

The split of the KV axis is fixed by the page grid, a constant and where a step's chunk of a prompt begins, never by
where a page lies, and states are merged in logical page order in fp32. This is what makes answers independent of
residency.

Dims: T tokens, B sequences, R query rows of one KV head (tokens * group), P pages, K KV heads, G query heads per KV
head (group), S page_size, D head_dim.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

# Query rows up to which the CPU kernel's bits can depend on being given a single (n, h).
LONE_ROWS = 32

Block = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""Some pages and who meets them, see `decode_attention`."""

State = tuple[Tensor, Tensor]
"""Partial softmax state `(out, lse)`: the normalised output over some keys and the log-sum-exp of their scores, so
that states of disjoint sets of keys merge exactly (Dao et al. 2022, https://arxiv.org/abs/2205.14135)."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> State:
    """Softmax attention of dense blocks: the one piece of arithmetic that every path below shares.

    Shapes: q `[N, H, R, D]`; k, v `[N, H, S, D]` (strides are free, so views of pages and stride-0 expansions cost no
    copy); mask, added to the scores, `[N, 1, R or 1, S]` in q's dtype. Scores are scaled by `D ** -0.5`. `causal` lets
    row i see keys 0..i and takes no mask. Each row must see at least one key.
    Returns out `[N, H, R, D]` in q's dtype and lse fp32 `[N, H, R]`.

    It is the flash kernel behind torch's scaled_dot_product_attention, of which only this entry returns the
    log-sum-exp. Its bits for one (n, h) depend neither on the other n and h, nor on the threads, nor on a mask of zeros
    being given, with two exceptions that are kept away from it: rows that are no multiple of 4 may take another matrix
    product, and a single (n, h) is computed outside torch's threads, where the product brings its own.
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


def decode_attention(q: Tensor, blocks: Iterable[Block], order: Tensor | None) -> State:
    """Attention of a few query tokens per sequence, one split a page.

    The pages of all sequences come in blocks, in any order, and from wherever they lie; `order` puts their states into
    logical order. A block is used up before the next one is asked for, so that its memory may serve again.

    Shapes:
        q `[B, K, R, D]`: R = tokens per sequence * group, the same for all sequences
        blocks: `(k, v, owner, mask)` of n pages each, P in all:
            k, v `[n, K, S, D]`
            owner int64 `[n]`: the sequence whose queries meet the page; None when there is one sequence
            mask `[n, 1, R or 1, S]` in q's dtype: 0 where the row may see the key, else -inf; a row that sees no key of
                a page must be given some key of it, and its state is dropped by `order`
        order int64 `[B, max pages of a sequence, R]`: index into the `(page, row)` states in the order of their coming,
            `P * R` for none; None when there is one page, or one sequence whose pages come in logical order and none of
            whose states is dropped
    Returns the merged state: out `[B, K, R, D]` in q's dtype and lse fp32 `[B, K, R]`.
    """
    outs, lses = [], []
    for k, v, owner, mask in blocks:
        rows = q.expand(len(k), -1, -1, -1) if owner is None else q[owner]
        out, lse = attend(rows, k, v, mask=mask)
        outs.append(out)
        lses.append(lse)
    out, lse = (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))
    if order is None:
        if len(out) == 1:
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


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, prefix: Iterable[tuple[Tensor, Tensor]]) -> State:
    """Causal attention of one sequence's chunk of a prompt over its prefix and over itself.

    The splits are the pieces of the prefix, then the chunk.

    Shapes:
        q `[T, K, G, D]`, k, v `[T, K, D]`: the chunk, rotated, as stored in its pages; T >= 1
        prefix: k and v `[K, keys, D]` of each piece in logical order; one is used up before the next is asked for
    Returns the merged state: out `[T, K, G, D]` in q's dtype and lse fp32 `[T, K, G]`.
    """
    rows = q.permute(1, 2, 0, 3)  # [K, G, T, D]: KV heads as batch, so that a stride of 0 shares K and V over the group
    group = rows.shape[1]

    def share(block: Tensor) -> Tensor:  # [K, S, D] -> [K, G, S, D]
        return block[:, None].expand(-1, group, -1, -1)

    merged: State | None = None
    for k_piece, v_piece in prefix:
        state = attend(rows, share(k_piece), share(v_piece))
        merged = (state[0].float(), state[1]) if merged is None else merge_next(*merged, *state)
    state = attend(rows, share(k.transpose(0, 1)), share(v.transpose(0, 1)), causal=True)
    out, lse = state if merged is None else merge_next(*merged, *state)
    return out.to(q.dtype).permute(2, 0, 1, 3), lse.permute(2, 0, 1)
