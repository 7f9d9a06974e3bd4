"""What of a GPU's memory is spoken for before there are KV pages, found by trial."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from distkv.storage.device import Device
from distkv.storage.page_spec import PageSpec
from distkv.workers.errors import CapacityError
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.cuda_runner import CudaRunner
from distkv.workers.runners.step_graphs import graph_splits
from distkv.workers.sampling.trial_sampling import sample_in_all_ways
from distkv.workers.sizes import PoolSizes

MakeRunner = Callable[[KVPools, int], CudaRunner]
"""Makes the runner that is tried, over pools and for so many sequences."""


@dataclass(frozen=True)
class MemoryInUse:
    """Bytes of a GPU that KV pages cannot have."""

    budget: list[tuple[str, int]]
    graph_bytes_per_page: int  # that a page of the device pool adds to the memory of the graphs


def find_memory_in_use(
    model: LlamaModel,
    make_runner: MakeRunner,
    spec: PageSpec,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    device: Device,
) -> MemoryInUse:
    """Runs the largest prompt step and samples from the most logits, over a pool of just that size, and captures the
    graphs. All ranks of a group at a time.

    Raises CapacityError when not even that fits.
    """
    # libraries keep their handles and workspace for a thread; what this one leaves goes to the thread of the steps
    with ThreadPoolExecutor(1) as thread:
        trial = thread.submit(_try_out, model, make_runner, spec, max_num_seqs, max_num_batched_tokens, device)
        try:
            return trial.result()
        except (torch.OutOfMemoryError, CapacityError):
            free, total = torch.cuda.mem_get_info(device.torch_device)
            raise CapacityError(
                f"a step of max_num_batched_tokens {max_num_batched_tokens} does not fit beside the weights: "
                f"{free} of {total} bytes are free; lower max_num_batched_tokens or max_num_seqs, or use more ranks"
            ) from None


@torch.inference_mode()
def _try_out(
    model: LlamaModel,
    make_runner: MakeRunner,
    spec: PageSpec,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    on: Device,
) -> MemoryInUse:
    device = on.torch_device
    torch.cuda.set_device(device)
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_reserved(device)
    pool = PoolSizes(device=spec.pages_for(max_num_batched_tokens))
    with closing(KVPools(spec, pool, on)) as pools:
        runner = make_runner(pools, max_num_seqs)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        _largest_step(model, runner, max_num_seqs, max_num_batched_tokens, pool.device)
        torch.cuda.synchronize(device)
        workspace = torch.cuda.max_memory_reserved(device) - before
        torch.cuda.empty_cache()
        without = torch.cuda.mem_get_info(device)[0]
        for _ in runner.warm_up():
            pass
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        graphs = max(0, without - torch.cuda.mem_get_info(device)[0])
    shape = runner.shape
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    budget = [
        ("in use elsewhere, and by CUDA itself", total - free - torch.cuda.memory_reserved(device)),
        ("weights", weights),
        (
            "workspace of the largest step",
            workspace + shape.streaming_bytes(max_num_batched_tokens) + shape.exact_bytes(max_num_seqs),
        ),
        ("graphs", graphs),
    ]
    probe = 2**10  # pages
    return MemoryInUse(budget, graph_splits(probe, 0, shape) * (shape.state_bytes + 32) // probe)


def _largest_step(model: LlamaModel, runner: CudaRunner, max_num_seqs: int, tokens: int, pages: int) -> None:
    step = SequenceStep([0] * tokens, 0, np.arange(pages), tokens, 1)
    hidden = runner.run([step], None, model.blank_input(tokens))
    if model.ends is None:
        return
    logits = model.logits(hidden[-1:].repeat(max_num_seqs, 1))
    if logits is not None:  # on rank 0
        sample_in_all_ways(logits)
