"""The examples, on small made-up recordings: the real ones are not needed to see them work."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def recordings(seed, count):
    """Nine speakers in turn, told apart by the mean of one channel."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 9
    lengths = rng.integers(7, 12, count)
    sequences = [
        (rng.normal(size=(length, 12)) + 3.0 * np.eye(12)[label]).astype("float32")
        for length, label in zip(lengths, labels, strict=True)
    ]
    return sequences, labels


@pytest.mark.slow
def test_japanese_vowels(monkeypatch, tmp_path):
    example = module("japanese_vowels")
    monkeypatch.setattr(example, "load", lambda: (recordings(0, 270), recordings(1, 45)))
    results = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for face in ("linen", "nnx"):
            picture = tmp_path / f"{face}.png"
            arguments = ["--face", face, "--epochs", "12", "--output", str(picture)]
            results[face] = example.main(arguments)
            assert picture.stat().st_size > 10_000
    for result in results.values():
        assert result["learnables"] == 34_809
        assert result["stream_agreement"] == 1.0
        assert result["confusion_matrix"].sum() == 45
        assert result["test_accuracy"] > 0.9  # of nine speakers, by chance 0.11
    assert results["linen"]["test_accuracies"] == results["nnx"]["test_accuracies"]


@pytest.mark.slow
def test_per_gate_training(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    example, picture = module("per_gate_training"), tmp_path / "picture.png"
    monkeypatch.setattr(example, "load", lambda: (recordings(0, 270), recordings(1, 45)))
    arguments = ["--hidden", "24", "--epochs", "25", "--seeds", "0-1", "--output", str(picture)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = example.main(arguments)
    assert picture.stat().st_size > 10_000
    before = results.pop("before")[:, -1]
    assert before.min() > 0.9  # of five speakers, by chance 0.2
    assert {
        name: (result["moved"] > 0).all(axis=0).tolist() for name, result in results.items()
    } == {
        "plain": [True, True, True],
        "slow": [True, True, True],
        "candidate only": [False, False, True],
        "update only": [False, True, False],
        "frozen": [False, False, False],
    }
    assert (results["frozen"]["moved"] == 0).all()
    assert (results["candidate only"]["moved"][:, :2] == 0).all()
    assert (results["slow"]["moved"] < 0.5 * results["plain"]["moved"]).all()
    assert (results["frozen"]["old"] == before[:, None]).all()  # nothing is forgotten
    assert results["plain"]["new"][:, -1].min() > 0.9


@pytest.mark.slow
def test_compress(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    example, picture = module("compress"), tmp_path / "picture.png"
    monkeypatch.setattr(example, "load", lambda: (recordings(0, 270), recordings(1, 45)))
    monkeypatch.setattr(example, "PAGES", {"input_projector_size": 9, "output_projector_size": 5})
    arguments = ["--quick", "--hidden", "40", "--seeds", "0", "--output", str(picture)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = example.main(arguments)
    assert picture.stat().st_size > 10_000
    assert example.units_for(34_809) == 100
    learnables = example.gru_jax.num_learnables(results["dense"][0].params)
    asked = {row.way: row.runs[0].info for row in results["rows"] if row.goal}
    assert asked.keys() == {"pca", "inputs dense", "sizes by loss", "output"}
    for info in asked.values():
        assert info.learnables[0] == learnables == 9 + 9 * 40 + 3 * 40 * (12 + 40 + 1)
        assert info.learnables_reduction >= example.GOALS[1]
    assert asked["inputs dense"].layers[0].sizes[1].input_projector_size is None
    assert {row.way for row in results["rows"] if not row.goal} == {"pca", "output"}
    (smaller,) = results["smaller"]
    assert smaller.learnables <= (1 - example.GOALS[1]) * learnables


@pytest.mark.slow
def test_from_torch(tmp_path):
    pytest.importorskip("torch")
    picture = tmp_path / "picture.png"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows = module("from_torch").main(["--quick", "--output", str(picture)])
    assert picture.stat().st_size > 10_000
    dense = [row for row in rows if "projected" not in row.name]
    small = [row for row in rows if "projected" in row.name]
    assert len(rows) == 2 * len(dense) - 1 in (5, 7)  # PyTorch's own is not projected
    assert max(row.difference for row in dense) < 2e-6
    assert max(row.loss for row in small) - min(row.loss for row in small) < 1e-6
    assert {row.learnables for row in dense} == {13_824}
    assert max(row.learnables for row in small) < 7_000
