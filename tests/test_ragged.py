"""Padding, buckets and chunks; truncated back-propagation against a cut made by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, as_dict, as_params, assert_close, random_params

import gru_jax
from gru_jax import ragged

RNG = np.random.default_rng(7)
SEQUENCES = [RNG.normal(size=(n, 3)).astype("float32") for n in (4, 7, 0, 5)]
MODES = (
    "after-multiplication",
    "before-multiplication",
    "recurrent-bias-after-multiplication",
)


# pad


@pytest.mark.parametrize("length", [None, 9])
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_pad_right(length, value):
    x, lengths = ragged.pad(SEQUENCES, length=length, value=value)
    assert x.shape == (4, length or 7, 3)
    assert (x.dtype, lengths.dtype) == (np.float32, np.int32)
    assert lengths.tolist() == [4, 7, 0, 5]
    for row, sequence in zip(x, SEQUENCES, strict=True):
        np.testing.assert_array_equal(row[: len(sequence)], sequence)
        assert (row[len(sequence) :] == value).all()


@pytest.mark.parametrize("length", [None, 9])
def test_pad_left(length):
    x, mask = ragged.pad(SEQUENCES, "left", length=length, value=3.0)
    assert mask.dtype == bool
    assert mask.sum(axis=1).tolist() == [4, 7, 0, 5]
    for row, kept, sequence in zip(x, mask, SEQUENCES, strict=True):
        np.testing.assert_array_equal(row[kept], sequence)
        assert (row[~kept] == 3.0).all()
        assert not np.diff(kept.astype(int)).min(initial=0) < 0  # the padding stands first


def test_padding_on_either_side_gives_the_same_states():
    params = as_params(random_params(RNG, 4, 3, MODES[0], dtype="float32"), MODES[0])
    x, lengths = ragged.pad(SEQUENCES, length=9, value=np.nan)
    _, right = gru_jax.gru(params, x, lengths=lengths)
    x, mask = ragged.pad(SEQUENCES, "left", length=9, value=np.nan)
    _, left = gru_jax.gru(params, x, mask=mask)
    alone = [
        gru_jax.gru(params, s[None])[1][0] if len(s) else jnp.zeros(4, "float32") for s in SEQUENCES
    ]
    for state in (left, right):
        np.testing.assert_allclose(state, jnp.stack(alone), rtol=0, atol=TOLERANCE["float32"])


def test_pad_keeps_types_and_further_axes():
    x, _ = ragged.pad([np.ones((2, 3, 4), "int8"), np.ones((5, 3, 4), "int8")])
    assert (x.shape, x.dtype, int(x.sum())) == ((2, 5, 3, 4), np.int8, 7 * 12)
    x, _ = ragged.pad(iter([np.arange(3.0), np.arange(2.0)]))
    assert x.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert ragged.pad([np.zeros((0, 3))])[0].shape == (1, 0, 3)


@pytest.mark.parametrize(
    ("arrays", "options", "error", "words"),
    [
        ([], {}, ValueError, "at least one sequence, got none"),
        ([np.ones((2, 3)), np.ones((2, 4))], {}, ValueError, r"\(2, 3\) first and \(2, 4\) at"),
        ([np.ones((2, 3)), np.ones(2)], {}, ValueError, r"index 1"),
        ([np.float64(1.0)], {}, ValueError, r"\(time, \*features\)"),
        ([np.ones(2), np.ones(2, "float32")], {}, ValueError, "float64 first and float32"),
        ([np.ones(5)], {"length": 4}, ValueError, "length must be at least 5.*got 4; .*chunks"),
        ([np.ones(5)], {"length": 5.5}, TypeError, "length must be a positive integer"),
        ([np.ones(5, int)], {"value": np.nan}, ValueError, "one that int64 can hold, got nan"),
        ([np.ones(5, int)], {"value": 0.5}, ValueError, "one that int64 can hold, got 0.5"),
        ([np.ones(5)], {"side": "top"}, ValueError, "side must be one of 'right', 'left', got"),
    ],
)
def test_pad_errors(arrays, options, error, words):
    with pytest.raises(error, match=words):
        ragged.pad(arrays, **options)


# buckets


def waste_of(lengths):
    steps = len(lengths) * max(lengths)
    return (steps - sum(lengths)) / steps if steps else 0.0


def fewest_batches(lengths, batch_size, max_waste):
    """By trying every way to cut the sorted lengths: (number of batches, padding)."""
    ordered, found = sorted(lengths), []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        batches, batch = [], [ordered[0]]
        for cut, length in zip(cuts, ordered[1:], strict=True):
            if cut:
                batches.append(batch)
                batch = []
            batch.append(length)
        batches.append(batch)
        if all(len(b) <= batch_size and waste_of(b) <= max_waste + 1e-12 for b in batches):
            padding = sum(len(b) * max(b) - sum(b) for b in batches)
            found.append((len(batches), padding))
    return min(found)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("max_waste", [0.0, 0.1, 0.3, 1.0])
def test_buckets_are_the_fewest_within_the_limits(batch_size, max_waste):
    for _ in range(5):
        lengths = RNG.integers(0, 12, 9)
        batches = ragged.buckets(lengths, batch_size, max_waste)
        assert sorted(np.concatenate(batches)) == list(range(9))
        chosen = [lengths[batch].tolist() for batch in batches]
        assert all(len(b) <= batch_size and waste_of(b) <= max_waste + 1e-12 for b in chosen)
        padding = sum(len(b) * max(b) - sum(b) for b in chosen)
        assert (len(chosen), padding) == fewest_batches(lengths, batch_size, max_waste)
        assert [max(b) for b in chosen] == sorted(max(b) for b in chosen)


def test_buckets_of_nothing_and_of_many():
    assert ragged.buckets([], 4) == []
    assert [b.tolist() for b in ragged.buckets([5, 5, 5], 2)] in ([[0], [1, 2]], [[0, 1], [2]])
    batches = ragged.buckets(RNG.integers(1, 1000, 5000), 64)
    assert sorted(np.concatenate(batches)) == list(range(5000))
    assert len(batches) <= 5000 // 64 + 20  # the short ones need batches of their own


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([3.0, 4.0], 2), TypeError, "lengths must be integers, got float64"),
        (([[3, 4]], 2), ValueError, "vector of nonnegative integers"),
        (([3, -4], 2), ValueError, "vector of nonnegative integers"),
        (([3, 4], 0), ValueError, "batch_size must be a positive integer, got 0"),
        (([3, 4], 2, 1.5), ValueError, "max_waste must be a nonnegative number of at most 1, got"),
        (([3, 4], 2, "no"), TypeError, "max_waste must be"),
    ],
)
def test_buckets_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        ragged.buckets(*arguments)


# chunks


@pytest.mark.parametrize("length", [1, 4, 5, 11, 20])
def test_chunks_are_the_sequence(length):
    x = RNG.normal(size=(2, 3, 11, 4))
    lengths = np.array([[11, 0, 4], [5, 10, 1]])
    pieces = ragged.chunks(x, length)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=-2), x)
    assert all(piece.shape[-2] == length for piece in pieces[:-1])
    pairs = ragged.chunks(x, length, lengths)
    for piece, (same, _) in zip(pieces, pairs, strict=True):
        np.testing.assert_array_equal(piece, same)
    np.testing.assert_array_equal(sum(true for _, true in pairs), lengths)
    assert len(ragged.chunks(x[..., :0, :], length)) == 0


@pytest.mark.parametrize("mode", MODES)
def test_chunks_give_the_outputs_of_one_run(mode):
    params = as_params(random_params(RNG, 4, 3, mode), mode)
    x, h0 = RNG.normal(size=(3, 11, 3)), RNG.normal(size=(3, 4))
    lengths = np.array([11, 2, 6])
    whole, final = gru_jax.gru(params, x, h0, lengths=lengths)
    outputs, hidden = [], h0
    for piece, steps in ragged.chunks(x, 4, lengths):
        y, hidden = gru_jax.gru(params, piece, hidden, lengths=steps)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=0, atol=1e-14)
    np.testing.assert_allclose(hidden, final, rtol=0, atol=1e-14)


def cell_loss(params, x, h0, lengths, borders):
    """Σ y² of single steps, the gradient cut before each border."""
    total, h = 0.0, h0
    for t in range(x.shape[1]):
        h = jax.lax.stop_gradient(h) if t in borders else h
        alive = (t < lengths)[:, None]
        h = jnp.where(alive, gru_jax.gru_cell(params, h, x[:, t]), h)
        total += jnp.sum(jnp.where(alive, h, 0.0) ** 2)
    return total


def chunk_loss(params, x, h0, lengths, length):
    total, hidden = 0.0, h0
    for piece, steps in ragged.chunks(x, length, lengths):
        y, hidden = gru_jax.gru(params, piece, jax.lax.stop_gradient(hidden), lengths=steps)
        total += jnp.sum(y**2)
    return total


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("mode", MODES)
def test_truncated_gradients(mode, dtype, compiled):
    params = as_params(random_params(RNG, 4, 3, mode, dtype=dtype), mode)
    x = jnp.asarray(RNG.normal(size=(3, 11, 3)), dtype)
    h0 = jnp.asarray(RNG.normal(size=(3, 4)), dtype)
    lengths = jnp.array([11, 2, 6])
    truncated = jax.grad(lambda p, x: chunk_loss(p, x, h0, lengths, 4), argnums=(0, 1))
    gradient, by_x = (jax.jit(truncated) if compiled else truncated)(params, x)
    by_hand = jax.jit(jax.grad(cell_loss, argnums=(0, 1)), static_argnums=4)
    expected, expected_by_x = by_hand(params, x, h0, lengths, (0, 4, 8))
    whole, _ = by_hand(params, x, h0, lengths, ())
    tolerance = {"float64": 1e-12, "float32": 1e-5}[dtype]
    assert_close(as_dict(gradient, x=by_x), as_dict(expected, x=expected_by_x), tolerance)
    with pytest.raises(AssertionError, match="errors above"):  # the cut is felt
        assert_close(as_dict(gradient), as_dict(whole), 1e-3)


def test_chunks_under_jit_compile_each_shape_once():
    lengths = jnp.array([9, 4])

    @jax.jit
    def total(x, lengths):
        return [(piece.sum(), steps) for piece, steps in ragged.chunks(x, 4, lengths)]

    x = RNG.normal(size=(2, 9, 3))
    sums, steps = zip(*total(x, lengths), strict=True)
    np.testing.assert_allclose(sum(sums), x.sum(), rtol=0, atol=1e-12)
    assert np.stack(steps).tolist() == [[4, 4], [4, 0], [1, 0]]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((np.ones(4), 2), ValueError, r"x must have axes \(\*batch, time, channels\), got"),
        ((np.ones((4, 2)), 0), ValueError, "length must be a positive integer, got 0"),
        ((np.ones((4, 2)), 2.5), TypeError, "length must be a positive integer, got 2.5"),
        ((np.ones((3, 4, 2)), 2, [1, 2]), ValueError, r"\(\*batch,\) = \(3,\), got \(2,\)"),
        ((np.ones((1, 4, 2)), 2, [5]), ValueError, r"lengths must lie in 0\.\.4"),
        ((np.ones((1, 4, 2)), 2, [2.0]), TypeError, "lengths must be integers, got float64"),
    ],
)
def test_chunks_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        ragged.chunks(*arguments)
