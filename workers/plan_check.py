"""Whether a plan that came over the network is one that a rank can run.

The ranks' kernels go where plans send them, so a number that is out of range would be read or written outside of the
pools, or take memory without end. Whoever knows the group's key is trusted (`private_socket.py`); this is for what is
mangled, or of another version.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distkv.storage.tier import DEVICE, Tier, Transfer, decode_location
from distkv.workers.errors import DistKVError
from distkv.workers.group.step_plan import SequencePlan, StepPlan
from distkv.workers.sizes import PoolSizes


@dataclass(frozen=True)
class PlanCheck:
    """What numbers of a plan must be less than."""

    sizes: PoolSizes
    vocab_size: int
    page_size: int
    max_num_seqs: int

    def check(self, plan: StepPlan) -> None:
        """Raises DistKVError for a plan that cannot be run, before anything of it is."""
        try:
            self._check(plan)
        except _OutOfRange as error:
            raise DistKVError(f"a step plan of the leader's cannot be run: {error}") from None

    def _check(self, plan: StepPlan) -> None:
        slots = self.sizes.device, self.sizes.host, self.sizes.disk
        num_pages = 2 * sum(slots)  # lost ones have an id too
        _below("a device slot", [slot for pair in plan.copies for slot in pair], slots[DEVICE])
        _below("a device slot", plan.clear, slots[DEVICE])
        _below("a device slot", [slot for slot, _ in plan.synthetic_pages], slots[DEVICE])
        _below("a seed", [seed for _, seed in plan.synthetic_pages], 2**63)
        _below("a page", [page for page, _ in plan.relocated], num_pages)
        _below("a page", [page for page, _ in plan.host_pages], num_pages)
        _below("a slot of HOST", [slot + 1 for _, slot in plan.host_pages], slots[Tier.HOST] + 1)
        _below("a page", plan.new_pages, num_pages)
        for _, location in plan.relocated:
            tier, slot = decode_location(location)
            _below(f"a slot of {tier.name}", [slot], slots[tier])
        _below("a slot of DISK", [*(plan.adopt or ()), *plan.added], slots[Tier.DISK])
        _below("the number of sampled tokens", [plan.num_sampled], self.max_num_seqs + 1)
        for transfer in plan.transfers:
            self._check_transfer(transfer, slots)
        self._check_sequences(plan.sequences, num_pages, plan.num_sampled)

    def _check_transfer(self, transfer: Transfer, slots: tuple[int, int, int]) -> None:
        if abs(transfer.source - transfer.target) != 1:
            raise _OutOfRange(f"no page goes from {transfer.source.name} to {transfer.target.name}")
        _below(f"a slot of {transfer.source.name}", [transfer.source_slot], slots[transfer.source])
        _below(f"a slot of {transfer.target.name}", [transfer.target_slot], slots[transfer.target])

    def _check_sequences(self, sequences: list[SequencePlan], num_pages: int, num_sampled: int) -> None:
        """All numbers of a kind at once: followers do this in each step, before they begin with it."""
        tokens = [token for one in sequences for token in one.token_ids]
        if not all(one.token_ids for one in sequences) or min(tokens, default=0) < -num_sampled:
            raise _OutOfRange("a sequence has no token, or one that nobody has sampled")
        num_positions = num_pages * self.page_size
        _below("a token", [max([0, *tokens])], self.vocab_size)  # the others stand for sampled ones
        _below("a token", [token for one in sequences for token in one.scored], self.vocab_size)
        _below("a position", [one.start for one in sequences], num_positions)
        _below("a position", [one.start + len(one.token_ids) - 1 for one in sequences], num_positions)
        _below("the length of a prompt", [one.prompt_len for one in sequences], num_positions + 1)
        _below("the number of logits", [one.num_logits for one in sequences], len(tokens) + 1)
        spare = [len(one.token_ids) - one.num_logits - len(one.scored) for one in sequences]
        if min(spare, default=0) < 0:
            raise _OutOfRange("a sequence wants more logits than it has tokens")
        _below("the number of likeliest tokens", [one.num_top for one in sequences], self.vocab_size + 1)
        _below("a place in a page table", [one.first_page for one in sequences], num_pages + 1)
        _below("a place in a page table", [one.first_page + len(one.pages) for one in sequences], num_pages + 1)
        _below("a page", [page for one in sequences for page in one.pages], num_pages)


class _OutOfRange(Exception):
    pass


def _below(what: str, numbers: Sequence[int], limit: int) -> None:
    """Raises _OutOfRange unless all are between 0 and the limit, without it."""
    for extreme in (min(numbers), max(numbers)) if numbers else ():
        if not 0 <= extreme < limit:
            raise _OutOfRange(f"{what} is {extreme}, of {limit}")
