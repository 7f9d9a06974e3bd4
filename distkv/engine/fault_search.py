"""The search for the sequence that makes steps raise."""

from distkv.engine.sequence import Sequence


class FaultSearch:
    """Those of a step that raised are run one by one, before all others, until each has run well or is found out."""

    def __init__(self) -> None:
        self._suspects: list[Sequence] = []

    @property
    def is_on(self) -> bool:
        """Whether a suspect has still to be tried; the next step depends on how that ends."""
        return bool(self._suspects)

    def next(self) -> Sequence | None:
        """The suspect to be run alone in the next step, if there is one."""
        self._suspects = [sequence for sequence in self._suspects if not sequence.finished]
        return self._suspects[0] if self._suspects else None

    def forget(self, sequence: Sequence) -> None:
        """Passes over a sequence that does not run any more."""
        self._suspects = [one for one in self._suspects if one is not sequence]

    def clear(self, sequences: list[Sequence]) -> None:
        """Takes note of sequences whose step went well. One that reads again what the step which raised had of it, and
        what came before, has still to come to that."""
        if self._suspects and sequences[0] is self._suspects[0] and not sequences[0].is_reading_again:
            del self._suspects[0]

    def narrow(self, sequences: list[Sequence]) -> Sequence | None:
        """Takes note of a step that raised. Returns the sequence at fault when it is known: the only one of the step
        that has not ended."""
        alive = [sequence for sequence in sequences if not sequence.finished]
        others = [sequence for sequence in self._suspects if sequence not in alive]
        if len(alive) == 1:
            self._suspects = others
            return alive[0]
        self._suspects = alive + others
        return None
