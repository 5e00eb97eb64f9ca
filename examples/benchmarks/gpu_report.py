"""What the figures of a GPU come to: tables, and the aims met or missed."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from examples.benchmarks.contestants import OURS
from examples.benchmarks.gpu_cases import LIMITS
from examples.benchmarks.gpu_contestants import DTYPES, NNX, PALLAS, TF32, TORCH
from examples.benchmarks.problem import Size
from examples.benchmarks.records import Record

CELLS = 13  # width of a column


class Verdict(NamedTuple):
    """An aim; `met` is None where nothing was measured."""

    aim: str
    met: bool | None
    found: str

    def __str__(self) -> str:
        word = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"{word}: {self.aim} ({self.found})" if self.found else f"{word}: {self.aim}"


Times = dict[tuple[str, Size, str, str], float]  # section, size, contestant, dtype -> seconds


def times(records: Iterable[Record]) -> Times:
    """Returns the measured times; the library's kernels took for ever where they failed."""
    return {
        (r.section, Size(*r.size), r.contestant, r.dtype): r.value or math.inf
        for r in records
        if "us_per_step" in (r.details or {})
        or (r.error and r.contestant == PALLAS and r.section != "checks")
    }


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Holds the figures against the aims."""
    found = times(records)
    steps = {k: 1e6 * v / k[1].time for k, v in found.items()}
    own = [
        (f"{dtype} at {size}", steps["forward", size, PALLAS, dtype])
        for kind, size, name, dtype in found
        if (kind, name, size.batch, size.hidden) == ("forward", PALLAS, 16, 256)
    ]
    return [
        *(_at_least(found, 5.0, NNX, [NNX], dtype) for dtype in DTYPES),
        *(_at_least(found, 1.0, "cuDNN", [TORCH, TF32], dtype) for dtype in DTYPES),
        _worst("forward at most 1.5 µs per step at H = 256, B = 16", own, lambda v: v <= 1.5),
        *(_errors(records, dtype) for dtype in DTYPES),
        _repeatable(records),
        *_in_parallel(records, found),
        _unroll(found),
    ]


def _at_least(found: Times, aim: float, whom: str, names: list[str], dtype: str) -> Verdict:
    """The kernels' training step against the fastest of some contestants, H up to 256."""
    ratios = []
    for kind, size, name, d in found:
        others = [found.get((kind, size, other, d)) for other in names]
        others = [seconds for seconds in others if seconds]
        if (kind, name, d) == ("training", PALLAS, dtype) and size.hidden <= 256 and others:
            ratios.append((f"at {size}", min(others) / found[kind, size, name, d]))
    text = f"training step at least {aim:g} times as fast as {whom}'s in {dtype}, H ≤ 256"
    return _worst(text, ratios, lambda v: v >= aim, least=True)


def _worst(
    aim: str, found: list[tuple[str, float]], holds: Callable[[float], bool], least: bool = False
) -> Verdict:
    """Judges an aim by the worst of some figures."""
    if not found:
        return Verdict(aim, None, "")
    where, value = (min if least else max)(found, key=lambda pair: pair[1])
    good = sum(holds(v) for _, v in found)
    return Verdict(aim, good == len(found), f"worst {value:.3g} {where}; {good} of {len(found)}")


def _errors(records: Iterable[Record], dtype: str) -> Verdict:
    """The errors against float64; what was refused is counted beside."""
    checks = [r for r in records if r.section == "checks" and r.dtype == dtype]
    ran = [(f"{r.variant} at {Size(*r.size)}", _number(r.value)) for r in checks if r.details]
    lost = [r for r in checks if not r.details]
    refused = [r for r in lost if (r.error or "").startswith("ValueError")]
    limit = LIMITS[dtype]
    aim = f"relative error of outputs and gradients at most {limit:g} in {dtype}"
    aim += f", {len(refused)} refused" * bool(refused)
    verdict = _worst(aim, ran, lambda v: v <= limit)
    if len(lost) > len(refused):
        found = "; ".join(filter(None, (verdict.found, f"{len(lost) - len(refused)} failed")))
        return Verdict(aim, False, found)
    return verdict


