"""`gru_jax.gru_parallel` beside the scan: how far apart, after how many iterations, how fast."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gru_jax
from examples.benchmarks import gpu_speed, jax_grus, problem
from examples.benchmarks.gpu_contestants import JACOBIANS, Entry
from examples.benchmarks.gpu_speed import Setting
from examples.benchmarks.problem import RECURRENT_BIAS, Size
from examples.benchmarks.records import Record, failure

HIDDEN, TIMES, BATCHES = (16, 4, 1, 8, 2), (10_000, 100_000, 1000), (1, 16)
SIZES = [Size(B, T, n, n) for T in TIMES for B in BATCHES for n in HIDDEN]
PREFIX = "parallel "
MOST_ROUNDS = 3


def at(setting: Setting, size: Size, entries: list[Entry]) -> Iterator[Record]:
    """Compares the two at one size; the network is drawn as PyTorch draws it: contracting."""
    for jacobian in JACOBIANS:
        name = f"parallel {jacobian}"
        if any(entry.name == name for entry in entries):
            yield _agreement(setting, size, jacobian, name)
    rounds = min(setting.rounds, 1 if size.time > 10_000 else MOST_ROUNDS)
    yield from gpu_speed.at(setting._replace(rounds=rounds), PREFIX, size, entries)


def _agreement(setting: Setting, size: Size, jacobian: str, name: str) -> Record:
    """Returns the largest deviation from the scan, and what the iteration says of itself."""
    fields: dict[str, Any] = {
        "section": f"{PREFIX}agreement",
        "size": size,
        "contestant": name,
        "mode": RECURRENT_BIAS,
    }
    try:
        setting.journal.begin(f"{PREFIX}agreement {size} | {name} float32")
        task = problem.draw(size, RECURRENT_BIAS, setting.seed)
        params, x = jax_grus.ours(task.weights).params, jnp.asarray(task.x)
        parallel: Any = getattr(gru_jax, "gru_parallel")  # noqa: B009
        run = jax.jit(lambda p, x: parallel(p, x, jacobian=jacobian))
        with jax.default_matmul_precision("highest"):  # TF32 would hide what is compared
            y, _, info = jax.block_until_ready(run(params, x))
            scan, _ = gru_jax.gru(params, x, implementation="scan")
        off = float(np.abs(np.asarray(y) - np.asarray(scan)).max())
        return Record(value=off, details=_numbers(info), **fields)
    except Exception as exception:
        setting.journal.judge(exception)
        return failure(exception, **fields)


def _numbers(info: Any) -> dict[str, float]:
    """Returns the largest entry of every array of a record, by name; of booleans, whether all."""
    fields = info
    if dataclasses.is_dataclass(info):
        fields = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    elif hasattr(info, "_asdict"):
        fields = info._asdict()
    leaves = jax.tree_util.tree_leaves_with_path(fields)
    return {
        jax.tree_util.keystr(path, simple=True): float(np.max(a) if a.dtype != bool else np.all(a))
        for path, a in leaves
    }
