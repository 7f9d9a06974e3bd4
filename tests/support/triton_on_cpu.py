"""A kind of machine of the tests: the kernels for CUDA, in Triton's interpreter, on the memory of a CPU."""

from dataclasses import replace

from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.cuda.cuda_kernels import BATCH_INVARIANT_KERNELS, CUDA_KERNELS
from distkv.kernels.linear import packed_linear
from distkv.kernels.native.library import Library
from distkv.kernels.token_kernels import gated
from distkv.storage.page_spec import PageSpec
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.backend import Backend
from distkv.workers.backends.cpu import CpuBackend
from distkv.workers.backends.cuda import host_library
from distkv.workers.bandwidth import host_attention_rate
from distkv.workers.kinds import KINDS
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.runners.cuda_runner import CudaRunner, cuda_codec

KIND = replace(KINDS["cpu"], module=__name__, has_link=True, has_bits_of_host=False)


class TritonOnCpu(CpuBackend):
    """A `Backend`."""

    captures = False  # there are no graphs here but those that a test stands in for

    def __init__(self, batch_invariant: bool) -> None:
        super().__init__()
        products = {"make_linear": packed_linear, "make_gated_linear": gated(packed_linear, swiglu)}
        self.kernels = BATCH_INVARIANT_KERNELS if batch_invariant else replace(CUDA_KERNELS, **products)
        self._batch_invariant = batch_invariant
        self._library: Library | None = None
        self._context: ContextGroup | None = None

    def use_context_group(self, context: ContextGroup) -> None:
        self._context = context

    def make_runner(self, model: LlamaModel, pools: KVPools, max_num_seqs: int) -> CudaRunner:
        return CudaRunner(
            model, pools, max_num_seqs, 1, self.captures, self._batch_invariant, self._library, self._context
        )

    def share_attention(self) -> None:
        self._library = host_library(self._batch_invariant)

    def host_attention_rate(self, model: LlamaModel, pools: KVPools) -> float:
        assert self._library is not None
        return host_attention_rate(self._library, pools, model.shard.num_query_heads)

    def make_codec(self, spec: PageSpec) -> CudaCodec | None:
        return cuda_codec(spec)


def make_backend(batch_invariant: bool | None) -> Backend:
    return TritonOnCpu(bool(batch_invariant))
