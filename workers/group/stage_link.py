"""From stage to stage of the pipeline, point to point."""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor


class StageLink:
    """From a rank to its like in the next stage, and to it from the one before. The first stage follows the last one.

    Tensors arrive in the order in which they were sent. NCCL carries those on CUDA, and gloo all others.
    """

    def __init__(
        self, before: int, after: int, backend: str, receives_by: dist.ProcessGroup | None = None,
        sends_by: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        """
        Args:
            before, after: ranks, among all.
            backend: "nccl" or "gloo".
            receives_by, sends_by: torch's groups of all ranks. NCCL carries what two ranks of a group send each other
                one after the other, whichever way it goes: with two stages each would wait for the other if they sent
                by one.
        """
        self._before, self._after, self._backend = before, after, backend
        self._receives_by, self._sends_by = receives_by, sends_by
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()  # what must not be freed yet
        self.num_received = 0

    def send(self, x: Tensor) -> None:
        """Sends x, which nobody changes any more, and does not wait for it to be received."""
        if not x.numel():
            return
        own = (x.cpu() if self._backend == "gloo" else x).contiguous()
        work = dist.isend(own, self._after, self._sends_by)
        assert work is not None
        self._sending.append((work, own))

    def try_out(self, device: torch.device, is_first: bool) -> None:
        """Sends a number from stage to stage, once around; all ranks do. NCCL takes memory for each pair of ranks when
        it first carries something between them, which the ranks are to have taken before they share out what is left.

        Args:
            is_first: whether this is the first stage.
        """
        one = torch.zeros(1, device=device)
        if is_first:
            self.send(one)
        one = self.receive((1,), one.dtype, device)
        if not is_first:
            self.send(one)

    def settle(self) -> None:
        """Frees what was sent in earlier steps. All ranks have ended these, so it has been received, or on CUDA is to
        be soon."""
        if self._backend == "gloo":  # where nothing is completed unless it has been waited for
            for work, _ in self._sending:
                work.wait()
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What the stage before has sent next, which is of this shape and dtype. Raises RuntimeError when a rank is
        gone."""
        x = torch.empty(shape, dtype=dtype, device="cpu" if self._backend == "gloo" else device)
        if x.numel():
            dist.recv(x, self._before, self._receives_by)
        self.num_received += 1
        return x.to(device)
