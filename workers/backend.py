"""What a kind of machine is, told in one place. It is chosen once, when a rank starts, and everybody else is given what
was chosen.

Three things describe it, each by what needs it:

- `Kind` (`kinds.py`): what is known of it by name alone, where there is no such machine: for sizing pools and placing
  ranks.
- `Device` (`storage/device.py`): where tensors lie, how pages and small arrays cross, what a thread has to do.
- `Backend`: by which kernels a rank runs its steps on a device, and how much of its memory is left for pages.

Other kernels for a device that is here already are a `Backend` of their own, which the module of a `Kind` returns.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

from distkv.kernels.token_kernels import TokenKernels
from distkv.storage.device import Device
from distkv.storage.moving.link import Link
from distkv.storage.page_spec import PageSpec
from distkv.storage.pools.page_pool import PageCodec
from distkv.workers.attention.context_attention import ContextGroup
from distkv.workers.attention.policies.policy import PagePolicy, name_of
from distkv.workers.errors import ConfigError
from distkv.workers.kinds import KINDS
from distkv.workers.kv_pools import KVPools
from distkv.workers.model.llama import LlamaModel
from distkv.workers.runners.runner import Runner


@dataclass(frozen=True)
class Demand:
    """What a rank asks room for."""

    spec: PageSpec
    max_num_seqs: int
    max_num_batched_tokens: int
    staging_bytes: int  # of the staging ring
    gpu_memory_utilization: float  # see `RankConfig`
    host_bytes: int  # that a pool in host memory may grow to


@dataclass(frozen=True)
class Room:
    """Memory of the device that is left for KV pages."""

    num_bytes: int  # below 0 where there is too little even without pages
    page_bytes: int  # of a page, with what it adds to other memory
    cure: str  # what to do where that is too little
    budget: list[tuple[str, int]] = field(default_factory=list)  # what takes how many bytes, where that was found out


class Backend(Protocol):
    """What runs the steps of a rank."""

    device: Device
    kernels: TokenKernels
    keeps_bits: bool  # whether a page that is computed again has the bits of the first time

    def make_runner(self, model: LlamaModel, pools: KVPools, max_num_seqs: int) -> Runner:
        """What runs steps over the pools."""
        ...

    def use_policy(self, policy: PagePolicy, audit: int | None) -> None:
        """Has steps run by a policy of attention, and one of every `audit` of them measure what it covers, if that is
        given. Raises ConfigError where there are no kernels for it."""

    def use_context_group(self, context: ContextGroup) -> None:
        """Has steps share out pages with the other ranks of a context group. Raises ConfigError where there are no
        kernels for it."""

    def share_attention(self) -> None:
        """Has runners that are made from now on leave to the host what plans say. Raises ConfigError where that cannot
        be. A CPU has nothing to do: it is its own host."""

    def host_attention_rate(self, model: LlamaModel, pools: KVPools) -> float:
        """Bytes per second at which the host attends to pages, measured; 0 where it has none to attend to."""
        ...

    def room(self, model: LlamaModel, demand: Demand) -> Room:
        """Looks, or finds out by trial, how much memory is left beside the model. All ranks of a group at a time.
        Raises CapacityError when a step does not fit."""
        ...

    def make_codec(self, spec: PageSpec) -> PageCodec | None:
        """What encodes and decodes pages that have a codec. Raises ConfigError where there is none for it."""
        ...

    def tune(self, pools: KVPools) -> None:
        """Chooses what depends on how fast this machine is, in pools that hold nothing yet."""


def make_backend(
    kind: str,
    batch_invariant: bool | None = None,
    policy: PagePolicy | None = None,
    audit: int | None = None,
    link_bytes_per_second: int | None = None,
) -> Backend:
    """The backend of this process, for a key of `KINDS`.

    Args:
        batch_invariant: as in `EngineConfig`.
        policy: of attention, None for all pages.
        audit: see `Backend.use_policy`.
        link_bytes_per_second: of a kind that is simulated, and of no other.

    Raises ConfigError where the backend cannot do as these say.
    """
    link = () if link_bytes_per_second is None else (Link(link_bytes_per_second),)
    backend: Backend = import_module(KINDS[kind].module).make_backend(batch_invariant, *link)
    if policy is not None:
        backend.use_policy(policy, audit)
    return backend


def refused_policy(policy: PagePolicy, kernels: str) -> ConfigError:
    """The error of kernels that attend to all pages alone."""
    return ConfigError(
        f"attention_policy is {name_of(policy)}, which the native kernels of a CPU alone can follow, and this rank has "
        f"{kernels}; use full"
    )


def refused_context_group(kernels: str) -> ConfigError:
    """The error of kernels that attend to pages of one rank alone."""
    return ConfigError(
        "decode_context_parallel_size is more than 1, which native kernels of a CPU and those of CUDA can do, and this "
        f"rank has {kernels}; leave it out"
    )
