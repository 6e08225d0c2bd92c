"""Sides measured in turns, and what their ratio says.

Other load on the machine catches one side and not the other, so one round proves nothing: a ratio comes from at least
three, in which the sides alternate, and is given with its lowest and highest value.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

ROUNDS = 3  # at least
UNSEEN = "no difference seen"
Better = Literal["above 1", "below 1", "at 1", "neither"]
Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Ratio:
    """Of two sides in the same rounds: the median of the rounds' ratios, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, above: Iterable[float], below: Iterable[float]) -> "Ratio":
        """`above` / `below`, round by round; ValueError if one has fewer rounds, or there are fewer than three."""
        each = [a / b for a, b in zip(above, below, strict=True)]
        if len(each) < ROUNDS:
            raise ValueError(f"{len(each)} rounds, a ratio needs {ROUNDS}")
        return cls(statistics.median(each), min(each), max(each))

    @property
    def spread(self) -> str:
        """The lowest and the highest."""
        return f"{self.lowest:.2f} – {self.highest:.2f}"

    def verdict(self, better: Better) -> str:
        """The median, unless the rounds do not agree which side is better."""
        undecided = better in ("above 1", "below 1") and self.lowest <= 1 <= self.highest
        return UNSEEN if undecided else f"{self.median:.2f}x"


def in_turns(
    sides: dict[str, Callable[..., Figures]], rounds: Iterable, warm_up: bool = False
) -> dict[str, list[Figures]]:
    """What every side gave in every round; the sides take turns in going first.

    Args:
        sides: by name, called with the item of the round.
        rounds: one item a round, such as a prompt.
        warm_up: the first round is not kept.
    """
    found = {side: [] for side in sides}
    for number, item in enumerate(rounds):
        for side in list(sides) if number % 2 == 0 else reversed(sides):
            figures = sides[side](item)
            found[side] += [] if warm_up and number == 0 else [figures]
    return found


def load_note(average: float, cores: int) -> str:
    """What a table says of a machine that was busy before anything was measured; nothing if it was not."""
    return f"loaded at start: {average:.1f} processes on {cores} cores" if average > cores else ""
