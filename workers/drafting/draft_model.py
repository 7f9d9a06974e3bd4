"""A small model that drafts for a large one. It runs on rank 0 alone, with a KV cache of its own on the device."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from distkv.storage.dtypes import torch_dtype
from distkv.storage.paging import pages_for
from distkv.workers.backend import Backend
from distkv.workers.drafting.draft_contexts import DraftContexts
from distkv.workers.drafting.draft_request import DraftRequest
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.layout import Layout
from distkv.workers.model.llama import load_llama
from distkv.workers.model.shard import Shard
from distkv.workers.model.weights import CheckedSource, weight_source
from distkv.workers.page_directory import SequenceStep
from distkv.workers.rank_config import RankConfig, model_page_spec
from distkv.workers.sampling.sample_row import SampleRow
from distkv.workers.sampling.sampled_token import NO_TOKEN
from distkv.workers.sampling.sampler import sample
from distkv.workers.sizes import PoolSizes


class DraftModel:
    """Reads what it has not read yet of each answer that it drafts for, and goes on by itself."""

    def __init__(self, config: RankConfig, backend: Backend, check: Callable[[], None] = lambda: None):
        """Loads the model of `RankConfig.draft` and allocates its cache.

        Args:
            check: see `Rank`.

        Raises ConfigError when the checkpoint cannot be used, CapacityError when the cache cannot be had.
        """
        assert config.draft is not None
        draft, self._device = config.draft, backend.device
        group, device = ProcessGroup(), backend.device.torch_device
        dtype = torch_dtype(config.dtype)
        source = weight_source(draft.folder, config.load_format, config.seed, dtype, device, warns=True)
        with source as weights, torch.inference_mode():
            shard = Shard.of(draft.model, Layout(), 0)
            self._model = load_llama(
                CheckedSource(weights, check), draft.model, shard, group, dtype, device, backend.kernels
            )
            weights.check_all_read()
        spec = model_page_spec(draft.model, config.page_size, config.dtype)
        self._page_size, self._most_tokens = config.page_size, config.max_num_batched_tokens
        self._pools = KVPools(spec, PoolSizes(device=draft.num_pages), backend.device)
        self._runner = backend.make_runner(self._model, self._pools, config.max_num_seqs)
        self._contexts = DraftContexts(draft.num_pages, config.page_size)

    @torch.inference_mode()
    def draft(self, requests: list[DraftRequest]) -> list[list[int]]:
        """A draft for each request, of as many tokens as it has rows; none where there is no room for its context, or
        where that has still to be read: no more than `max_num_batched_tokens` are in a call."""
        budget = self._most_tokens
        numbers = {one.number for one in requests}
        found: list[list[int]] = [[] for _ in requests]
        steps: list[SequenceStep] = []
        drafting: list[int] = []  # indexes of requests
        for index, one in enumerate(requests):
            context = self._contexts.of(one.number)
            start = context.agree(one.token_ids)
            new = self._contexts.grow(one.number, len(one.token_ids) + len(one.rows), numbers)
            if new is not None:
                self._pools.device.clear(new)
            if new is None or not budget:
                continue
            count = min(budget, len(one.token_ids) - start)
            budget -= count
            is_last = start + count == len(one.token_ids)
            steps.append(self._step(one, start, one.token_ids[start : start + count], int(is_last and bool(one.rows))))
            context.token_ids += one.token_ids[start : start + count]
            context.num_certain = len(context.token_ids)
            if is_last and one.rows:
                drafting.append(index)
        place = 0
        while steps:
            hidden = self._runner.run(steps, None)
            steps = []
            tokens = self._sample(hidden, [requests[index].rows[place] for index in drafting])
            for index, token in zip(drafting, tokens, strict=True):
                if token != NO_TOKEN:
                    found[index].append(token)
            place += 1
            drafting = [i for i in drafting if len(found[i]) == place < len(requests[i].rows)]
            for index in drafting:
                one, context = requests[index], self._contexts.of(requests[index].number)
                steps.append(self._step(one, len(context.token_ids), found[index][-1:], 1))
                context.token_ids.append(found[index][-1])
        return found

    def forget(self, numbers: list[int]) -> None:
        """Lets go of sequences that have ended."""
        self._contexts.forget(numbers)

    def close(self) -> None:
        """Gives back the memory of the cache."""
        self._pools.close()

    def _step(self, one: DraftRequest, start: int, token_ids: list[int], num_logits: int) -> SequenceStep:
        slots = self._contexts.of(one.number).slots[: pages_for(start + len(token_ids), self._page_size)]
        return SequenceStep(token_ids, start, np.array(slots, dtype=np.int64), one.prompt_len, num_logits)

    def _sample(self, hidden: Tensor, rows: list[SampleRow]) -> list[int]:
        if not rows:
            return []
        logits = self._model.logits(hidden)
        assert logits is not None
        numbered = [replace(row, logits_row=number) for number, row in enumerate(rows)]
        return [token for token, _ in sample(logits, numbered).result()]
