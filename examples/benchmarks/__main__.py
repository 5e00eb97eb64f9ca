"""Measures gru_jax beside the GRUs of other libraries: speed, compile time, memory, accuracy.

    pip install -e ".[benchmarks,torch]"
    python -m examples.benchmarks                   # everything, on the CPU: about twenty minutes
    python -m examples.benchmarks --quick           # two small sizes: about a minute
    python -m examples.benchmarks --device gpu      # peers that are not installed are left out

Each peer is compared with the library in the reset mode that the peer computes, with the same
weights and inputs; what it returns is compared with a float64 loop in NumPy. Arrays are
(batch, time, channels) for all. The results, and a bar chart of them, are written to a folder.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks import report, sections, streaming
from examples.benchmarks.contestants import PEERS, taking_part
from examples.benchmarks.problem import Size
from examples.benchmarks.records import Record
from examples.benchmarks.runners import CORES, configure

SIZES = tuple(
    Size(*numbers)
    for numbers in (
        (1, 100, 64, 64), (32, 100, 64, 128), (64, 100, 128, 256), (128, 50, 256, 512),
        (32, 200, 512, 512), (1, 500, 256, 256), (256, 100, 32, 32),
    )
)  # fmt: skip
QUICK_SIZES = (SIZES[0], Size(8, 50, 32, 64))
SECTIONS = (*sections.SEQUENCE, "streaming", "compile", "memory", "modes")
RESULTS = Path(__file__).parent / "results"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="examples.benchmarks", description="Benchmark GRUs.")
    add = parser.add_argument
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--precision", choices=("default", "highest"), default="default", help="highest: no TF32")
    add("--sizes", nargs="+", type=Size.parse, metavar="B,T,I,H", help="the seven main ones")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure")
    add("--peers", nargs="*", choices=PEERS, default=PEERS, help="whom to compare with")
    add("--rounds", type=int, help="15, or 3 with --quick")
    add("--quick", action="store_true", help="small sizes, few rounds")
    add("--out", type=Path, default=RESULTS, help="the folder of the results")
    add("--seed", type=int, default=0, help="of weights, inputs and orders")
    options = parser.parse_args(argv)
    options.sizes = options.sizes or list(QUICK_SIZES if options.quick else SIZES)
    options.rounds = options.rounds or (3 if options.quick else 15)
    return options


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Runs the benchmark, prints and writes its results, and returns the files written."""
    options = parse(argv)
    configure(options.device, options.precision, devices=CORES)
    contestants, absent = taking_part(options.device, options.peers)
    for name, reason in absent.items():
        print(f"skipped: {name} ({reason})")
    setting = sections.Setting(
        options.device,
        contestants,
        options.sizes,
        options.rounds,
        options.seed,
        np.random.default_rng(options.seed),
        options.quick,
    )
    head = _head(options, absent)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / report.file_name(options.device, head["machine"], options.quick)
    records: list[Record] = []
    for found in _measured(options, setting, head["product_rate"]):
        records += found
        head["summary"] = report.summary(records)
        file.write_text(report.as_json(head, records))  # what is done is kept
    print(report.tables(records))
    print(report.markdown(records))
    for name, value in head["summary"].items():
        print(f"{name}: {report.shown(value)}")
    written = [file, *_pictures(file, head, records)]
    print(f"written: {', '.join(map(str, written))}")
    return written


def _measured(
    options: argparse.Namespace, setting: sections.Setting, rate: float
) -> Iterator[list[Record]]:
    """Yields the records of one section after the other."""
    parts = [part for part in sections.SEQUENCE if part in options.only]
    if parts:
        yield from sections.sequences(setting, parts, rate)
    if "streaming" in options.only:
        sizes = streaming.SIZES[:1] if options.quick else streaming.SIZES
        yield streaming.in_processes(options, sizes)
    if "memory" in options.only:
        yield sections.temporaries(setting)
    if "modes" in options.only:
        yield sections.modes(setting)
    if "compile" in options.only:  # the last, as it empties the caches of JAX
        yield sections.compile_times(setting)


def _head(options: argparse.Namespace, absent: dict[str, str]) -> dict[str, Any]:
    """Returns what stands in the JSON before the records."""
    rate = sections.product_rate(options.device)
    print(f"product rate: {rate / 1e9:.0f} GFLOP/s", flush=True)
    names = ("device", "precision", "rounds", "seed", "quick", "only", "sizes")
    return {
        "machine": report.machine(options.device),
        "settings": {name: getattr(options, name) for name in names},
        "skipped": absent,
        "product_rate": rate,
    }


def _pictures(file: Path, head: dict[str, Any], records: list[Record]) -> list[Path]:
    """Draws the bar chart beside the JSON, if there is anything to draw and Matplotlib to do it."""
    try:
        from examples.benchmarks import picture
    except ImportError as error:
        print(f"no picture: {error}")
        return []
    about, path = head["machine"], file.with_suffix(".png")
    where = about["gpu"] or f"{about['cpu']}, {about['cores']} cores"
    caption = f"{where}, float32, medians of {head['settings']['rounds']} rounds"
    return [path] if picture.draw(records, path, caption) else []


if __name__ == "__main__":
    main()
