"""The benchmark of GPUs, as far as it goes without one: its oracle, its judgement, its code."""

import importlib
import importlib.util
import json
import math
import pathlib
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_params
from reference import MODES, gru_ref, gru_ref_grads

ROOT = pathlib.Path(__file__).parent.parent
SOFT = ("softsign", "hard-sigmoid")


@pytest.fixture
def load(monkeypatch):
    """Loads a file of the benchmark, which promotes as JAX does by default."""
    monkeypatch.syspath_prepend(ROOT)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield lambda name: importlib.import_module(f"examples.benchmarks.{name}")


@pytest.fixture
def setting(load, tmp_path):
    """What a worker has, on the CPU."""
    with ThreadPoolExecutor(2) as pool:
        journal = load("gpu_watch").Journal(tmp_path / "now", {})
        rng = np.random.default_rng(0)
        yield load("gpu_speed").Setting("cpu", 2, 5, rng, journal, pool)


def run(*arguments):
    command = [sys.executable, "-m", "examples.benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# The oracle


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", ["", "lengths", "mask resets", "lengths resets reverse soft"])
def test_oracle(mode, options, load):
    oracle, rng = load("oracle"), np.random.default_rng(len(options))
    B, T, I, H = 3, 7, 4, 5  # noqa: E741
    leaves, x = random_params(rng, H, I, mode), rng.normal(size=(B, T, I))
    h0, ch, cy = rng.normal(size=(B, H)), rng.normal(size=(B, H)), rng.normal(size=(B, T, H))
    lengths = np.array([7, 0, 4]) if "lengths" in options else None
    mask = rng.random((B, T)) < 0.6 if "mask" in options else None
    resets = rng.random((B, T)) < 0.3 if "resets" in options else None
    reverse, kinds = "reverse" in options, SOFT if "soft" in options else ("tanh", "sigmoid")
    names = ("state_activation", "gate_activation")
    how = {"mode": mode, "lengths": lengths, "mask": mask, "resets": resets, "reverse": reverse}
    how |= dict(zip(names, kinds, strict=True))
    y, hidden = gru_ref(leaves, x, h0, **how)
    expected = gru_ref_grads(leaves, x, h0, cy, ch, **how)
    keep = mask if lengths is None else np.arange(T) < lengths[:, None]
    dirty = x if keep is None else np.where(keep[..., None], x, np.nan)
    call = oracle.Call(mode, leaves, dirty, h0, cy, ch, keep, resets, reverse, *kinds)
    right = oracle.solve(call)
    found = right.leaves | {"x": right.x, "h0": right.h0, "y": right.y, "hidden": right.hidden}
    expected |= {"y": y, "hidden": hidden}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


# The checks


def checked(load, spoil):
    """The record of a check of something that returns the right answer, spoilt at the n-th run."""
    cases, checks, problem = load("gpu_cases"), load("gpu_checks"), load("problem")
    case = cases.Case(problem.Size(2, 4, 3, 5), MODES[2], "float32", ("resets",))
    numbers = cases.draw(case, np.random.default_rng(1))
    right, runs = cases.right(case, numbers), []

    def call(_):
        runs.append(1)
        return jax.tree.map(jnp.asarray, spoil(jax.tree.map(np.copy, right), len(runs)))

    compiled = Future()
    compiled.set_result(call)
    record = checks.checked(case, numbers, compiled, dict(
        section="checks", size=case.size, contestant="pallas", mode=case.mode, dtype=case.dtype,
        variant=case.variant,
    ))  # fmt: skip
    assert len(runs) == checks.RUNS
    return record


def test_a_right_answer_passes(load):
    record = checked(load, lambda result, n: result)
    assert record.error is None
    assert record.value < 1e-12
    assert len(record.details["errors"]) == 7  # y, hidden, three leaves, x, h0


@pytest.mark.parametrize("value", [np.nan, 7.0])
@pytest.mark.parametrize("where", ["y", "h0", "bias"])
def test_one_wrong_number_fails(value, where, load):
    def spoil(result, n):
        gradients = result["gradients"]
        array = {"y": result["y"], "h0": gradients["h0"], **gradients["leaves"][0]}[where]
        array.flat[-1] = value
        return result

    record = checked(load, spoil)
    assert where in record.error
    assert where in record.details["worst"]


def test_runs_that_differ_fail(load):
    def spoil(result, n):
        result["y"].flat[0] += 1e-12 * (n == 4)
        return result

    assert "1 of 4 runs" in checked(load, spoil).error


def test_every_case_can_be_drawn(load):
    cases = load("gpu_cases")
    found = list(cases.cases(np.random.default_rng(0), quick=False))
    assert len({case.key for case in found}) == len(found)
    seen = {(case.dtype, option) for case in found for option in case.options}
    options = (*cases.OPTIONS, "forward only", "bidirectional")
    assert seen == {(dtype, option) for dtype in cases.LIMITS for option in options}
    plain = [c for c in found if "forward only" not in c.options]
    assert {c.mode for c in plain} == set(MODES)
    assert max(c.size.hidden for c in plain) == 256
    assert max(c.size.hidden for c in found) == 448
    for case in found:
        numbers = cases.draw(case, np.random.default_rng(1))
        assert numbers.x.shape == case.size[:3]
        assert np.isnan(np.float32(numbers.x)).any() <= bool({"lengths", "mask"} & {*case.options})


# The times


def test_who_fails_is_written_down_and_the_others_go_on(setting, load, monkeypatch):
    speed, table = load("gpu_speed"), load("gpu_contestants")
    monkeypatch.setattr(speed, "TOGETHER_SECONDS", 1e9)
    monkeypatch.setattr(speed, "visit", lambda call: 5.0 * call.number)
    (good, *_), _ = table.taking_part(table.entries(), "cpu", ["gru_jax"])

    def other(name, build):
        return good._replace(contestant=good.contestant._replace(name=name, build=build))

    def late(weights):
        gru = good.contestant.build(weights)
        return gru._replace(apply=lambda p, x: 1 / 0)

    entries = [other("no weights", lambda weights: 1 / 0), good, other("no trace", late)]
    setting.journal.lost[f"forward 2,3,4,4 | {good.key}"] = "it hung"
    records = speed.at(setting, "", load("problem").Size(2, 3, 4, 4), entries)
    found = {(r.contestant, r.section): r for r in records}
    assert len(found) == len(records) == 6
    assert found["gru_jax", "forward"].error == "LostError: it hung"
    for name in ("no weights", "no trace"):
        assert all("ZeroDivision" in found[name, kind].error for kind in speed.KINDS)
    timed = found["gru_jax", "training"]
    assert timed.rounds == (5.0, 5.0)  # of one call
    assert timed.details["us_per_step"] == pytest.approx(5e6 / 3)
    assert timed.details["together"] == speed.TOGETHER_MOST


def test_short_calls_are_timed_together(setting, load, monkeypatch):
    speed, started, waited = load("gpu_speed"), [], []
    monkeypatch.setattr(speed, "TOGETHER_SECONDS", 1e9)
    entry = load("gpu_contestants").entries()[0]
    work = speed.Work(lambda: started.append(1), lambda result: waited.append(1))
    call = speed.Repeated(setting.journal, "forward | one", entry, work)
    assert call.number == speed.TOGETHER_MOST
    started.clear(), waited.clear()
    call()
    assert (len(started), len(waited)) == (speed.TOGETHER_MOST, 1)
    assert setting.journal.file.read_text() == "forward | one"


def small(load):
    """A problem, the lengths of its sequences, and who takes part in it on a CPU."""
    problem, table = load("problem"), load("gpu_contestants")
    task = problem.draw(problem.Size(3, 6, 4, 5), MODES[2], seed=1)
    entries, _ = table.taking_part([*table.entries(), *table.sweep()], "cpu", None)
    return task, np.array([6, 2, 5]), entries


def test_contestants_in_jax_stay_in_their_dtype(load):
    task, lengths, entries = small(load)
    jaxs = [e for e in entries if e.contestant.kind == "jax"]
    assert len(jaxs) > 20
    for entry in jaxs:
        gru = entry.made(task.weights, lengths, "cpu")
        x, g = (jnp.asarray(a, entry.dtype) for a in (task.x, task.g))
        y = jax.eval_shape(gru.apply, gru.params, x)
        assert (y.dtype, y.shape) == (entry.dtype, task.g.shape), entry.key
        gradients = jax.tree.leaves(jax.eval_shape(gru.training_step(), gru.params, x, g))
        assert {a.dtype.name for a in gradients} == {entry.dtype}, entry.key


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no torch")
def test_contestants_in_torch(load):
    oracle, limits = load("oracle"), load("gpu_cases").LIMITS | {"float32": 1e-6}
    task, lengths, entries = small(load)
    torches = [e for e in entries if e.contestant.kind == "torch"]
    assert {e.key for e in torches if e.ragged} == {
        "torch TF32, packed float32", "torch, packed bfloat16",
    }  # fmt: skip
    biases = np.concatenate([task.weights.bias, task.weights.recurrent_bias])
    leaves = {"W": task.weights.W, "R": task.weights.R, "b": biases}
    zeros = np.zeros((3, 5))
    for entry in torches:
        keep = np.arange(6) < lengths[:, None] if entry.ragged else None
        right = oracle.solve(oracle.Call(MODES[2], leaves, task.x, zeros, task.g, zeros, keep))
        entry.prepare()
        runner = entry.made(task.weights, lengths, "cpu").bind(task)
        for got, expected in ((runner.forward(), right.y), (runner.train(), right.x)):
            off = np.linalg.norm(runner.numpy(got) - expected) / np.linalg.norm(expected)
            assert off < 2 * limits[entry.dtype], entry.key


def test_main_comparison(load):
    table, worker = load("gpu_contestants"), load("gpu_worker")
    entries = table.entries()
    assert len({entry.key for entry in entries}) == len(entries)
    keys = {entry.key for entry in entries}
    for name in ("pallas", "gru_jax", "torch", "nnx"):
        assert {f"{name} {dtype}" for dtype in table.DTYPES} <= keys
    assert {"torch TF32 float32", "scan 1 float32", "scan 16 float32", "linen float32"} <= keys
    sizes = set(worker.SIZES)
    assert len(sizes) == len(worker.SIZES) == 4 * 6 * 2
    assert worker.SIZES[0] == (16, 1000, 256, 256)
    absent = table.taking_part(entries, "cpu", None)[1]
    assert "GPU" in absent["pallas float32"]


# The supervisor


def child(tmp_path, text):
    """A worker that first says what it begins."""
    file, journal = tmp_path / "child.py", tmp_path / "now"
    begin = f"import sys, time, pathlib; now = pathlib.Path({str(journal)!r})\n"
    file.write_text(f"{begin}sys.path.insert(0, {str(ROOT)!r})\n{text}")
    return [sys.executable, str(file)], journal


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("now.write_text('a | b'); time.sleep(60)", 1, "nothing came back in 1 s"),
        ("now.write_text('a | b'); sys.exit(-9 % 256)", 247, "status 247"),
        (
            "from examples.benchmarks.gpu_watch import Journal\n"
            "j = Journal(now, {}); j.begin('a | b')\n"
            "j.judge(MemoryError('out of memory'))\n"
            "j.judge(RuntimeError('INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: bad'))",
            3,
            "CUDA_ERROR_ILLEGAL_ADDRESS",
        ),
    ],
)
def test_a_worker_that_hangs_or_dies(text, status, reason, tmp_path, load):
    command, journal = child(tmp_path, text)
    end = load("gpu_watch").watch(command, journal, patience=1.0, seconds=30.0)
    assert (end.status, end.key) == (status, "a | b")
    assert reason in end.reason