def _number(value: float | None) -> float:
    """A value that compares; NaN is worse than all others."""
    return math.inf if value is None or math.isnan(value) else value


def _repeatable(records: Iterable[Record]) -> Verdict:
    """Whether all runs of all checks were bitwise equal."""
    unlike = [
        (f"{r.variant} at {Size(*r.size)} in {r.dtype}", r.details["runs unlike the first"])
        for r in records
        if r.section == "checks" and r.details
    ]
    return _worst("bitwise repeatable in poisoned memory", unlike, lambda v: v == 0)


def _in_parallel(records: Iterable[Record], found: Times) -> list[Verdict]:
    """The library in parallel over time against its fastest scan."""
    off = [
        (f"{r.contestant} at {Size(*r.size)}", _number(r.value))
        for r in records
        if r.section == "parallel agreement" and r.details is not None
    ]
    ratios = []
    for size in dict.fromkeys(k[1] for k in found if k[0] == "parallel forward"):
        own = {k[2]: v for k, v in found.items() if k[:2] == ("parallel forward", size)}
        ways = [v for name, v in own.items() if name.startswith("parallel")]
        scans = [v for name, v in own.items() if not name.startswith("parallel")]
        if size.time >= 10_000 and ways and scans:
            ratios.append((f"at {size}", min(scans) / min(ways)))
    return [
        _worst("parallel in time equal to the scan to 1e-6", off, lambda v: v <= 1e-6),
        _worst(
            "parallel in time, forward, at least 10 times the scan at n ≤ 16, T ≥ 10,000",
            ratios,
            lambda v: v >= 10,
            least=True,
        ),
    ]


def _unroll(found: Times) -> Verdict:
    """The library's own choice against the best number of steps per iteration."""
    ratios = []
    for kind, size, name, dtype in found:
        if kind.startswith("sweep ") and name == OURS:
            scans = [
                seconds
                for (k, s, n, d), seconds in found.items()
                if (k, s, d) == (kind, size, dtype) and n.startswith("scan") and "," not in n
            ]
            if scans:
                where = f"{kind.removeprefix('sweep ')} in {dtype} at {size}"
                ratios.append((where, found[kind, size, name, dtype] / min(scans)))
    return _worst("the default at most 1.1 times the best scan", ratios, lambda v: v <= 1.1)


def tables(records: Sequence[Record]) -> str:
    """Returns the µs per step of all contestants by size, and all that failed."""
    parts = []
    sections = dict.fromkeys(r.section for r in records if "us_per_step" in (r.details or {}))
    for section in sections:
        own = [r for r in records if r.section == section]
        rows = list(dict.fromkeys((r.contestant, r.dtype) for r in own))
        cells = {(Size(*r.size), r.contestant, r.dtype): r for r in own}
        parts.append(f"\n{section}: µs per step, by B,T,I,H\n")
        sizes = sorted({size for size, *_ in cells}, key=lambda s: (s.time, s.batch, s.hidden))
        for first in range(0, len(sizes), 6):
            some = sizes[first : first + 6]
            parts.append(" " * 30 + "".join(str(size).rjust(CELLS + 5) for size in some))
            for row in rows:
                line = "".join(_cell(cells.get((s, *row))).rjust(CELLS + 5) for s in some)
                if line.strip():
                    parts.append(f"{' '.join(row):<30}{line}")
    failed = [f"{r.section} {r.contestant} {r.dtype}: {r.error}" for r in records if r.error]
    counts = {line: failed.count(line) for line in failed}
    parts += ["\nfailed:\n"] * bool(failed)
    parts += [f"{line} ({number} times)" for line, number in counts.items()]
    return "\n".join(parts)


def _cell(record: Record | None) -> str:
    """Returns median and quartiles in µs per step."""
    if record is None:
        return ""
    if record.value is None or not record.quartiles:
        return "failed"
    scale = 1e6 / record.size[1]
    low, high = (scale * q for q in record.quartiles)
    return f"{scale * record.value:.2f} ±{(high - low) / 2:.2f}"


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns the verdicts for the JSON."""
    return [verdict._asdict() for verdict in verdicts(records)]
