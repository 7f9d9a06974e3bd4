"""What a step takes, by the number of drafted tokens in it."""

from collections.abc import Iterable

MEMORY = 0.9  # what a step counts when the next one has ended
BEFOREHAND = 4.0  # squared tokens: how firmly the prior holds while drafts have not varied
OUTLIER = 4.0  # times the mean that a step counts for at most
PRIOR = 0.1  # of a step without drafts: what a drafted token adds to it


class StepCost:
    """Seconds of steps of single tokens, as a line over the drafted tokens in them: least squares over the last steps,
    whose slope begins as a share of their height."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._sums = [0.0] * 4  # of drafted, seconds, drafted**2, drafted * seconds

    def note(self, num_drafted: int, seconds: float) -> float:
        """A step has ended. Returns the seconds that it counts for, not many times those of the steps before: a process
        that was held up for a while says nothing of steps."""
        if self._weight:
            seconds = min(seconds, OUTLIER * self._sums[1] / self._weight)
        self._weight = self._weight * MEMORY + 1
        new = num_drafted, seconds, num_drafted**2, num_drafted * seconds
        self._sums = [total * MEMORY + one for total, one in zip(self._sums, new, strict=True)]
        return seconds

    @property
    def is_known(self) -> bool:
        """Whether any step was seen."""
        return self._weight > 0

    def line(self) -> tuple[float, float]:
        """Seconds of a step without drafts, and of a drafted token more; before any step was seen, a step counts as one
        second."""
        if not self._weight:
            return 1.0, PRIOR
        drafted, seconds, squares, products = (total / self._weight for total in self._sums)
        spread = (squares - drafted**2) * self._weight
        slope = (products - drafted * seconds) * self._weight + BEFOREHAND * PRIOR * seconds
        slope = max(0.0, slope / (spread + BEFOREHAND))
        base = max(seconds - slope * drafted, seconds / 10)
        return base, slope


def draft_lengths(
    chances: list[list[float]], num_sequences: int, step: tuple[float, float], drafting: tuple[float, float], most: int
) -> list[int]:
    """How many tokens of each draft to check, so that a step brings the most tokens a second. It adds the likeliest one
    as long as what that brings, for what it takes, is above what the step brings as a whole (goodput: Liu et al. 2024,
    https://arxiv.org/abs/2406.14066).

    Args:
        chances: for each draft, for each of its tokens the chance that it comes with all before it; none rises.
        num_sequences: that are in the step, with a token each, whether there is a draft for them or not.
        step: see `StepCost.line`.
        drafting: see `Drafts.cost`.
        most: tokens of all drafts together.
    """
    seconds, slope = step[0] + drafting[0], step[1] + drafting[1]
    tokens = float(num_sequences)
    lengths = [0] * len(chances)
    line = sorted(((one, index) for index, own in enumerate(chances) for one in own), reverse=True)
    for chance, index in line[:most]:
        if chance * seconds <= slope * tokens:
            break
        tokens, seconds = tokens + chance, seconds + slope
        lengths[index] += 1
    return lengths if tokens * step[0] > num_sequences * seconds else [0] * len(chances)


def drafted_lengths(
    chances: list[list[float]], num_sequences: int, step: tuple[float, float], drafting: tuple[float, float], most: int
) -> list[int]:
    """The same where each place of the drafts takes a step of its own beforehand, for all that have it. Place after
    place is added, for those sequences with which it brings the most tokens a second, as long as that is more than
    without it.

    Args:
        drafting: what a step takes that drafts, as `step`; it runs what was drafted before once more.
    """
    seconds, slope = step
    tokens = float(num_sequences)
    lengths = [0] * len(chances)
    for place in range(max(map(len, chances), default=0)):
        able = [index for index, own in enumerate(chances) if lengths[index] == place < len(own)]
        able = sorted(able, key=lambda index: -chances[index][place])[:most]
        best, num_chosen = (tokens, seconds), 0
        after = tokens, seconds + drafting[0]
        for number, index in enumerate(able, 1):
            after = after[0] + chances[index][place], after[1] + slope + place * drafting[1]
            if after[0] * best[1] > best[0] * after[1]:
                best, num_chosen = after, number
        if not num_chosen:
            break
        (tokens, seconds), most = best, most - num_chosen
        for index in able[:num_chosen]:
            lengths[index] += 1
    return lengths


def shared_out(wanted: Iterable[int], most: int) -> list[int]:
    """How many tokens of each draft there is room for: the first gets what it wants of `most`, and so on."""
    lengths = []
    for length in wanted:
        lengths.append(min(length, most))
        most -= lengths[-1]
    return lengths
