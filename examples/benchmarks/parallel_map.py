"""Where evaluation in parallel over time pays: time of `gru_parallel` against the time loop.

    python -m examples.benchmarks.parallel_map                 # on the CPU: some minutes
    python -m examples.benchmarks.parallel_map --device gpu
    python -m examples.benchmarks.parallel_map --quick         # two small sizes: under a minute

For every number of hidden units n, of steps T and of sequences B: the time of the loop over that of
Newton's method, with full and with diagonal Jacobians, forward and for the gradients of all
learnables and inputs. Above 1 the parallel one is faster. The network is drawn as PyTorch draws it,
so that it forgets; a chaotic one costs the loop and the steps that were tried in vain. The results
are written as JSON, one record per line.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gru_jax
from examples.benchmarks import jax_grus, problem, report
from examples.benchmarks.measure import shuffled
from examples.benchmarks.problem import RECURRENT_BIAS, Size
from examples.benchmarks.runners import configure

UNITS, STEPS, BATCHES = (1, 4, 16), (100, 1000, 10_000, 100_000), (1, 16)
MOST = 16 * 16 * 100_000  # numbers in the matrices of a size: above, it is left out
QUICK = (Size(1, 50, 2, 2), Size(2, 100, 4, 4))
RESULTS = Path(__file__).parent / "results"
JACOBIANS = ("full", "diagonal")
Function = Callable[..., Any]


@dataclasses.dataclass
class Record:
    """One size, one way to differentiate or not, one way to solve."""

    n: int
    T: int
    B: int
    section: str  # "forward" or "gradient"
    jacobian: str
    loop: float  # seconds
    parallel: float  # seconds
    ratio: float  # loop / parallel: above 1 it pays
    iterations: int  # of the slowest sequence
    converged: float  # part of the sequences
    deviation: float  # the largest, of the states
    temporaries: int  # bytes


def sizes() -> list[Size]:
    """Returns the map, the small sizes first."""
    grid = (Size(B, T, n, n) for T in STEPS for B in BATCHES for n in UNITS)
    return [size for size in grid if size.batch * size.time * size.hidden**2 <= MOST]


def forward(how: str, params: Any, x: jax.Array) -> jax.Array:
    """Returns the states, by "loop" or with a Jacobian."""
    if how == "loop":
        return gru_jax.gru(params, x, implementation="scan")[0]
    return gru_jax.gru_parallel(params, x, jacobian=how)[0]


def gradient(how: str, params: Any, x: jax.Array) -> tuple:
    """Returns the gradients of the sum of squares."""
    loss = lambda params, x: jnp.sum(forward(how, params, x) ** 2)  # noqa: E731
    return jax.grad(loss, (0, 1))(params, x)


def at(size: Size, rounds: int, rng: np.random.Generator) -> Iterator[Record]:
    """Yields the records of a size."""
    task = problem.draw(size, RECURRENT_BIAS, 0)
    params, x = jax_grus.ours(task.weights).params, jnp.asarray(task.x)
    right = forward("loop", params, x)
    for section, function in (("forward", forward), ("gradient", gradient)):
        compiled = {
            how: jax.jit(partial(function, how)).lower(params, x).compile()
            for how in ("loop", *JACOBIANS)
        }
        calls = {how: partial(_ready, run, params, x) for how, run in compiled.items()}
        timings, failed = shuffled(calls, rounds, rng)
        if failed:
            raise next(iter(failed.values()))
        for jacobian in JACOBIANS:
            y, _, info = gru_jax.gru_parallel(params, x, jacobian=jacobian)
            loop, parallel = timings["loop"].median, timings[jacobian].median
            yield Record(
                size.hidden, size.time, size.batch, section, jacobian,
                loop, parallel, loop / parallel,
                int(info.iterations.max()), float(info.converged.mean()),
                float(jnp.abs(y - right).max()),
                getattr(compiled[jacobian].memory_analysis(), "temp_size_in_bytes", 0),
            )  # fmt: skip


def _ready(run: Function, *arguments: Any) -> None:
    jax.block_until_ready(run(*arguments))


def table(records: Sequence[Record]) -> str:
    """Returns the ratios: n down, T and B across."""
    lines = []
    for section, jacobian in dict.fromkeys((r.section, r.jacobian) for r in records):
        part = [r for r in records if (r.section, r.jacobian) == (section, jacobian)]
        columns = list(dict.fromkeys((r.T, r.B) for r in part))
        lines += ["", f"{section}, {jacobian} Jacobians: time of the loop / time in parallel", ""]
        lines += ["     n" + "".join(f"{f'{T}×{B}':>12}" for T, B in columns)]
        for n in dict.fromkeys(r.n for r in part):
            ratios = {(r.T, r.B): f"{r.ratio:.3f}" for r in part if r.n == n}
            lines.append(f"{n:6}" + "".join(f"{ratios.get(c, ''):>12}" for c in columns))
    return "\n".join([*lines, "", "columns: steps × sequences"])


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures, prints and writes the map, and returns the file."""
    parser = argparse.ArgumentParser(prog="examples.benchmarks.parallel_map", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    options = parser.parse_args(argv)
    configure(options.device, "highest")
    about, records = report.machine(options.device), []
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"parallel-{report.file_name(options.device, about, options.quick)}"
    rng = np.random.default_rng(0)
    for size in QUICK if options.quick else sizes():
        records += at(size, options.rounds, rng)
        found = records[-2 * len(JACOBIANS) :]
        shown = " ".join(f"{r.section[0]} {r.jacobian} {r.ratio:.3f}" for r in found)
        print(f"n {size.hidden} T {size.time} B {size.batch}: {shown}", flush=True)
        head = {"machine": about, "settings": {"rounds": options.rounds, "quick": options.quick}}
        text = json.dumps(head, indent=2, ensure_ascii=False)[:-2]
        rows = ",\n    ".join(json.dumps(dataclasses.asdict(record)) for record in records)
        file.write_text(f'{text},\n  "records": [\n    {rows}\n  ]\n}}\n')  # what is done is kept
    print(table(records))
    print(f"written: {file}")
    return file


if __name__ == "__main__":
    main()
