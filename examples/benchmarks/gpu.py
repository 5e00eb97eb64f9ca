"""Checks and measures the GRU on an NVIDIA GPU, beside PyTorch's (cuDNN) and Flax's.

    python -m examples.benchmarks.gpu                         # everything: about half an hour
    python -m examples.benchmarks.gpu --quick                 # two sizes
    python -m examples.benchmarks.gpu --budget 540            # what matters most, in nine minutes
    python -m examples.benchmarks.gpu --resume FILE.json      # … and what that did not reach
    python -m examples.benchmarks.gpu --part 1/3              # a third
    python -m examples.benchmarks.gpu --merge PART.json ...   # parts to one file; needs no GPU
    python -m examples.benchmarks.gpu --device cpu --quick    # only tries the code

Each run first compares the kernels with float64 on fresh random numbers, in memory full of NaN
and several times over, then times whole layers; the sections are

    checks    outputs, final states and gradients against a loop in NumPy
    speed     forward pass and training step of all contestants
    sweep     the scan by steps per iteration
    parallel  `gru_jax.gru_parallel` beside the scan

The work is done by a second process. If that hangs or dies, what it was doing is written down as
lost, and another goes on with the rest. What is measured is written at once.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.benchmarks import gpu_report, gpu_watch, gpu_worker, report
from examples.benchmarks.gpu_worker import State
from examples.benchmarks.problem import Size

SECTIONS = ("checks", "speed", "sweep", "parallel")
RESULTS = Path(__file__).parent / "results"
SLACK_SECONDS = 20  # what the worker may take beyond its budget


def part_of(text: str) -> tuple[int, int]:
    """Reads "K/N"."""
    first, _, number = text.partition("/")
    if not (first.isdigit() and number.isdigit() and 1 <= int(first) <= int(number)):
        raise argparse.ArgumentTypeError(f"a part is K/N with 1 ≤ K ≤ N, got {text}")
    return int(first), int(number)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="examples.benchmarks.gpu", description="GRUs on a GPU.")
    add = parser.add_argument
    add("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: only to try the code")
    add("--quick", action="store_true", help="small sizes, few rounds")
    add("--sizes", nargs="+", type=Size.parse, metavar="B,T,I,H", help="of the section speed")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="the sections")
    add("--contestants", nargs="+", metavar="NAME", help="those with these names alone")
    add("--part", type=part_of, default=(1, 1), metavar="K/N", help="the K-th of N parts")
    add("--budget", type=float, default=3600.0, metavar="SECONDS", help="then stop, and report")
    add("--patience", type=float, default=120.0, metavar="SECONDS", help="then it hangs")
    add("--rounds", type=int, help="5, or 2 with --quick")
    add("--seed", type=int, help="of all numbers; from the clock by default")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="the folder of the results")
    add("--resume", type=Path, metavar="JSON", help="goes on from there, on the same machine")
    add("--merge", nargs="+", type=Path, metavar="JSON", help="joins files of the same machine")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.quick and not options.merge:
        parser.error("--device cpu goes with --quick: it only tries the code")
    options.rounds = options.rounds or (2 if options.quick else 5)
    if options.seed is None:
        earlier = options.resume and json.loads(options.resume.read_text())["settings"]["seed"]
        options.seed = earlier or time.time_ns() % 2**31
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints and writes its results, and returns the exit status."""
    options = parse(argv)
    if options.worker:
        gpu_worker.work(options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        finish(merged(options.merge), options.out, "")
        return 0
    part = "" if options.part[1] == 1 else "-part-{}-of-{}".format(*options.part)
    running = options.out / f"gpu-running{part}.json"
    running.unlink(missing_ok=True)
    if options.resume:
        running.write_text(options.resume.read_text())
    given = [*(sys.argv[1:] if argv is None else argv), "--seed", str(options.seed)]
    end = time.monotonic() + options.budget

    def start() -> gpu_watch.End:
        left = max(0.0, end - time.monotonic())
        more = ["--budget", str(left), "--worker", str(running)]
        command = [sys.executable, "-m", "examples.benchmarks.gpu", *given, *more]
        journal = running.with_suffix(".now")
        return gpu_watch.watch(command, journal, options.patience, left + SLACK_SECONDS)

    status = gpu_watch.supervise(start, running)
    running.with_suffix(".now").unlink(missing_ok=True)
    if running.exists():
        finish(State.read(running), options.out, part)
        running.unlink()
    return status


def merged(files: Sequence[Path]) -> State:
    """Joins the results of several runs on one machine; of the same figure the last one counts."""
    states = [State.read(file) for file in files]
    head, records = states[0].head, {}
    for state in states:
        for key in ("gpu", "packages"):
            if state.head["machine"][key] != head["machine"][key]:
                raise ValueError(
                    f"{state.file} must be of the same machine and versions as {files[0]}, but its "
                    f"{key} differ: {state.head['machine'][key]}, {head['machine'][key]}."
                )
        for r in state.records:
            records[r.section, r.size, r.contestant, r.mode, r.dtype, r.variant] = r
    done = list(dict.fromkeys(key for state in states for key in state.head["done"]))
    left = dict.fromkeys(key for state in states for key in state.head["not_reached"])
    new = {
        "machine": head["machine"],
        "settings": [state.head["settings"] for state in states],
        "absent": {k: v for state in states for k, v in state.head["absent"].items()},
        "lost": {k: v for state in states for k, v in state.head["lost"].items()},
        "done": done,
        "not_reached": [key for key in left if key not in done],
    }
    return State(files[0], new, list(records.values()))


def finish(state: State, out: Path, part: str) -> None:
    """Prints tables and verdicts, and writes JSON and picture."""
    about, settings = state.head["machine"], state.head["settings"]
    first = settings[0] if isinstance(settings, list) else settings
    device = "gpu" if about["gpu"] else "gpu-smoke"
    name = report.file_name(device, about, first["quick"]).removesuffix(".json")
    state.file = out / f"{name}{part}.json"
    state.head["verdicts"] = gpu_report.summary(state.records)
    state.write()
    print(gpu_report.tables(state.records), "\n")
    for kind in ("absent", "lost"):
        for key, reason in state.head[kind].items():
            print(f"{kind}: {key}: {reason}")
    if state.head["not_reached"]:
        print(f"not reached: {len(state.head['not_reached'])} of the items")
    for verdict in gpu_report.verdicts(state.records):
        print(verdict)
    written = [str(state.file)]
    try:
        from examples.benchmarks import gpu_picture
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        path = state.file.with_suffix(".png")
        caption = about["gpu"] or f"a trial on a CPU, {about['cpu']}"
        written += [str(path)] if gpu_picture.draw(state.records, path, caption) else []
    print(f"written: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