def test_a_worker_out_of_time_or_done(tmp_path, load):
    watch = load("gpu_watch").watch
    for text, seconds in (("now.write_text('a | b'); time.sleep(60)", 0.5), ("", 30.0)):
        command, journal = child(tmp_path, text)
        assert watch(command, journal, 20.0, seconds) == (0, "", "")


def test_the_next_worker_leaves_out_what_was_lost(tmp_path, load):
    module, state = load("gpu_watch"), tmp_path / "state.json"
    state.write_text(json.dumps({"lost": {}, "records": []}))
    ends = [module.End(1, "one | pallas", "hung"), module.End(3, "two | pallas", "broke")]
    ends.append(module.End(0))
    assert module.supervise(lambda: ends.pop(0), state) == 0
    lost = json.loads(state.read_text())["lost"]
    journal = module.Journal(tmp_path / "now", lost)
    with pytest.raises(module.LostError, match=r"^hung$"):
        journal.begin("one | pallas")
    with pytest.raises(module.LostError, match="left out after it was lost 2 times"):
        journal.begin("three | pallas")
    journal.begin("one | torch")
    assert module.supervise(lambda: module.End(2), state) == 2


def state_of(load, file, done, **values):
    """What a worker knows, with the time of one contestant at one size for each of some batches."""
    head = {"machine": {"gpu": "a GPU", "packages": {}}, "settings": {"seed": 1}, "absent": {}}
    head |= {"lost": {}, "done": done, "not_reached": []}
    records = [timed(load, "forward", 64, *who.split(), t) for who, t in values.items()]
    return load("gpu_worker").State(file, head, records)


