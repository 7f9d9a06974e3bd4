"""A rank's part of a step where the layers are split over stages."""

from functools import partial

import torch
from torch import Tensor

from distkv.storage.meter import Meter, now
from distkv.workers.group.stage_link import StageLink
from distkv.workers.micro_batches import StepCosts, cut_step
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.runner import Runner


class StagePipeline:
    """Runs the micro-batches of a step one after the other, each when the stage before has sent it, and sends it on at
    once. What the last stage has comes back to the first."""

    def __init__(
        self, runner: Runner, model: LlamaModel, link: StageLink, page_size: int, dtype: torch.dtype,
        device: torch.device, meter: Meter,
    ):  # fmt: skip
        """
        Args:
            dtype: of hidden states.
            meter: is told how long this stage waited for others.
        """
        self._runner, self._link, self._page_size, self._meter = runner, link, page_size, meter
        self._shard, self._hidden_size = model.shard, model.config.hidden_size
        self._costs = StepCosts.of(model.config)
        self._dtype, self._device = dtype, device

    def run(self, steps: list[SequenceStep], sampled: Tensor | None) -> Tensor:
        """On the first stage, the hidden states `[rows, E]` whose logits are wanted; nothing on others.

        Args:
            sampled: see `Runner`; on the first stage.
        """
        begun = now()
        self._link.settle()
        batches = cut_step(steps, self._costs, self._shard.layout.pipeline_parallel_size, self._page_size)
        if not self._shard.stage and not self._shard.rank:
            self._meter.count("pipeline_steps", 1)
            self._meter.count("micro_batches", len(batches))
        for batch in batches:
            start, rows = now(), sum(len(step.token_ids) for step in batch)
            hidden = self._runner.run(batch, sampled, partial(self._receive, rows) if self._shard.stage else None)
            self._meter.trace("micro_batch", start, tokens=rows)
            self._link.send(hidden)
        wanted = [self._receive(sum(step.num_logits for step in batch)) for batch in batches if not self._shard.stage]
        self._meter.add("stage_step", begun)
        return torch.cat(wanted) if wanted else hidden[:0]

    def _receive(self, rows: int) -> Tensor:
        start = now()
        x = self._link.receive((rows, self._hidden_size), self._dtype, self._device)
        self._meter.add("stage_wait", start)
        return x
