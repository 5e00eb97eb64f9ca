"""The process that uses the GPU: checks, then times, what matters most first, while time lasts."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.benchmarks import (
    gpu_cases,
    gpu_checks,
    gpu_contestants,
    gpu_parallel,
    gpu_speed,
    report,
)
from examples.benchmarks.gpu_contestants import Entry
from examples.benchmarks.gpu_speed import Setting
from examples.benchmarks.gpu_watch import Journal
from examples.benchmarks.problem import Size
from examples.benchmarks.records import Record
from examples.benchmarks.runners import CORES, configure

BATCHES, SMALL, LARGE, TIMES = (16, 64, 1, 128), (256, 128, 64), (384, 512, 1024), (1000, 100)
SIZES = [Size(B, T, H, H) for some in (SMALL, LARGE) for T in TIMES for H in some for B in BATCHES]
QUICK_SIZES = {"gpu": [Size(16, 100, 256, 256), Size(1, 100, 64, 64)], "cpu": [Size(2, 7, 5, 5)]}
SWEEP_SIZES = [
    Size(B, 1000, H, H) for B, H in ((16, 256), (1, 64), (64, 512), (128, 1024), (1, 256))
]
QUICK_PARALLEL = [Size(2, 12, 3, 3)]
NO_GPU = (
    "JAX sees no NVIDIA GPU here, and this benchmark needs one; --device cpu --quick only tries "
    "its code."
)


class Item(NamedTuple):
    """A piece of work that is done or not."""

    section: str
    key: str
    run: Callable[[], list[Record]]


class State:
    """What is known so far, as it stands in the file."""

    def __init__(self, file: Path, head: dict[str, Any], records: list[Record]):
        self.file, self.head, self.records = file, head, records

    @classmethod
    def read(cls, file: Path) -> "State":
        """Reads what an earlier worker wrote."""
        head = json.loads(file.read_text())
        records = [Record(**fields) for fields in head.pop("records")]
        for record in records:
            record.size = Size(*record.size)
        return cls(file, head, records)

    def write(self) -> None:
        """Writes it, whole or not at all."""
        new = self.file.with_suffix(".new")
        new.write_text(report.as_json(self.head, self.records))
        new.replace(self.file)


def require(device: str) -> None:
    """Ends the process with status 2 where the device is not there."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch
    try:
        if device == "cpu" or "cuda" in jax.devices()[0].client.platform_version:
            return
    except RuntimeError as error:
        print(str(error).split("\n")[0], file=sys.stderr)
    print(NO_GPU, file=sys.stderr)
    raise SystemExit(2)


def machine(device: str) -> dict[str, Any]:
    """Returns what the figures depend on."""
    about, query = report.machine(device), None
    if device == "gpu":
        about["compute_capability"] = getattr(jax.devices()[0], "compute_capability", None)
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            query = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            query = None
    about["driver"] = query.stdout.split("\n")[0].strip() if query else None
    return about


def work(options: argparse.Namespace) -> None:
    """Does what is not done yet; `options` are those of `examples.benchmarks.gpu`."""
    end = time.monotonic() + options.budget
    require(options.device)
    configure(options.device, "default")
    if options.worker.exists():
        state = State.read(options.worker)
    else:
        chosen = ("device", "quick", "seed", "rounds", "part", "budget", "only")
        settings = {name: getattr(options, name) for name in chosen}
        head = {"machine": machine(options.device), "settings": settings}
        state = State(options.worker, head | {"absent": {}, "lost": {}, "done": []}, [])
    with ThreadPoolExecutor(max(2, CORES)) as pool:
        setting = Setting(
            options.device,
            options.rounds,
            options.seed,
            np.random.default_rng([options.seed, len(state.head["lost"])]),
            Journal(options.worker.with_suffix(".now"), state.head["lost"]),
            pool,
        )
        carry_out(state, _items(options, setting, state.head), end)


def carry_out(state: State, items: Iterator[Item], end: float) -> None:
    """Runs the items that are not done, as long as the slowest so far of a section has time."""
    slowest: dict[str, float] = {}
    state.head["not_reached"] = []
    state.write()
    for item in items:
        if item.key in state.head["done"]:
            continue
        begun = time.monotonic()
        if begun + slowest.get(item.section, 0.0) > end:
            state.head["not_reached"].append(item.key)
            continue
        state.records += item.run()
        state.head["done"].append(item.key)
        state.write()
        took = time.monotonic() - begun
        slowest[item.section] = max(took, slowest.get(item.section, 0.0))
        print(f"{item.key}: {took:.1f} s", flush=True)
    state.write()


def _items(options: argparse.Namespace, setting: Setting, head: dict[str, Any]) -> Iterator[Item]:
    """Yields everything asked for, of each section every N-th beginning with the K-th."""
    first, step = options.part
    quick = options.quick

    def own(some: list) -> list:
        return some[first - 1 :: step]

    def there(entries: list[Entry]) -> list[Entry]:
        found, absent = gpu_contestants.taking_part(entries, options.device, options.contestants)
        head["absent"] |= absent
        return found

    if "checks" in options.only:
        found = list(gpu_cases.cases(np.random.default_rng(options.seed), quick))
        yield from _checks(setting, [c for c in own(found) if c.key not in head["done"]])
    if "speed" in options.only:
        entries = there(gpu_contestants.entries())
        sizes = options.sizes or (QUICK_SIZES[options.device] if quick else SIZES)
        for size in own(sizes):
            yield Item("speed", f"speed {size}", _timed(setting, "", size, entries))
    if "sweep" in options.only:
        entries = there(gpu_contestants.sweep())
        for size in own(QUICK_SIZES[options.device] if quick else SWEEP_SIZES):
            yield Item("sweep", f"sweep {size}", _timed(setting, "sweep ", size, entries))
    if "parallel" in options.only:
        entries = there(gpu_contestants.parallel())
        for size in own(QUICK_PARALLEL if quick else gpu_parallel.SIZES):
            yield Item("parallel", f"parallel {size}", _in_parallel(setting, size, entries))


def _checks(setting: Setting, cases: list[gpu_cases.Case]) -> Iterator[Item]:
    """Yields the checks; some more are being compiled meanwhile."""
    waiting: deque[Item] = deque()
    for case in cases:
        waiting.append(Item("checks", case.key, gpu_checks.prepared(setting, case)))
        if len(waiting) > CORES:
            yield waiting.popleft()
    yield from waiting


def _timed(setting: Setting, prefix: str, size: Size, entries: list[Entry]) -> Callable:
    return lambda: gpu_speed.at(setting, prefix, size, entries)


def _in_parallel(setting: Setting, size: Size, entries: list[Entry]) -> Callable:
    return lambda: list(gpu_parallel.at(setting, size, entries))
