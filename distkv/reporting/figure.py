"""A figure that was measured more than once."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """The median of what was measured, and its least and greatest value; all of them have the unit of the values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        """Of one value at least; raises ValueError for none."""
        taken = list(values)
        return cls(statistics.median(taken), min(taken), max(taken))

    def scaled(self, factor: float) -> "Figure":
        """In another unit: each value times `factor`, which is above 0."""
        return Figure(self.median * factor, self.low * factor, self.high * factor)

    def rate(self, count: float) -> "Figure":
        """`count` per value: of seconds, how many a second. The longest time is the lowest rate. Of an even number of
        values, this median is the rate of the median time."""
        return Figure(count / self.median, count / self.high, count / self.low)

    def show(self, form: str) -> str:
        """ "2.31 (2.28-2.40)", each by the form of `format`; the median alone where nothing else was measured."""
        median, low, high = (format(value, form) for value in (self.median, self.low, self.high))
        return median if self.low == self.high else f"{median} ({low}-{high})"

    def to_json(self) -> dict[str, float]:
        """What a file of figures has for it."""
        return {"median": self.median, "min": self.low, "max": self.high}
