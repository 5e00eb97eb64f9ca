"""One step at a time, called from Python: the section that runs in processes of its own.

JAX reads `jax_cpu_enable_async_dispatch` when it makes its CPU client, and a step of a few
microseconds depends on it: handing over to another thread costs more than the step. Hence one
process with the flag on and one with it off.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.benchmarks import measure, problem
from examples.benchmarks.contestants import Contestant, taking_part
from examples.benchmarks.problem import MODES, Size
from examples.benchmarks.records import Record, failure, fill_ratios, outcome
from examples.benchmarks.runners import configure

ROOT = Path(__file__).parents[2]
SIZES = (32, 64, 128, 256, 512)  # H = I


def steps(
    contestants: Sequence[Contestant], options: argparse.Namespace, variant: str
) -> list[Record]:
    """Measures one step at batch size 1, its state fed back, its result waited for.

    Where one call takes many steps, the time is that of the call divided by their number.
    """
    records = []
    for n in options.sizes:
        rng, calls, found = np.random.default_rng(options.seed), {}, []
        fields: dict[str, Any] = {
            "section": "streaming",
            "size": Size(1, 1, n, n),
            "variant": variant,
        }
        weights = {mode: problem.draw_weights(rng, n, n, mode) for mode in MODES}
        x = rng.standard_normal((1, n), np.float32)
        for contestant in contestants:
            try:
                call = contestant.made(weights[contestant.mode], options.device).stream(x)
                call()
                calls[contestant] = call
            except Exception as exception:
                found.append(failure(exception, **fields, **contestant.who()))
        timings, failed = measure.shuffled(calls, options.rounds, rng)
        timings = {c: timing.per(c.steps) for c, timing in timings.items()}
        for contestant, result in (timings | failed).items():
            found.append(outcome(result, **fields, **contestant.who()))
        fill_ratios(found)
        records += found
    return records


def in_processes(options: argparse.Namespace, sizes: Sequence[int]) -> list[Record]:
    """Runs `steps` in a fresh process for each setting of the flag; a GPU has no such flag."""
    records = []
    command = [sys.executable, "-m", __name__, "--sizes", *map(str, sizes)]
    for name in ("device", "precision", "rounds", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    for dispatch in ("on",) if options.device == "gpu" else ("on", "off"):
        print(f"streaming, asynchronous dispatch {dispatch} …", flush=True)
        full = [*command, "--async", dispatch, "--peers", *options.peers]
        done = subprocess.run(full, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"  failed with exit status {done.returncode}; the other sections go on")
            continue
        records += [Record(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Measures with one setting of the flag; prints the records as one line of JSON."""
    parser = argparse.ArgumentParser(description="Time single steps of GRUs.")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--precision", choices=("default", "highest"), default="default")
    parser.add_argument("--async", dest="dispatch", choices=("on", "off"), default="on")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--peers", nargs="*", default=())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    jax.config.update("jax_cpu_enable_async_dispatch", options.dispatch == "on")
    configure(options.device, options.precision)
    contestants = [c for c in taking_part(options.device, options.peers)[0] if c.streams]
    records = steps(contestants, options, f"async dispatch {options.dispatch}")
    print(json.dumps([dataclasses.asdict(record) for record in records]))


if __name__ == "__main__":
    main()
