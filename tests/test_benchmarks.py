"""The benchmark, at a size where it only shows that it works and that all compute the same."""

import importlib
import importlib.util
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from reference import MODES, gru_ref, gru_ref_grads

import gru_jax

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
ROOT = pathlib.Path(__file__).parent.parent
SIZE = [2, 5, 3, 4]
IN_C = ("gru_jax as C", "gru_jax as C, loop in C")
SPECIAL = "hand-written reverse"
PEERS = (SPECIAL, "linen", "nnx", "torch", "onnxruntime")
PACKAGES = {"torch": ("torch",), "onnxruntime": ("onnx", "onnxruntime")}
INFERENCE = {"onnxruntime"}


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(f"examples.benchmarks.{name}")


def installed(peer):
    return all(importlib.util.find_spec(package) for package in PACKAGES.get(peer, ()))


def leaves_of(weights):
    """The parameters of a problem under the library's names."""
    recurrent = [weights.recurrent_bias] if weights.mode.startswith("recurrent") else []
    return {
        "input_weights": weights.W,
        "recurrent_weights": weights.R,
        "bias": np.concatenate([weights.bias, *recurrent]),
    }


def contestant(name, monkeypatch):
    return next(c for c in module("contestants", monkeypatch).CONTESTANTS if c.name == name)


