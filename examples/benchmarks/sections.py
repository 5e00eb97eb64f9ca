"""The sections of the benchmark that run in this process: what is measured, of whom."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import gru_jax
from examples.benchmarks import jax_grus, measure, problem
from examples.benchmarks.contestants import Contestant
from examples.benchmarks.problem import AFTER, BEFORE, MODES, Size
from examples.benchmarks.records import Record, failure, fill_ratios, outcome
from examples.benchmarks.runners import JaxGRU, Runner

SEQUENCE = ("forward", "training", "accuracy")


class Setting(NamedTuple):
    """What all sections have in common."""

    device: str
    contestants: list[Contestant]
    sizes: list[Size]
    rounds: int
    seed: int
    rng: np.random.Generator  # shuffles the rounds
    quick: bool


def product_rate(device: str) -> float:
    """Returns the operations per second of a large matrix product, the best within a second."""
    n = 8192 if device == "gpu" else 2048
    a = jax.random.normal(jax.random.key(0), (n, n), "float32")
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    seconds: list[float] = []
    while sum(seconds) < 1.0:
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds)


def sequences(setting: Setting, parts: Sequence[str], rate: float) -> Iterator[list[Record]]:
    """Measures forward pass and training step, and their errors; yields the records of a size."""
    for size in setting.sizes:
        print(f"{', '.join(parts)} at {size} …", flush=True)
        runners, found = _prepare(setting, size, parts)
        calls: dict[tuple, Callable] = {}
        for contestant, runner in runners.items():
            kinds = {"forward": runner.forward, "training": runner.train}
            calls |= {(s, contestant): call for s, call in kinds.items() if call and s in parts}
        timings, failed = measure.shuffled(calls, setting.rounds, setting.rng)
        for (section, contestant), result in (timings | failed).items():
            fields: dict[str, Any] = {"section": section, "size": size, **contestant.who()}
            record = outcome(result, **fields)
            if record.value:
                floor = size.flops(section == "training") / rate
                record.floor_fraction = floor / record.value
            found.append(record)
        fill_ratios([r for r in found if r.section != "accuracy"])
        yield found


def _prepare(
    setting: Setting, size: Size, parts: Sequence[str]
) -> tuple[dict[Contestant, Runner], list[Record]]:
    """Builds all contestants, compiles them, and compares what they return with float64."""
    runners, records = {}, []
    problems = {mode: problem.draw(size, mode, setting.seed) for mode in MODES}
    answer = functools.cache(lambda mode: problem.answer(problems[mode]))
    for contestant in setting.contestants:
        if not contestant.sequences(size):
            continue
        fields: dict[str, Any] = {"size": size, **contestant.who()}
        task = problems[contestant.mode]
        try:
            gru = contestant.made(task.weights, setting.device)
            runner = gru.bind(task)
            y, dx = runner.forward(), runner.train() if runner.train else None
            if "accuracy" in parts:
                for variant, got in (("y", y), ("dx", dx)):
                    if got is not None:
                        right = getattr(answer(contestant.mode), variant)
                        error = problem.error(runner.numpy(got), right)
                        records.append(Record("accuracy", value=error, variant=variant, **fields))
            runners[contestant] = runner
        except Exception as exception:
            print(f"  {contestant.name} failed: {exception}")
            records += [failure(exception, section=part, **fields) for part in parts]
    return runners, records


def compile_times(setting: Setting) -> list[Record]:
    """Measures tracing and compiling of the training step at T and at 10 T, from empty caches."""
    records, repetitions = [], 1 if setting.quick else 5
    for size in setting.sizes[:1] if setting.quick else setting.sizes:
        print(f"compile at {size} …", flush=True)
        grus = dict(_jax_grus(setting, size))
        found = []
        for factor in (1,) if setting.quick else (1, 10):
            longer = size._replace(time=factor * size.time)
            timings, failed = _compile_rounds(grus, longer, repetitions, setting.rng)
            for contestant, result in (timings | failed).items():
                variant = f"T·{factor}"
                fields: dict[str, Any] = {"section": "compile", "size": size, "variant": variant}
                found.append(outcome(result, **fields, **contestant.who()))
        fill_ratios(found)
        records += found
    return records


def _compile_rounds(
    grus: dict[Contestant, JaxGRU], size: Size, repetitions: int, rng: np.random.Generator
) -> tuple[dict[Contestant, measure.Timing], dict[Contestant, Exception]]:
    """Compiles everything anew in each round, in a new order."""
    seconds: dict[Contestant, list[float]] = {contestant: [] for contestant in grus}
    failed: dict[Contestant, Exception] = {}
    for _ in range(repetitions):
        for i in rng.permutation(len(grus)):
            contestant = list(grus)[i]
            try:
                jax.clear_caches()
                start = time.perf_counter()
                grus[contestant].lowered(size).compile()
                seconds[contestant].append(time.perf_counter() - start)
            except Exception as exception:
                failed[contestant] = exception
    timings = {c: measure.Timing(tuple(s)) for c, s in seconds.items() if c not in failed}
    return timings, failed


def temporaries(setting: Setting) -> list[Record]:
    """Asks the compiler for the bytes of temporary memory of the training step."""
    records = []
    for size in setting.sizes[:1] if setting.quick else setting.sizes:
        print(f"memory at {size} …", flush=True)
        for contestant, gru in _jax_grus(setting, size):
            fields: dict[str, Any] = {"section": "memory", "size": size, **contestant.who()}
            try:
                analysis = gru.lowered(size).compile().memory_analysis()
                records.append(Record(value=analysis.temp_size_in_bytes, **fields))
            except Exception as exception:
                records.append(failure(exception, **fields))
    fill_ratios(records)
    return records


def modes(setting: Setting) -> list[Record]:
    """Measures the library's modes against each other, and projected layers against dense ones."""
    pairs = [(2, 10)] if setting.quick else [(32, 100), (128, 25)]
    variants: dict[str, dict[str, Any]] = {
        "dense": {},
        "P_o 128": {"output_projector_size": 128},
        "P_i 64, P_o 128": {"output_projector_size": 128, "input_projector_size": 64},
    }
    records = []
    for batch, steps in pairs:
        size = Size(batch, steps, 256, 512)
        print(f"modes at {size} …", flush=True)
        calls: dict[tuple, Callable] = {}
        for mode in (AFTER, BEFORE):
            task = problem.draw(size, mode, setting.seed)
            for name, sizes in variants.items():
                key = jax.random.key(setting.seed)
                params = gru_jax.init_params(key, 512, 256, reset_gate_mode=mode, **sizes)
                runner = jax_grus.of_params(params).bind(task)
                kinds = {"forward": runner.forward, "training": runner.train}
                calls |= {(kind, name, mode): call for kind, call in kinds.items() if call}
        for call in calls.values():
            call()
        timings, failed = measure.shuffled(calls, setting.rounds, setting.rng)
        for (kind, name, mode), result in (timings | failed).items():
            fields: dict[str, Any] = {"section": "modes", "size": size, "variant": kind}
            records.append(outcome(result, contestant=name, mode=mode, **fields))
    fill_ratios(records, ours="dense")
    return records


def _jax_grus(setting: Setting, size: Size) -> Iterator[tuple[Contestant, JaxGRU]]:
    """Yields every contestant in JAX with weights of that size; skips what cannot be built."""
    rng = np.random.default_rng(setting.seed)
    for contestant in setting.contestants:
        if contestant.kind != "jax" or not contestant.sequences(size):
            continue
        weights = problem.draw_weights(rng, size.inputs, size.hidden, contestant.mode)
        try:
            gru = contestant.made(weights, setting.device)
        except Exception as exception:
            print(f"  {contestant.name} failed: {exception}")
            continue
        yield contestant, gru