def test_what_is_done_is_kept_and_not_done_again(load, tmp_path, monkeypatch):
    worker, ran = load("gpu_worker"), []
    clock = iter([0, 10, 20, 30, 32, 33, 34])  # a, c, d is not begun, e
    monkeypatch.setattr(worker.time, "monotonic", lambda: next(clock))

    def item(section, key):
        def call():
            ran.append(key)
            return [timed(load, "forward", 64, key, "float32", 1e-3)]

        return worker.Item(section, key, call)

    state = state_of(load, tmp_path / "state.json", ["b"], **{"old float32": 2e-3})
    items = [item("one", key) for key in "abcd"] + [item("two", "e")]
    worker.carry_out(state, iter(items), end=40.0)
    assert ran == ["a", "c", "e"]
    found = worker.State.read(state.file)
    assert found.head["done"] == ["b", "a", "c", "e"]
    assert found.head["not_reached"] == ["d"]
    assert [r.contestant for r in found.records] == ["old", "a", "c", "e"]
    assert [r.details for r in found.records] == [r.details for r in state.records]


def test_parts_are_joined(load, tmp_path):
    gpu, files = load("gpu"), [tmp_path / "one.json", tmp_path / "two.json"]
    one = state_of(load, files[0], ["a"], **{"pallas float32": 1.0, "nnx float32": 2.0})
    two = state_of(load, files[1], ["b"], **{"pallas float32": 3.0, "nnx bfloat16": 4.0})
    one.head["not_reached"] = ["b", "c"]
    for state in (one, two):
        state.write()
    both = gpu.merged(files)
    assert [r.value for r in both.records] == [3.0, 2.0, 4.0]
    assert (both.head["done"], both.head["not_reached"]) == (["a", "b"], ["c"])
    assert both.head["settings"] == [{"seed": 1}] * 2
    two.head["machine"]["gpu"] = "another"
    two.write()
    with pytest.raises(ValueError, match="must be of the same machine"):
        gpu.merged(files)


