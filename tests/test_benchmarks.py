"""The benchmark, at a size where it only shows that it works and that all compute the same."""

import importlib
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from reference import MODES, gru_ref, gru_ref_grads

ROOT = pathlib.Path(__file__).parent.parent
SIZE = [2, 5, 3, 4]
PEERS = ("linen", "nnx", "torch", "onnxruntime")
PACKAGES = {"torch": ("torch",), "onnxruntime": ("onnx", "onnxruntime")}
INFERENCE = {"onnxruntime"}


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(f"examples.benchmarks.{name}")


def installed(peer):
    return all(importlib.util.find_spec(package) for package in PACKAGES.get(peer, ()))


@pytest.mark.parametrize("mode", MODES)
def test_answer_in_float64(mode, monkeypatch):
    problem = module("problem", monkeypatch)
    task = problem.draw(problem.Size(*SIZE), mode, seed=3)
    weights, answer = task.weights, problem.answer(task)
    recurrent = [weights.recurrent_bias] if mode.startswith("recurrent") else []
    params = {
        "input_weights": weights.W,
        "recurrent_weights": weights.R,
        "bias": np.concatenate([weights.bias, *recurrent]),
    }
    y, hidden = gru_ref(params, task.x, mode=mode)
    grads = gru_ref_grads(params, task.x, None, task.g, np.zeros_like(hidden), mode=mode)
    np.testing.assert_allclose(answer.y, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(answer.dx, grads["x"], rtol=1e-12, atol=1e-12)


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
    assert set(result["skipped"]) == set(peers) - there
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
def test_forward_and_training(tmp_path):
    records, said = run(tmp_path, PEERS, ["forward", "training", "accuracy"])
    (picture,) = tmp_path.glob("cpu-*-quick.png")
    assert picture.stat().st_size > 10_000
    assert "| 2, 5, 3, 4 |" in said
    ours = OURS | {(f"gru_jax {how}", MODES[0]) for how in ("checkpoint=1", "512-bit vectors")}
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
    records, _ = run(tmp_path, ["plain autodiff"], ["memory", "compile"])
    for found in records.values():
        assert names(found) >= OURS | {("plain autodiff", mode) for mode in MODES}
        assert all(math.isfinite(record["ratio_to_plain"]) for record in found)


@pytest.mark.slow
def test_streaming(tmp_path):
    records, _ = run(tmp_path, ["linen", "onnxruntime"], ["streaming"])
    assert names(records["streaming"]) >= OURS
    variants = {record["variant"] for record in records["streaming"]}
    assert variants == {"async dispatch on", "async dispatch off"}
