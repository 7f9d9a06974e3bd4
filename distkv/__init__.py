"""distkv: LLaMA inference whose KV cache may be larger than the memory of the GPUs it runs on.

The names below are loaded on first use, so that importing a part (`distkv.kernels`, say) costs only that part.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for type checkers
    from distkv.async_llm import AsyncLLM as AsyncLLM
    from distkv.client.async_client import AsyncClient as AsyncClient
    from distkv.client.client import Client as Client
    from distkv.config import EngineConfig as EngineConfig
    from distkv.errors import CapacityError as CapacityError
    from distkv.errors import ConfigError as ConfigError
    from distkv.errors import DistKVError as DistKVError
    from distkv.errors import Draining as Draining
    from distkv.errors import EngineUnavailable as EngineUnavailable
    from distkv.errors import QueueFull as QueueFull
    from distkv.errors import RequestError as RequestError
    from distkv.errors import StoreError as StoreError
    from distkv.errors import WorkerDied as WorkerDied
    from distkv.llm import LLM as LLM
    from distkv.outputs import CompletionOutput as CompletionOutput
    from distkv.outputs import Logprob as Logprob
    from distkv.outputs import RequestOutput as RequestOutput
    from distkv.sampling_params import RequestOutputKind as RequestOutputKind
    from distkv.sampling_params import SamplingParams as SamplingParams
    from distkv.signals import exit_on_sigterm as exit_on_sigterm
    from distkv.structured_outputs.params import StructuredOutputsParams as StructuredOutputsParams

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "Client": "client.client",
    "AsyncClient": "client.async_client",
    "EngineConfig": "config",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "structured_outputs.params",
    "RequestOutputKind": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "DistKVError": "errors",
    "ConfigError": "errors",
    "RequestError": "errors",
    "CapacityError": "errors",
    "QueueFull": "errors",
    "StoreError": "errors",
    "WorkerDied": "errors",
    "Draining": "errors",
    "EngineUnavailable": "errors",
    "exit_on_sigterm": "signals",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distkv' has no attribute {name!r}")
    return getattr(import_module(f"distkv.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