@pytest.fixture
def relaxed():
    """The benchmark is no part of the library: it promotes as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("mode", MODES)
def test_answer_in_float64(mode, monkeypatch):
    problem = module("problem", monkeypatch)
    task = problem.draw(problem.Size(*SIZE), mode, seed=3)
    params, answer = leaves_of(task.weights), problem.answer(task)
    y, hidden = gru_ref(params, task.x, mode=mode)
    grads = gru_ref_grads(params, task.x, None, task.g, np.zeros_like(hidden), mode=mode)
    np.testing.assert_allclose(answer.y, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(answer.dx, grads["x"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [5, 2, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_hand_written_reverse_in_blocks(batch, steps, relaxed, monkeypatch):
    rule, problem = module("reverse_rule", monkeypatch), module("problem", monkeypatch)
    monkeypatch.setattr(rule, "FORWARD", 3 * batch * 4 * steps)
    monkeypatch.setattr(rule, "BACKWARD", 3 * batch * 4 * max(1, steps // 2))
    task = problem.draw(problem.Size(batch, 2 * steps, 3, 4), MODES[2], seed=5)
    x, g = (np.float64(a) for a in (task.x, task.g))
    leaves = {name: np.float64(leaf) for name, leaf in leaves_of(task.weights).items()}
    params = gru_jax.GRUParams(**leaves, reset_gate_mode=MODES[2])
    y, back = jax.vjp(jax.jit(rule.gru), params, x)
    right, hidden = gru_ref(leaves, x, mode=MODES[2])
    np.testing.assert_allclose(y, right, rtol=1e-12, atol=1e-12)
    expected = gru_ref_grads(leaves, x, None, g, np.zeros_like(hidden), mode=MODES[2])
    d_params, d_x = back(g)
    for name, got in {"x": d_x, **d_params.arrays()}.items():
        np.testing.assert_allclose(got, expected[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["gru_jax", *IN_C, "torch cell"])
def test_streams_feed_the_state_back(name, relaxed, monkeypatch):
    one, problem = contestant(name, monkeypatch), module("problem", monkeypatch)
    if one.why_absent("cpu"):
        pytest.skip(one.why_absent("cpu"))
    task = problem.draw(problem.Size(1, 3 * one.steps, 3, 4), one.mode, seed=7)
    task.x[:] = task.x[:, :1]
    call = one.made(task.weights, "cpu").stream(task.x[0, :1])
    right = problem.answer(task).y[:, one.steps - 1 :: one.steps]
    for t in range(3):
        np.testing.assert_allclose(np.asarray(call()), right[:, t], rtol=0, atol=5e-7)


@needs_cc
def test_c_runs_whole_sequences(monkeypatch):
    one, problem = contestant("gru_jax as C", monkeypatch), module("problem", monkeypatch)
    assert one.sequences(problem.Size(1, 5, 3, 4))
    assert not one.sequences(problem.Size(*SIZE))
    task = problem.draw(problem.Size(*SIZE), one.mode, seed=9)
    runner = one.made(task.weights, "cpu").bind(task)
    for _ in range(2):  # each time from the zero state
        np.testing.assert_allclose(runner.forward(), problem.answer(task).y, rtol=0, atol=5e-7)
    assert runner.train is None


def test_only_one_contestant_is_spread_over_the_cores(monkeypatch, relaxed):
    runners, problem = module("runners", monkeypatch), module("problem", monkeypatch)
    grus = module("jax_grus", monkeypatch)
    monkeypatch.setattr(grus, "CORES", 2)
    task = problem.draw(problem.Size(4, 5, 3, 4), MODES[0], seed=11)
    answer = problem.answer(task)
    for build, devices in ((grus.ours, 1), (grus.over_cores, 2), (grus.plain, 1)):
        gru = build(task.weights)
        params, x, _ = gru.place((gru.params, task.x, task.g))
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves((params, x))} == {devices}
        assert x.addressable_shards[0].data.shape[0] == 4 // devices
        runner = gru.bind(task)
        for got, right in ((runner.forward(), answer.y), (runner.train(), answer.dx)):
            assert len(got.sharding.device_set) == devices
            assert got.addressable_shards[0].data.shape[0] == 4 // devices
            np.testing.assert_allclose(runner.numpy(got), right, rtol=0, atol=5e-6)
    one = contestant("gru_jax, batch over the cores", monkeypatch)
    assert one.sequences(problem.Size(3 * runners.CORES, 5, 3, 4))
    assert runners.CORES == 1 or not one.sequences(problem.Size(3 * runners.CORES - 1, 5, 3, 4))
    assert one.why_absent("gpu")


def test_special_rule_is_no_peer(tmp_path, monkeypatch):
    records, report = module("records", monkeypatch), module("report", monkeypatch)
    times = {"gru_jax": 3.0, SPECIAL: 2.0, "gru_jax, batch over the cores": 1.0, "linen": 6.0}
    found = [records.Record("training", SIZE, name, MODES[2], value=t) for name, t in times.items()]
    records.fill_ratios(found)
    assert report.summary(found) == {
        "training: best JAX peer / gru_jax, geometric mean": 2.0,
        "training: general rule / special rule, per size": {"2,5,3,4": 1.5},
    }
    picture = module("picture", monkeypatch)
    assert not picture.draw(found[:3], tmp_path / "none.png", "")
    assert picture.draw(found, tmp_path / "linen.png", "")


def test_parts_of_a_call(monkeypatch):
    assert module("measure", monkeypatch).Timing((2.0, 3.0)).per(4) == ((0.5, 0.75),)


def test_rounds_go_on_without_what_fails(monkeypatch):
    measure = module("measure", monkeypatch)
    monkeypatch.setattr(measure, "VISIT_SECONDS", 0.0)
    order, rng = [], np.random.default_rng(0)
    calls = {name: lambda name=name: order.append(name) for name in "abcdefgh"}
    timings, failed = measure.shuffled(calls | {"bad": lambda: 1 / 0}, 4, rng)
    assert set(timings) == set(calls)
    assert isinstance(failed["bad"], ZeroDivisionError)
    visits = np.reshape(order, (4, len(calls), 1 + measure.VISIT_CALLS))
    assert (visits == visits[..., :1]).all()
    assert all(sorted(one) == list(calls) for one in visits[..., 0])
    assert len({tuple(one) for one in visits[..., 0]}) == 4
    assert all(len(timing.rounds) == 4 and timing.median > 0 for timing in timings.values())


def test_sizes_are_checked(monkeypatch, capsys):
    main = module("__main__", monkeypatch)
    assert main.parse(["--sizes", "1,2,3,4"]).sizes == [(1, 2, 3, 4)]
    assert len(main.parse([]).sizes) == 7
    for wrong in ("1,2,3", "1,2,3,0", "1,2,3,x"):
        with pytest.raises(SystemExit):
            main.parse(["--sizes", wrong])
    assert "B,T,I,H" in capsys.readouterr().err


def run(tmp_path, peers, sections):
    """Runs the benchmark in a process of its own; returns its JSON by section, and what it said."""
    command = [sys.executable, "-m", "examples.benchmarks", "--quick", "--rounds", "1"]
    command += ["--sizes", ",".join(map(str, SIZE)), "--peers", *peers, "--only", *sections]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (file,) = tmp_path.glob("cpu-*-quick.json")
    result, records = json.loads(file.read_text()), {}
    assert result.keys() == {
        "machine", "settings", "skipped", "product_rate", "summary", "records",
    }  # fmt: skip
    assert result["machine"]["packages"]["jax"]
    assert result["product_rate"] > 1e8
    there = {peer for peer in peers if installed(peer)}
    assert {name for name in result["skipped"] if name in peers} == set(peers) - there
    for record in result["records"]:
        assert record["error"] is None
        if record["section"] == "accuracy":
            assert record["value"] < 1e-5, record
        else:
            assert math.isfinite(record["ratio"])
            assert record["ratio"] > 0
        records.setdefault(record["section"], []).append(record)
    assert records.keys() == set(sections)
    return records, done.stdout


def names(records):
    return {(r["contestant"], r["mode"]) for r in records}


OURS = {("gru_jax", mode) for mode in MODES}


@pytest.mark.slow
def test_forward_and_training(tmp_path, monkeypatch):
    records, said = run(tmp_path, PEERS, ["forward", "training", "accuracy"])
    (picture,) = tmp_path.glob("cpu-*-quick.png")
    assert picture.stat().st_size > 10_000
    assert "| 2, 5, 3, 4 |" in said
    ours = OURS | {(f"gru_jax {how}", MODES[0]) for how in ("checkpoint=1", "512-bit vectors")}
    if (cores := module("runners", monkeypatch).CORES) > 1 and SIZE[0] % cores == 0:
        ours |= {("gru_jax, batch over the cores", MODES[0])}
    there = {peer for peer in PEERS if installed(peer)}
    for section, found in records.items():
        expected = there - INFERENCE if section == "training" else there
        assert names(found) >= ours
        assert {peer for peer, _ in names(found) - ours} == expected
        for record in found:
            assert record["size"] == SIZE
            if section == "accuracy":
                continue
            low, high = record["quartiles"]
            assert low <= record["value"] <= high
            assert len(record["rounds"]) == 1
            assert record["floor_fraction"] > 0


@pytest.mark.slow
def test_memory_and_compile_time(tmp_path):
    records, _ = run(tmp_path, ["plain autodiff", SPECIAL], ["memory", "compile"])
    others = {(SPECIAL, MODES[2])} | {("plain autodiff", mode) for mode in MODES}
    for found in records.values():
        assert names(found) >= OURS | others
        assert not any("cores" in name or " C" in name for name, _ in names(found))
        assert all(math.isfinite(record["ratio_to_plain"]) for record in found)


@pytest.mark.slow
def test_streaming(tmp_path):
    records, _ = run(tmp_path, ["linen", "onnxruntime"], ["streaming"])
    in_c = {(name, MODES[2]) for name in IN_C if shutil.which("cc")}
    assert names(records["streaming"]) >= OURS | in_c
    assert {record["size"][3] for record in records["streaming"]} == {32}
    variants = {record["variant"] for record in records["streaming"]}
    assert variants == {"async dispatch on", "async dispatch off"}


@pytest.mark.parametrize(("file", "rows", "label"), [("cpu", 7, ""), ("single-cpu", 1, "later: ")])
def test_the_readme_shows_the_stored_tables(file, rows, label, monkeypatch):
    report, records = module("report", monkeypatch), module("records", monkeypatch)
    stored = ROOT / "examples" / "benchmarks" / "results" / f"{file}-amd-epyc.json"
    found = [records.Record(**record) for record in json.loads(stored.read_text())["records"]]
    for record in found:
        record.size = tuple(record.size)
    lines = [line for line in report.markdown(found).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + rows
    shown = "\n".join(line.replace("| ", f"| {label}", 1) for line in lines[2:])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert shown in readme
    assert "\n".join(lines[:2]) in readme
