"""Drafts of tokens, some of which are the ones that come."""

from simulation.model import PlainModel
from simulation.world import World

from distkv.engine.protocol import EngineInfo
from distkv.engine.sequence import Sequence


class SimulatedDrafts:
    """In the place of the drafts of some method: they know what comes, and say something else now and then."""

    is_free, cost = True, (0.0, 0.0)

    def __init__(self, world: World, model: PlainModel, info: EngineInfo):
        self.world, self.model, self.info = world, model, info

    def chances(self, sequence: Sequence, most: int) -> list[float]:
        return [0.8**place for place in range(1, 1 + most)] if sequence.number % 3 else []  # some have none

    def draft(self, wanted: list[tuple[Sequence, int]]) -> None:
        for sequence, most in wanted:
            sequence.draft = self._guessed(sequence, self.world.rng.randint(0, most))

    def checked(self, sequence: Sequence, num_drafted: int, num_right: int) -> None:
        assert 0 <= num_right <= num_drafted
        self.world.count("drafts")
        self.world.count("drafted tokens that were right", num_right)

    def _guessed(self, sequence: Sequence, count: int) -> list[int]:
        request, answer = sequence.request, list(sequence.output_token_ids)
        known, vocab_size = len(answer), self.info.vocab_size
        for _ in range(count):
            logits = self.model.row_logits(request, answer)[-1]
            right = self.model.next_token(request, sequence.index, logits, answer, vocab_size, self.info.eos_token_ids)
            answer.append(self.world.rng.randrange(vocab_size) if self.world.chance(0.2) else right)
        return answer[known:]
