"""Drafts of tokens, some of which are the ones that come."""

from simulation.model import PlainModel
from simulation.world import World

from distkv.engine.protocol import EngineInfo
from distkv.engine.sequence import Sequence


class SimulatedDrafter:
    """In the place of a drafter: it knows what comes, and says something else now and then."""

    def __init__(self, world: World, model: PlainModel, info: EngineInfo, sequence: Sequence):
        self.world, self.model, self.info, self.sequence = world, model, info, sequence

    def chances(self, most: int) -> list[float]:
        return [0.8**place for place in range(1, 1 + most)] if self.sequence.number % 3 else []  # some have none

    def draft(self, most: int) -> list[int]:
        request, answer = self.sequence.request, list(self.sequence.output_token_ids)
        known = len(answer)
        for _ in range(most):
            if self.world.chance(0.2):
                answer.append(self.world.rng.randrange(self.info.vocab_size))
                continue
            logits = self.model.row_logits(request, answer)[-1]
            answer.append(
                self.model.next_token(
                    request, self.sequence.index, logits, answer, self.info.vocab_size, self.info.eos_token_ids
                )
            )
        self.world.count("drafts")
        return answer[known:]
