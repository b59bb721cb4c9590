"""Chooses the parts of a model to keep plain, so that a floor of tokens/s is held with as few bytes as possible."""

from collections.abc import Mapping
from statistics import median

# After a miss, the speed aimed at is the floor times this.
SPARE = 1.1
# Number of tokens since the last change whose median gives the speed.
LOOKS = 3


class PlainWeightBudget:
    """The parts that are kept plain.

    Args:
        sizes: Bytes of each part when it is plain.
        tokens_per_s: The floor; 0 keeps nothing plain.
    """

    def __init__(self, sizes: Mapping[str, int], tokens_per_s: float = 0) -> None:
        self._sizes = dict(sizes)
        self._most_s = 1 / tokens_per_s if tokens_per_s else float("inf")
        self._costs: dict[str, float] = {}
        self._took: list[float] = []
        self.kept: set[str] = set()

    @property
    def settled(self) -> bool:
        """Whether enough tokens in a row kept up with the floor."""
        return len(self._took) == LOOKS and median(self._took) <= self._most_s

    @property
    def exhausted(self) -> bool:
        """Whether tokens were too slow with every part plain."""
        return self.kept == set(self._sizes) and len(self._took) == LOOKS and not self.settled

    @property
    def tokens_per_s(self) -> float | None:
        """The speed of the last tokens; None if there were too few since the last change."""
        return 1 / median(self._took) if len(self._took) == LOOKS else None

    def spent(self, part: str, seconds: float) -> None:
        """Record the time it took to prepare a part that was not plain."""
        self._costs[part] = seconds

    def adapt(self, seconds: float) -> None:
        """Record the time of a token, and keep more parts plain if it is too long."""
        self._took = [*self._took, seconds][-LOOKS:]
        if len(self._took) < LOOKS:
            return
        took = median(self._took)
        if took <= self._most_s:
            return
        for part in sorted(self._costs, key=lambda part: self._sizes[part] / self._costs[part]):
            if took > self._most_s / SPARE and part not in self.kept:
                self.kept.add(part)
                took -= self._costs[part]
                self._took = []