# What is reported


def timed(load, section, H, name, dtype, seconds, T=1000, B=16):
    """A record of a time, or of a failure where there is none."""
    size, records = load("problem").Size(B, T, H, H), load("records")
    mode = MODES[0] if name == "nnx" else MODES[2]
    if seconds is None:
        error = "ValueError: too wide"
        return records.Record(section, size, name, mode, dtype=dtype, error=error)
    details = {"us_per_step": seconds / T * 1e6}
    quartiles = (0.9 * seconds, 1.1 * seconds)
    return records.Record(
        section, size, name, mode, seconds, dtype=dtype, details=details, quartiles=quartiles
    )


def verdict(load, records, words):
    (one,) = [v for v in load("gpu_report").verdicts(records) if words in v.aim]
    return one


def test_verdicts_on_training(load):
    def all_at(H, ours):
        times = {"pallas": ours, "nnx": 6e-3, "torch": 1.5e-3, "torch TF32": 1.1e-3}
        return [timed(load, "training", H, name, "float32", t) for name, t in times.items()]

    fast, slow, wide = all_at(256, 1e-3), all_at(128, 1.15e-3), all_at(512, 1.0)
    assert verdict(load, fast + wide, "nnx's in float32").met
    assert verdict(load, fast + wide, "cuDNN's in float32").met
    assert verdict(load, fast + wide, "nnx's in bfloat16").met is None
    assert verdict(load, fast + slow, "nnx's in float32").met
    found = verdict(load, fast + slow, "cuDNN's in float32")
    assert not found.met
    assert "0.957 at 16,1000,128,128; 1 of 2" in str(found)
    failed = verdict(load, fast + all_at(64, None), "nnx's in float32")
    assert not failed.met
    assert "worst 0 at 16,1000,64,64" in failed.found


