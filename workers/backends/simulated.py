"""Steps on a CPU that stands for a device behind a link: what a slow link does, where there is no GPU.

It is honest of one thing alone: how long pages take to cross, beside which the device computes. That takes the time
that the native kernels of this CPU take, on the same cores as all else.
"""

from distkv.kernels.native.build import BuildError
from distkv.kernels.native.library import Library, load_best
from distkv.storage.device import SimulatedDevice
from distkv.storage.moving.link import Link
from distkv.workers.attention.policies.policy import PagePolicy
from distkv.workers.backend import Backend, refused_policy
from distkv.workers.backends.cpu import NativeBackend
from distkv.workers.errors import ConfigError


class SimulatedBackend(NativeBackend):
    """A `Backend` by the native kernels, over a `SimulatedDevice`."""

    def __init__(self, library: Library, link: Link) -> None:
        super().__init__(library)
        self.device = SimulatedDevice(link)

    def use_policy(self, policy: PagePolicy, audit: int | None) -> None:
        raise refused_policy(policy, "a simulated device")


def make_backend(batch_invariant: bool | None, link: Link) -> Backend:
    """See `backend.make_backend`."""
    if batch_invariant is False:
        raise ConfigError("batch_invariant is False and a simulated device has the kernels of a CPU; leave it out")
    try:
        return SimulatedBackend(load_best(), link)
    except BuildError as error:
        raise ConfigError(
            f"device is simulated and the native CPU kernels cannot be used: {error}; mend that, or use device='cpu'"
        ) from error
