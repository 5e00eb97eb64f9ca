"""Times whole layers on a GPU: forward pass and training step of all contestants at one size.

A training step is sum(y ⊙ g) and its gradients of the weights, biases and inputs. Calls are
enqueued one after the other until they last a while, and only the last is waited for, as in a
program that runs many: what the host needs for a call counts only where the GPU waits for it.
"""

import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.benchmarks import measure, problem
from examples.benchmarks.gpu_contestants import Entry
from examples.benchmarks.gpu_watch import Journal
from examples.benchmarks.problem import RECURRENT_BIAS, Problem, Size
from examples.benchmarks.records import Record, failure, outcome
from examples.benchmarks.runners import JaxGRU

KINDS = ("forward", "training")
TOGETHER_SECONDS, TOGETHER_MOST = 2e-3, 32  # calls enqueued at once: how long, how many
VISIT_SECONDS = 0.02
LONG_SECONDS = 0.3  # a call as long as that is timed once in each round


class Setting(NamedTuple):
    """What all measurements have in common."""

    device: str
    rounds: int
    seed: int
    rng: np.random.Generator  # shuffles
    journal: Journal
    pool: ThreadPoolExecutor  # compiles


class Work(NamedTuple):
    """Something that may be enqueued several times before one waits for the last result."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]


class Repeated:
    """Work enqueued so often that it lasts a while; after that, one call of it."""

    def __init__(self, journal: Journal, key: str, entry: Entry, work: Work):
        self.journal, self.key, self.entry, self.work, self.number = journal, key, entry, work, 1
        self.begin()
        self()  # memory is taken, libraries are loaded
        start = time.perf_counter()
        self()
        self.seconds = time.perf_counter() - start
        self.number = int(np.clip(TOGETHER_SECONDS / self.seconds, 1, TOGETHER_MOST))

    def begin(self) -> None:
        """Says that it comes next."""
        self.journal.begin(self.key)
        self.entry.prepare()

    def __call__(self) -> None:
        """Runs it, and waits for the last result."""
        result = None
        for _ in range(self.number):
            result = self.work.start()
        self.work.wait(result)


def visit(call: Any) -> float:
    """Times a `Repeated`; returns the median of one call of it, all its parts together."""
    try:
        call.begin()
        long, seconds = call.seconds > LONG_SECONDS, []
        if not long:
            call()
        while not seconds or (not long and sum(seconds) < VISIT_SECONDS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds))
    except Exception as exception:
        call.journal.judge(exception)
        raise


def at(setting: Setting, prefix: str, size: Size, entries: Sequence[Entry]) -> list[Record]:
    """Measures all contestants at one size; sections are called `prefix` and the kind."""
    calls: dict[tuple[str, Entry], Repeated] = {}
    records = []

    def fields(kind: str, entry: Entry) -> dict[str, Any]:
        return {"section": prefix + kind, "size": size, **entry.who()}

    for kind, entry, ready in _prepared(setting, size, entries):
        try:
            key = f"{prefix}{kind} {size} | {entry.key}"
            setting.journal.begin(key)
            calls[kind, entry] = Repeated(setting.journal, key, entry, ready())
        except Exception as exception:
            setting.journal.judge(exception)
            records.append(failure(exception, **fields(kind, entry)))
    timings, failed = measure.shuffled(calls, setting.rounds, setting.rng, visit)
    for (kind, entry), timing in timings.items():
        number = calls[kind, entry].number
        record = outcome(timing.per(number), **fields(kind, entry))
        steps = 1e6 / size.time
        record.details = {"us_per_step": (record.value or 0.0) * steps, "together": number}
        records.append(record)
    records += [failure(e, **fields(kind, entry)) for (kind, entry), e in failed.items()]
    calls.clear()
    _forget()
    return records


def _prepared(
    setting: Setting, size: Size, entries: Sequence[Entry]
) -> Iterator[tuple[str, Entry, Callable[[], Work]]]:
    """Yields every kind of work, and what returns it ready or raises: all compile at once."""
    task = problem.draw(size, RECURRENT_BIAS, setting.seed)
    lengths = np.random.default_rng(setting.seed).integers(size.time // 2, size.time, size.batch)
    lengths = np.maximum(lengths, 1)
    placed = functools.cache(lambda dtype: [jnp.asarray(a, dtype) for a in (task.x, task.g)])
    pending = []
    for entry in entries:
        try:
            gru = entry.made(task.weights, lengths, setting.device)
            if isinstance(gru, JaxGRU):
                works = _compiling(setting.pool, gru, *placed(entry.dtype))
            else:
                works = _bound(gru, task)
            pending += [(kind, entry, ready) for kind, ready in works.items()]
        except Exception as exception:
            setting.journal.judge(exception)
            pending += [(kind, entry, functools.partial(_raise, exception)) for kind in KINDS]
    yield from pending


def _compiling(pool: ThreadPoolExecutor, gru: JaxGRU, x: Any, g: Any) -> dict[str, Any]:
    """Lowers forward pass and training step, and lets them compile in the background."""
    forward = jax.jit(gru.apply, compiler_options=gru.options)
    jobs = zip((forward, gru.training_step()), ((gru.params, x), (gru.params, x, g)), strict=True)

    def ready(future: Any, arguments: tuple) -> Work:
        return Work(functools.partial(future.result(), *arguments), jax.block_until_ready)

    return {
        kind: functools.partial(ready, pool.submit(job.lower(*arguments).compile), arguments)
        for kind, (job, arguments) in zip(KINDS, jobs, strict=True)
    }


def _bound(gru: Any, task: Problem) -> dict[str, Any]:
    """The same of a GRU in PyTorch, whose calls no longer wait by themselves."""
    wait, gru.wait = gru.wait, lambda: None
    runner = gru.bind(task)
    works = [Work(call, lambda _: wait()) for call in (runner.forward, runner.train)]
    return {kind: functools.partial(_same, work) for kind, work in zip(KINDS, works, strict=True)}


def _same(work: Work) -> Work:
    return work


def _raise(exception: Exception) -> Work:
    raise exception


def _forget() -> None:
    """Frees the memory and the programs of a size."""
    jax.clear_caches()
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()
