"""Attention of a step in which some tokens choose their pages by a policy."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from support.attention_steps import Sequences, place
from support.pages import store
from support.prompts import seeded
from torch import Tensor

from distkv.kernels.native.library import load_best
from distkv.storage.device import CpuDevice
from distkv.storage.meter import Meter
from distkv.storage.moving.slices_on_demand import SlicesOnDemand
from distkv.storage.moving.staging_ring import StagingRing
from distkv.storage.page_spec import PageSpec
from distkv.storage.paging import NUM_BUFFERS
from distkv.storage.pools.host_pool import HostPool
from distkv.storage.tier import Tier, encode_location
from distkv.workers.attention.policies.policy import PagePolicy
from distkv.workers.attention.policy_attention import Tools, plan_policy_attention


def on_demand(spec: PageSpec, host: HostPool, buffer_pages: int) -> SlicesOnDemand:
    return SlicesOnDemand(StagingRing(spec, NUM_BUFFERS * buffer_pages, host, None, None, CpuDevice()), [])


def attend(
    policy: PagePolicy, sequences: Sequences, num_prompt: list[int], cold: float = 0, buffer_pages: int = 1,
    cuts: Sequence[int] = (),
) -> tuple[Tensor, Any, dict[str, float]]:  # fmt: skip
    """Attention of a step whose sequences have prompts of so many tokens, and what was counted; a share of their full
    pages is cold. With `cuts` there is one sequence, whose tokens are cut there into several steps."""
    s = sequences
    step = place(s, torch.randperm(s.num_pages, generator=seeded(s.seed)).tolist())
    spec = PageSpec(1, s.kv_heads, s.page_size, s.head_dim, str(s.dtype).removeprefix("torch."))
    host, pool = HostPool(spec, s.num_pages, pinned=False), step.pool.clone()
    parts = []
    is_cold = np.random.default_rng(s.seed).random(s.num_pages + 2) < cold
    for one, (start, _), length in zip(step.steps, s.lengths, num_prompt, strict=True):
        pages = one.pages.copy()
        for index, slot in enumerate(one.pages.tolist()):
            if is_cold[slot] and index < start // s.page_size:
                store(host, slot, step.pool[:, slot].contiguous()[None])
                pages[index] = encode_location(Tier.HOST, slot)
        parts.append(replace(one, pages=pages, prompt_len=length, page_ids=one.pages))
    for one, part in zip(step.steps, parts, strict=True):
        pool[:, one.pages[part.pages < 0]] = 6e4
    meter = Meter()
    tools = Tools(load_best(), policy, None, s.page_size, s.kv_heads, 1, meter, audit=1)
    out, kv = [], step.new_kv(pool)
    for first, end in pairwise([0, *cuts, len(step.q)]):
        steps = [
            replace(one, token_ids=one.token_ids[first:end], start=one.start + first) if cuts else one for one in parts
        ]
        attention = plan_policy_attention(tools, steps, buffer_pages)
        assert not attention.loads
        out.append(attention.attend(step.q[first:end], *kv, pool, on_demand(spec, host, buffer_pages)))
    return torch.cat(out), step, meter.take().counts