def test_verdicts_on_the_rest(load):
    quick = timed(load, "forward", 256, "pallas", "bfloat16", 1.4e-3)
    slow = timed(load, "forward", 256, "pallas", "float32", 1.6e-3)
    others = [timed(load, "forward", 256, "pallas", "float32", 1.0, B=64)]
    assert verdict(load, [quick, *others], "1.5 µs").met
    assert "1.6 float32" in verdict(load, [quick, slow], "1.5 µs").found
    assert not verdict(load, [quick, slow], "1.5 µs").met
    sweep = [timed(load, "sweep forward", 64, f"scan {u}", "float32", u / 1e3) for u in (1, 2)]
    for seconds, met in ((1.09e-3, True), (1.2e-3, False)):
        own = timed(load, "sweep forward", 64, "gru_jax", "float32", seconds)
        assert verdict(load, [*sweep, own], "best scan").met is met
    parallel = [
        timed(load, "parallel forward", 4, name, "float32", seconds, T=T)
        for name, seconds, T in (
            ("scan 8", 1.0, 10_000), ("parallel full", 0.09, 10_000), ("parallel full", 5.0, 1000),
        )
    ]  # fmt: skip
    assert verdict(load, parallel, "10 times the scan").met
    assert "11.1 at 16,10000,4,4; 1 of 1" in verdict(load, parallel, "10 times the scan").found


def check_record(load, dtype, value, unlike=0, error=None):
    size, record = load("problem").Size(1, 2, 3, 4), load("records").Record
    details = None if value is None else {"runs unlike the first": unlike}
    return record(
        "checks", size, "pallas", MODES[0], value, "plain", dtype=dtype, error=error,
        details=details,
    )  # fmt: skip


def test_verdicts_on_errors(load):
    good, bad = check_record(load, "bfloat16", 5e-3), check_record(load, "bfloat16", math.nan)
    refused = check_record(load, "bfloat16", None, error="ValueError: H")
    failed = check_record(load, "bfloat16", None, error="XlaRuntimeError: no")
    words = "0.01 in bfloat16"
    assert verdict(load, [good, refused], words).met
    assert "1 refused" in verdict(load, [good, refused], words).aim
    assert not verdict(load, [good, bad], words).met
    assert not verdict(load, [good, failed], words).met
    assert verdict(load, [check_record(load, "float32", 5e-3)], "0.001 in float32").met is False
    assert verdict(load, [good], "repeatable").met
    assert not verdict(load, [good, check_record(load, "float16", 0.0, 2)], "repeatable").met


def test_picture(load, tmp_path):
    picture = load("gpu_picture")
    records = [
        timed(load, section, H, name, "float32", H * 1e-5, B=B)
        for section in ("forward", "training")
        for H in (64, 128)
        for B in (1, 16)
        for name in ("pallas", "torch", "nnx")
    ]
    failed = [timed(load, "forward", 512, "pallas", "float32", None)]
    assert not picture.draw(failed, tmp_path / "none.png", "")
    assert picture.draw(records + failed, tmp_path / "some.png", "a GPU")
    assert (tmp_path / "some.png").stat().st_size > 10_000


# The whole


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no NVIDIA GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(load, capsys):
    parse = load("gpu").parse
    assert parse(["--part", "2/3"]).part == (2, 3)
    assert parse(["--device", "cpu", "--quick"]).rounds == 2
    wrong = (["--part", "0/3"], ["--part", "4/3"], ["--part", "a"], ["--device", "cpu"])
    for arguments in (*wrong, ["--sizes", "1,2,3"]):
        with pytest.raises(SystemExit):
            parse(arguments)
    assert "K/N" in capsys.readouterr().err


@pytest.mark.slow
def test_trial_on_a_cpu(tmp_path, load):
    peers = ["linen", *["torch"] * bool(importlib.util.find_spec("torch"))]
    contestants = ["gru_jax", "pallas", *peers]
    trial = ("--device", "cpu", "--quick", "--seed", 3, "--contestants", *contestants)
    done = run(*trial, "--only", "checks", "speed", "parallel", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    assert file.name.startswith("gpu-smoke-")
    result = json.loads(file.read_text())
    assert result["machine"]["packages"]["jax"]
    assert "GPU" in result["absent"]["pallas float32"]
    assert (result["lost"], result["not_reached"]) == ({}, [])
    assert len(result["done"]) == len(set(result["done"])) == 5 + 2
    records = result["records"]
    assert not [r["error"] for r in records if r["error"] and "parallel" not in r["section"]]
    sections = {"checks", "forward", "training", "parallel forward", "parallel training"}
    assert {r["section"] for r in records} == sections
    for section in ("forward", "training"):
        names = {(r["contestant"], r["dtype"]) for r in records if r["section"] == section}
        assert {name for name, _ in names} == {"gru_jax", *peers}
        assert ("gru_jax", "bfloat16") in names
    assert all(r["value"] < 1e-2 for r in records if r["section"] == "checks")
    assert "met: relative error" in done.stdout
