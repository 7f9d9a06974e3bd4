"""A kind of machine of the tests: the kernels for CUDA, in Triton's interpreter, on the memory of a CPU."""

from dataclasses import replace

from distkv.kernels.cuda.activation import swiglu
from distkv.kernels.cuda.codec_pages import CudaCodec
from distkv.kernels.cuda.cuda_kernels import BATCH_INVARIANT_KERNELS, CUDA_KERNELS
from distkv.kernels.linear import packed_linear
from distkv.kernels.token_kernels import gated
from distkv.storage.page_spec import PageSpec
from distkv.workers.backend import Backend
from distkv.workers.backends.cpu import CpuBackend
from distkv.workers.kinds import KINDS
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.runners.cuda_runner import CudaRunner, cuda_codec

KIND = replace(KINDS["cpu"], module=__name__)


class TritonOnCpu(CpuBackend):
    """A `Backend`."""

    captures = False  # there are no graphs here but those that a test stands in for

    def __init__(self, batch_invariant: bool) -> None:
        super().__init__()
        products = {"make_linear": packed_linear, "make_gated_linear": gated(packed_linear, swiglu)}
        self.kernels = BATCH_INVARIANT_KERNELS if batch_invariant else replace(CUDA_KERNELS, **products)
        self._batch_invariant = batch_invariant

    def make_runner(self, model: LlamaModel, pools: KVPools, max_num_seqs: int) -> CudaRunner:
        return CudaRunner(model, pools, max_num_seqs, 1, self.captures, self._batch_invariant)

    def make_codec(self, spec: PageSpec) -> CudaCodec | None:
        return cuda_codec(spec)


def make_backend(batch_invariant: bool | None) -> Backend:
    return TritonOnCpu(bool(batch_invariant))
