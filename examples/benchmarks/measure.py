"""Times calls so that neighbours disturb each other equally: shuffled rounds and their medians."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

VISIT_SECONDS = 0.03  # how long the timed calls of one visit last at least
VISIT_CALLS = 3
Key = TypeVar("Key", bound=Hashable)


class Timing(NamedTuple):
    """Seconds per call: the median of each round, and what they come to."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Returns the median over the rounds."""
        return float(np.median(self.rounds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Returns the first and the third quartile over the rounds."""
        low, high = np.quantile(self.rounds, (0.25, 0.75))
        return float(low), float(high)

    def per(self, number: int) -> "Timing":
        """Returns the seconds of each of `number` equal parts of the call."""
        return Timing(tuple(seconds / number for seconds in self.rounds))


def visit(call: Callable[[], object]) -> float:
    """Calls once untimed, then until enough time has passed; returns the median of one call."""
    call()
    seconds = []
    while len(seconds) < VISIT_CALLS or sum(seconds) < VISIT_SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def shuffled(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    rng: np.random.Generator,
    visit: Callable[[Callable[[], object]], float] = visit,
) -> tuple[dict[Key, Timing], dict[Key, Exception]]:
    """Visits every call once per round, in a new order each time.

    The threads of some libraries keep spinning for a while after a call, and whatever comes next
    pays for it: a fixed order would let the same contestant pay in every round.

    Args:
      calls: what to time; each call returns only when its result is ready.
      rounds: how many times every call is visited.
      rng: shuffles.
      visit: times a call.

    Returns:
      The timings, and the exceptions of those that failed on the way.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    failed: dict[Key, Exception] = {}
    keys = list(calls)
    for _ in range(rounds):
        for i in rng.permutation(len(keys)):
            key = keys[i]
            if key in failed:
                continue
            try:
                seconds[key].append(visit(calls[key]))
            except Exception as exception:
                failed[key] = exception
    timings = {key: Timing(tuple(s)) for key, s in seconds.items() if key not in failed}
    return timings, failed
