"""distkv: LLaMA inference whose KV cache may be larger than the memory of the GPUs it runs on.

The names below are loaded on first use, so that importing a part (`distkv.kernels`, say) costs only that part.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distkv.config import EngineConfig
    from distkv.errors import CapacityError, ConfigError, DistKVError, RequestError, StoreError, WorkerDied
    from distkv.llm import LLM
    from distkv.outputs import CompletionOutput, Logprob, RequestOutput
    from distkv.sampling_params import SamplingParams

_HOME = {
    "LLM": "llm",
    "EngineConfig": "config",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "DistKVError": "errors",
    "ConfigError": "errors",
    "RequestError": "errors",
    "CapacityError": "errors",
    "StoreError": "errors",
    "WorkerDied": "errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distkv' has no attribute {name!r}")
    return getattr(import_module(f"distkv.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
