"""One measured number, and its ratios to the library's and to plain autodiff's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.benchmarks.contestants import OURS, PLAIN
from examples.benchmarks.measure import Timing


@dataclass
class Record:
    """One number of one contestant in one section; without a value it failed with an error."""

    section: str
    size: tuple[int, ...]  # B, T, I, H
    contestant: str
    mode: str
    value: float | None = None  # seconds, bytes, or the relative error
    variant: str = ""  # what else tells it apart
    quartiles: tuple[float, float] | None = None
    rounds: tuple[float, ...] = ()
    floor_fraction: float | None = None  # floor of the product rate / time
    ratio: float | None = None  # value / that of gru_jax in the same mode
    ratio_to_plain: float | None = None  # value / that of plain autodiff in the same mode
    error: str | None = None
    dtype: str = "float32"
    details: dict[str, Any] | None = None

    @property
    def case(self) -> tuple:
        """Returns what two records share whose values can be compared."""
        return self.section, tuple(self.size), self.variant, self.mode, self.dtype


def outcome(result: Timing | Exception, **fields: Any) -> Record:
    """Returns the record of a timing, or of the exception in its place."""
    if isinstance(result, Exception):
        return failure(result, **fields)
    return Record(value=result.median, quartiles=result.quartiles, rounds=result.rounds, **fields)


def failure(exception: Exception, **fields: Any) -> Record:
    """Returns the record of a contestant that failed."""
    text = f"{type(exception).__name__}: {exception}".split("\n")[0]
    return Record(error=text[:300], **fields)


def fill_ratios(records: Sequence[Record], ours: str = OURS) -> None:
    """Fills in the ratios, where a record has one to be compared with."""
    values = {(r.contestant, r.case): r.value for r in records}
    for record in records:
        record.ratio = _ratio(record.value, values.get((ours, record.case)))
        record.ratio_to_plain = _ratio(record.value, values.get((PLAIN, record.case)))


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other
