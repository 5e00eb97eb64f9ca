"""Checks the library on a GPU: close to float64, the same every time, nothing left unwritten."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.benchmarks import gpu_cases
from examples.benchmarks.gpu_cases import LIMITS, Case, Numbers
from examples.benchmarks.gpu_contestants import OURS, PALLAS
from examples.benchmarks.gpu_speed import Setting
from examples.benchmarks.records import Record, failure

RUNS = 5
POISON_BYTES = 2**26  # beside memory of the size of the results


def prepared(setting: Setting, case: Case) -> Callable[[], list[Record]]:
    """Lowers a case; returns what runs it, while others still compile."""
    numbers = gpu_cases.draw(case, setting.rng)
    name, implementation = (OURS, None) if setting.device == "cpu" else (PALLAS, PALLAS)
    fields: dict[str, Any] = {
        "section": "checks",
        "size": case.size,
        "contestant": name,
        "mode": case.mode,
        "dtype": case.dtype,
        "variant": case.variant,
    }
    try:
        job = jax.jit(gpu_cases.call(case, implementation)).lower(numbers)
        compiling = setting.pool.submit(job.compile)
    except Exception as exception:
        record = failure(exception, **fields)
        return lambda: [record]

    def run() -> list[Record]:
        try:
            setting.journal.begin(f"{case.key} | {name} {case.dtype} {case.options}")
            return [checked(case, numbers, compiling, fields)]
        except Exception as exception:
            setting.journal.judge(exception)
            return [failure(exception, **fields)]

    return run


def checked(case: Case, numbers: Numbers, compiling: Future, fields: dict) -> Record:
    """Runs a case several times, all but the first in poisoned memory."""
    run, placed = compiling.result(), jax.device_put(numbers)
    runs = []
    for _ in range(RUNS):
        results = jax.block_until_ready(run(placed))
        runs.append(jax.tree.map(np.asarray, results))
        poison(jax.tree.leaves(results))
        del results
    found = errors(runs[0], gpu_cases.right(case, numbers))
    unequal = sum(not same(runs[0], other) for other in runs[1:])
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else math.inf)
    record = Record(value=found[worst], **fields)
    record.details = {"errors": found, "worst": worst, "runs unlike the first": unequal}
    if not all(error <= LIMITS[case.dtype] for error in found.values()):
        record.error = f"relative error {found[worst]:.1e} of {worst}"
    elif unequal:
        record.error = f"{unequal} of {RUNS - 1} runs in poisoned memory are unlike the first"
    return record


def poison(like: list[jax.Array]) -> None:
    """Leaves NaN, in every dtype, in the free memory that the next results are given."""
    sizes = [*(leaf.size * leaf.dtype.itemsize for leaf in 3 * like), POISON_BYTES]
    filled = [jnp.full(-(-size // 4), 0xFFFFFFFF, jnp.uint32) for size in sizes]
    for array in jax.block_until_ready(filled):
        array.delete()


def same(one: Any, other: Any) -> bool:
    """Returns whether all arrays are bitwise equal."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def errors(got: Any, right: Any) -> dict[str, float]:
    """Returns ‖got − right‖ / ‖right‖ of every array, by its name; NaN where there is one."""
    found = {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(right), strict=True
    ):
        if a.shape != b.shape:
            raise ValueError(f"an array of shape {b.shape} was expected, got {a.shape}")
        off = np.linalg.norm(a.astype(np.float64) - b)
        found[jax.tree_util.keystr(path, simple=True, separator=" ")] = float(
            off / max(np.linalg.norm(b), 1e-30)
        )
    return found
