"""Decode attention is compiled for each number of new tokens. One is what nearly every step has, and compiled at start;
the others are in threads, while the engine runs already."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from distkv.storage.device import device_of
from distkv.storage.pools.device_pool import DevicePool
from distkv.storage.process_limits import usable_cores
from distkv.workers.attention.cuda import CudaAttention, CudaShape, plan_cuda_attention
from distkv.workers.page_directory import SequenceStep
from distkv.workers.runners.host_copies import send

THREADS_NAME = "kv-compile"
COMPILE_THREADS = 4  # at most; the greater part of a compilation leaves the interpreter to others


class CompileAhead:
    """Calls `compile` with each count, in threads."""

    def __init__(self, compile: Callable[[int], None], counts: Iterable[int]):
        self._compile = compile
        threads = ThreadPoolExecutor(min(COMPILE_THREADS, usable_cores()), THREADS_NAME)
        self._tasks: dict[int, Future[None]] = {count: threads.submit(self._run, count) for count in counts}
        threads.shutdown(wait=False)  # they end when all is done

    def claim(self, count: int) -> None:
        """To be called before what `count` stands for is launched. Waits for a thread that is at it, and calls it off
        where none has begun, or the same would be compiled twice. What has failed shows in the launch."""
        task = self._tasks.pop(count, None)
        if task is not None and not task.cancel():
            wait([task])

    def _run(self, count: int) -> None:
        if threading.main_thread().is_alive():  # else the process ends, and would wait
            self._compile(count)


def join_compilers() -> None:
    """Waits until nothing is compiled in this process any more, for who measures what comes then."""
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS_NAME):
            thread.join()


def compile_decode(shape: CudaShape, pool: DevicePool, stream: torch.cuda.Stream, count: int) -> None:
    """Has the kernels of decode compiled for `count` new tokens, beside what else runs on a CUDA device."""
    layer_pool = pool.layer(0)
    if layer_pool.shape[1]:  # else it was closed meanwhile
        with torch.cuda.device(layer_pool.device), torch.cuda.stream(stream):
            launch_decode(shape, layer_pool, count)


@torch.inference_mode()
def launch_decode(shape: CudaShape, layer_pool: Tensor, count: int) -> None:
    """Launches decode of `count` tokens as a step would. It reads the first page, whatever that holds by now, and
    nobody sees what comes of it; a page of its own would be memory that the pool could have."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    q = layer_pool.new_zeros(count, heads, shape.head_dim)[:, : shape.num_heads]
    plan = plan_cuda_attention([SequenceStep([0] * count, 0, np.arange(1), count, 1)], shape)
    CudaAttention(plan, shape, send(plan.arrays, device_of(layer_pool.device))).attend(q, q, q, layer_pool, None)
