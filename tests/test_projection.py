"""Projection of parameters, against one SVD of all states that plain loops give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_dict, as_params, assert_close, random_params, relative_error
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import MODES, arrays, plan, step

import gru_jax
from gru_jax import projection
from gru_jax._activity import DRAWS
from gru_jax._subspaces import DAMPING

H, I, B, T = 6, 4, 6, 7  # noqa: E741
AFTER, BEFORE, RECURRENT_BIAS = MODES
RNG = np.random.default_rng(3)
X = RNG.normal(size=(B, T, I)) @ RNG.normal(size=(I, I)) + RNG.normal(size=I)
LENGTHS = np.array([T, 3, 1, 5, 0, 2])
NAMES = ("input_projector_size", "output_projector_size")
LEFT = np.arange(T) >= T - LENGTHS[:, None]


def params_of(mode=AFTER, seed=0, dtype="float64", sizes=(), width=I):
    rng = np.random.default_rng(seed)
    return as_params(random_params(rng, H, width, mode, *sizes, dtype=dtype), mode)


def trace(params, x, lengths=None, mask=None, h0=None, reverse=False):
    """(x_t, h_t, h_{t-1}, r_t) of all steps that count, one below the other, by plain loops."""
    leaves, rows = as_dict(params), []
    x, h0 = arrays(leaves, x, h0)
    for b in np.ndindex(*x.shape[:-2]):
        h = h0[b]
        for t, _ in plan(b, x.shape[-2], lengths, mask, None, reverse):
            new, saved = step(leaves, h, x[b][t], params.reset_gate_mode)
            rows.append((x[b][t], new, h, saved.r))
            h = new
    return [np.stack(column) for column in zip(*rows, strict=True)]


def analysis(mode=AFTER, x=X, key=None, **options):
    params = params_of(mode, **options)
    return params, projection.neuron_pca(params, [x], key=key)


def principal(rows):
    """(eigenvalues, directions) of the centred rows."""
    _, singular, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return singular**2 / len(rows), directions.T


def assert_same(one, two, tolerance=1e-12):
    """Two analyses, up to rounding."""
    assert (one.observations, one.longest) == (two.observations, two.longest)
    for name in ("inputs", "states", "before"):
        a, b = getattr(one, name), getattr(two, name)
        assert a.count == b.count
        np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=tolerance)
        np.testing.assert_allclose(a.covariance, b.covariance, rtol=0, atol=tolerance)
    np.testing.assert_allclose(one.gated, two.gated, rtol=0, atol=tolerance)


def run(params, x=X):
    return gru_jax.gru(params, x)[0]


def with_nan(x, kept):
    return np.where(kept[..., None], x, np.nan)


# The analysis


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["plain", "lengths", "mask", "axes", "single"])
def test_analysis_is_one_svd(kind, mode):
    params, shift = params_of(mode), 1e3 if kind == "plain" else 0.0
    x, options = X + shift, {}
    params = params.replace(input_weights=params.input_weights / (shift or 1.0))
    batches = [x]
    if kind == "lengths":
        options, kept = {"lengths": LENGTHS}, np.arange(T) < LENGTHS[:, None]
        batches = [(with_nan(x, kept), LENGTHS)]
    elif kind == "mask":
        options, batches = {"mask": LEFT}, [(with_nan(x, LEFT), jnp.asarray(LEFT))]
    elif kind == "axes":
        batches = [x.reshape(2, 3, T, I)]
    elif kind == "single":
        batches = iter(x)  # sequences without a batch axis
    pca = projection.neuron_pca(params, batches)
    rows = trace(params, x, **options)
    for moments, values in zip((pca.inputs, pca.states, pca.before), rows, strict=False):
        assert moments.count == len(values)
        eigenvalues, directions = principal(values)
        scale = eigenvalues[0]
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.eigenvalues / scale, eigenvalues / scale, atol=1e-10)
        rebuilt = directions * eigenvalues @ directions.T
        np.testing.assert_allclose(moments.covariance, rebuilt, rtol=0, atol=1e-10 * scale)
        curve = np.cumsum(eigenvalues) / eigenvalues.sum()
        np.testing.assert_allclose(moments.explained_variance, curve, rtol=0, atol=1e-10)
    gated = np.mean(rows[3][:, :, None] * rows[2][:, None, :], axis=0)
    np.testing.assert_allclose(pca.gated, gated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_analysis_backward_in_time_and_from_a_state(mode):
    params, h0 = params_of(mode), np.linspace(-1, 1, H)
    pca = projection.neuron_pca(params, [(X, LENGTHS)], h0=h0, reverse=True)
    *columns, r = trace(params, X, LENGTHS, h0=np.tile(h0, (B, 1)), reverse=True)
    for moments, values in zip((pca.inputs, pca.states, pca.before), columns, strict=True):
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=0, atol=1e-12)
        covariance = np.cov(values.T, bias=True)
        np.testing.assert_allclose(moments.covariance, covariance, rtol=0, atol=1e-12)
    gated = np.mean(r[:, :, None] * columns[2][:, None, :], axis=0)
    np.testing.assert_allclose(pca.gated, gated, rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="reverse must be True or False"):
        projection.neuron_pca(params, [X], reverse="yes")


@pytest.mark.parametrize(
    "parts", [[[0, 1, 2, 3, 4, 5]], [[5, 4], [3, 2, 1, 0]], [[2], [0], [1], [5], [3], [4]]]
)
def test_any_split_in_any_order(parts):
    params, whole = analysis()
    pieces = [X[part] for part in parts]
    assert_same(projection.neuron_pca(params, iter(pieces)), whole)
    flags = [(X[part], np.full(len(part), T)) for part in parts]
    assert_same(projection.neuron_pca(params, flags), whole)


def test_parts_merge():
    params, whole = analysis()
    low, high = (projection.neuron_pca(params, [x]) for x in (X[:2], X[2:]))
    assert_same(low + high, whole)
    assert_same(high + low, whole)
    sizes = {"input_projector_size": 2, "output_projector_size": 3}
    small, _ = projection.project(params, low + high, **sizes)
    expected, _ = projection.project(params, whole, **sizes)
    dense = (projection.unproject(one) for one in (small, expected))
    assert_close(*(as_dict(one) for one in dense), 1e-11)


@pytest.mark.parametrize("sharded", [False, True])
def test_batches_from_several_devices(sharded):
    params, whole = analysis()
    devices = jax.devices()[:2]
    batches = [jax.device_put(x, d) for x, d in zip(np.split(X, 2), devices, strict=True)]
    if sharded:
        mesh = Mesh(np.array(devices), ("data",))
        batches = [jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))]
    assert_same(projection.neuron_pca(params, batches), whole)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], ValueError, "at least one batch, got none"),
        (
            [X[:1]],
            ValueError,
            "two sequences and two time steps, got sequences: 1, steps of the longest: 7",
        ),
        (
            [X[:, :1], X[:, :1]],
            ValueError,
            "two sequences and two time steps, got sequences: 12, steps of the longest: 1",
        ),
        ([(X, [1, 1, 0, 0, 0, 1])], ValueError, "two sequences and two time steps"),
        ([np.where(np.arange(I) == 2, 0.1, X)], ValueError, r"constant in channels \[2\]"),
        ([X, np.where(X > 1, np.nan, X)], ValueError, "x must be finite, got NaN"),
        ([X[..., :2]], ValueError, "input_size = 4 channels"),
        ([(X, LENGTHS / 1.0)], TypeError, "lengths must be integers"),
        ([(X, LENGTHS[:2])], ValueError, r"lengths must have shape"),
        ([(X, LENGTHS, None)], ValueError, "x, .x, lengths. or .x, mask., got 3 parts"),
        ([X > 0], TypeError, "x must be of a floating-point type"),
    ],
)
def test_analysis_errors(batches, error, words):
    with pytest.raises(error, match=words):
        projection.neuron_pca(params_of(), batches)


def test_empty_batches_count_for_nothing():
    params, whole = analysis()
    assert_same(projection.neuron_pca(params, [X[:, :0][:0], X]), whole)
    pca = projection.neuron_pca(params, [X, X[:2, :0]])
    assert (pca.inputs.count, pca.longest) == (whole.inputs.count, T)
    with pytest.raises(ValueError, match="two sequences"):
        projection.neuron_pca(params, [(X, [T, 0, 0, 0, 0, 0])])


def test_states_that_never_vary():
    params = jax.tree.map(jnp.zeros_like, params_of())
    small, info = projection.project(params, projection.neuron_pca(params, [X]))
    assert info.layers[0].output_explained_variance == 1.0
    np.testing.assert_array_equal(run(small), np.zeros((B, T, H)))


def test_analyses_that_do_not_merge():
    _, pca = analysis()
    _, other = analysis(BEFORE)
    with pytest.raises(ValueError, match="reset modes differ"):
        pca + other
    _, keyed = analysis(key=jax.random.key(0))
    with pytest.raises(ValueError, match="only one of the two analyses was made with a key"):
        pca + keyed
    _, narrow = analysis(x=X[..., :1], width=1)
    with pytest.raises(ValueError, match="must be of the same GRU"):
        pca + narrow


# What the projected parameters compute


@pytest.mark.parametrize("method", ["pca", "output"])
@pytest.mark.parametrize("mode", MODES)
def test_full_rank_is_the_dense_layer(mode, method):
    params, pca = analysis(mode, key=jax.random.key(0))
    sizes = {"input_projector_size": I, "output_projector_size": H}
    full, info = projection.project(params, pca, **sizes, method=method)
    assert full.input_projector.shape == (I, I)
    assert full.output_projector.shape == (H, H)
    assert info.learnables_reduction < 0
    np.testing.assert_allclose(run(full), run(params), rtol=0, atol=1e-12)
    new = np.random.default_rng(9).normal(size=X.shape)
    np.testing.assert_allclose(run(full, new), run(params, new), rtol=0, atol=1e-11)
    assert_close(as_dict(projection.unproject(full)), as_dict(params), 1e-11)


@pytest.mark.parametrize("method", ["pca", "output"])
@pytest.mark.parametrize("mode", MODES)
def test_exact_where_the_data_span_less(mode, method):
    """Inputs in an affine plane; each hidden unit beside its copy."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, T, 2)) @ rng.normal(size=(2, I)) + rng.normal(size=I)
    leaves = random_params(rng, H, I, mode)
    for name in ("input_weights", "recurrent_weights", "bias"):
        gates = leaves[name].reshape(-1, H, *leaves[name].shape[1:])
        gates[:, 3:] = gates[:, :3]
    params = as_params(leaves, mode)
    pca = projection.neuron_pca(params, [x], key=jax.random.key(0))
    small, info = projection.project(params, pca, 1 - 1e-9, method=method)
    assert info.layers[0].sizes[1][1:4] == (I, 2, 3)
    assert method == "output" or info.explained_variance == pytest.approx(1.0, abs=1e-9)
    np.testing.assert_allclose(run(small, x), run(params, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("mode", MODES)
def test_what_becomes_of_the_mean(mode, lengths):
    params = params_of(mode)
    pca = projection.neuron_pca(params, [X if lengths is None else (X, lengths)])
    sizes = {"input_projector_size": 2, "output_projector_size": 3}
    small, _ = projection.project(params, pca, **sizes)
    x, _, before, r = trace(params, X, lengths)
    dense, cut = as_dict(params), as_dict(projection.unproject(small))
    by_input = (dense["input_weights"] - cut["input_weights"]) @ x.mean(0)
    gap = np.asarray(dense["recurrent_weights"] - cut["recurrent_weights"])
    by_state = gap @ before.mean(0)
    if mode == AFTER:
        by_state[2 * H :] = np.mean(r * (before @ gap[2 * H :].T), axis=0)
    elif mode == BEFORE:
        by_state[2 * H :] = gap[2 * H :] @ np.mean(r * before, axis=0)
    assert np.abs(by_input).max() > 1e-3 < np.abs(by_state).max()
    parts = np.append(by_input, by_state) if mode == RECURRENT_BIAS else by_input + by_state
    np.testing.assert_allclose(small.bias - params.bias, parts, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_pass_the_projectors(mode):
    params, pca = analysis(mode)
    small, _ = projection.project(params, pca, input_projector_size=2, output_projector_size=3)
    weights = jnp.asarray(RNG.normal(size=(B, T, H)))

    def loss(params):
        return jnp.sum(weights * run(params))

    found, dense = jax.grad(loss)(small), jax.grad(loss)(projection.unproject(small))
    dW, dR = dense.input_weights, dense.recurrent_weights
    expected = {
        "input_weights": dW @ small.input_projector,
        "recurrent_weights": dR @ small.output_projector,
        "bias": dense.bias,
        "input_projector": dW.T @ small.input_weights,
        "output_projector": dR.T @ small.recurrent_weights,
    }
    assert_close(as_dict(found), expected, 1e-11)


@pytest.mark.parametrize("sizes", [(2, 3), (2, None), (None, 3), ()])
@pytest.mark.parametrize("mode", MODES)
def test_unproject_and_project_again(mode, sizes):
    params = params_of(mode, sizes=sizes)
    dense = projection.unproject(params)
    assert list(dense.arrays()) == ["input_weights", "recurrent_weights", "bias"]
    np.testing.assert_allclose(run(dense), run(params), rtol=0, atol=1e-12)
    if not sizes:
        return
    pca = projection.neuron_pca(params, [X])
    with pytest.raises(ValueError, match="must be dense, but has projectors: unproject it first"):
        projection.project(params, pca)
    assert_same(pca, projection.neuron_pca(dense, [X]))
    again, _ = projection.project(dense, pca, input_projector_size=I, output_projector_size=H)
    np.testing.assert_allclose(run(again), run(params), rtol=0, atol=1e-12)


def test_types_are_kept():
    params = params_of(dtype="float32")
    before = {name: np.array(leaf) for name, leaf in params.arrays().items()}
    pca = projection.neuron_pca(params, [X.astype("float32")])
    small, _ = projection.project(params, pca, input_projector_size=I, output_projector_size=H)
    assert {leaf.dtype for leaf in small.arrays().values()} == {jnp.float32.dtype}
    assert pca.states.covariance.dtype == np.float64
    x = X.astype("float32")
    np.testing.assert_allclose(run(small, x), run(params, x), rtol=0, atol=1e-5)
    for name, leaf in params.arrays().items():
        np.testing.assert_array_equal(leaf, before[name])


def test_float64_of_numpy_without_x64():
    params, x = jax.tree.map(np.asarray, params_of()), X.astype("float32")
    with jax.enable_x64(False):
        small, _ = projection.project(params, projection.neuron_pca(params, [x]), 0.9)
        single = jax.tree.map(lambda a: jnp.asarray(a, "float32"), params)
        expected, _ = projection.project(single, projection.neuron_pca(single, [x]), 0.9)
    assert {leaf.dtype for leaf in small.arrays().values()} == {jnp.float32.dtype}
    assert_close(as_dict(small), as_dict(expected), 1e-5)


# Sizes and the record


def learnables(P_i, P_o):
    """Counted by hand, without recurrent bias; None for dense."""
    by_input = (3 * H + I) * P_i if P_i else 3 * H * I
    return by_input + (4 * H * P_o if P_o else 3 * H * H) + 3 * H


def sizes_at(goal, curves):
    """The smallest sizes that explain so much, None where they would not be smaller."""
    P_i, P_o = (next(k + 1 for k in range(99) if curve[k] >= goal - 1e-12) for curve in curves)
    P_i = P_i if (3 * H + I) * P_i < 3 * H * I else None
    return P_i, P_o if 4 * H * P_o < 3 * H * H else None


@pytest.mark.parametrize("goal", [None, 0.05, 0.5, 0.8, 0.9, 0.99, 0.9999])
def test_variance_goal(goal):
    params, pca = analysis()
    curves = [np.cumsum(principal(rows)[0]) for rows in trace(params, X)[:2]]
    curves = [curve / curve[-1] for curve in curves]
    small, info = projection.project(params, pca, goal)
    P_i, P_o = sizes_at(goal or 0.95, curves)
    (layer,) = info.layers
    assert layer.sizes[1][2:4] == (P_i, P_o)
    names = [n for n, k in (("input_projector", P_i), ("output_projector", P_o)) if k is None]
    assert layer.kept_dense == tuple(names)
    assert info.layer_names == (() if len(names) == 2 else ("",))
    after = learnables(P_i, P_o)
    assert after == gru_jax.num_learnables(small) <= learnables(None, None)
    assert layer.learnables == info.learnables == (learnables(None, None), after)
    assert info.learnables_reduction == 1 - after / learnables(None, None)
    shares = [curve[k - 1] if k else 1.0 for curve, k in zip(curves, (P_i, P_o), strict=True)]
    found = (layer.input_explained_variance, layer.output_explained_variance)
    np.testing.assert_allclose(found, shares, rtol=0, atol=1e-10)
    assert info.explained_variance == layer.explained_variance == min(found)


@pytest.mark.parametrize("mode", MODES)
def test_operations_of_a_step(mode):
    params, pca = analysis(mode)
    _, info = projection.project(params, pca, input_projector_size=2, output_projector_size=3)
    products = [(3 * H, 2), (2, I), (3 * H, 3), (3, H)] + [(3, H)] * (mode == BEFORE)
    after = sum(rows * (2 * columns) for rows, columns in products)
    assert info.layers[0].operations == (2 * (3 * H * I + 3 * H * H), after)


@pytest.mark.parametrize("goal", [0.01, 0.1, 0.2, 0.35, 0.5, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_reduction_goal_is_the_tightest_bound(goal, seed):
    params, pca = analysis(seed=seed)
    curves = [moments.explained_variance for moments in (pca.inputs, pca.states)]
    thresholds = np.unique(np.concatenate([*curves, np.linspace(0, 1, 200)]))
    tried = [sizes_at(threshold, curves) for threshold in thresholds]
    saved = [1 - learnables(*sizes) / learnables(None, None) for sizes in tried]
    best = max(n for n, reduction in enumerate(saved) if reduction >= goal)
    small, info = projection.project(params, pca, learnables_reduction_goal=goal)
    assert info.layers[0].sizes[1][2:4] == tried[best]
    assert info.learnables_reduction >= goal
    assert gru_jax.num_learnables(small) <= (1 - goal) * gru_jax.num_learnables(params)


@pytest.mark.parametrize("sizes", [(None, 3), (I, H), ("auto", 2.0), (None, None), (1, "auto")])
def test_given_sizes(sizes):
    params, pca = analysis()
    _, info = projection.project(params, pca, 0.8, **dict(zip(NAMES, sizes, strict=True)))
    free = projection.project(params, pca, 0.8)[1].layers[0].sizes[1][2:4]
    wanted = tuple(f if k == "auto" else k for k, f in zip(sizes, free, strict=True))
    assert info.layers[0].sizes[1][2:4] == wanted


@pytest.mark.parametrize(
    "given", [{}, {"input_projector_size": None}, {"output_projector_size": 2}]
)
@pytest.mark.parametrize("goal", [0.05, 0.3])
def test_sizes_of_the_smallest_loss(goal, given):
    params, pca = analysis()
    expected, before = run(params), learnables(None, None)

    def loss(dense):
        assert dense.input_projector is None
        return float(jnp.mean((run(dense) - expected) ** 2))

    first, second = ([given[name]] if name in given else None for name in NAMES)
    losses = {}
    for P_i in first or (1, 2, 3, None):
        choices = second or (None, 6, 5, 4, 3, 2, 1)
        allowed = [P_o for P_o in choices if 1 - learnables(P_i, P_o) / before >= goal]
        if allowed:
            sizes = dict(zip(NAMES, (P_i, allowed[0]), strict=True))
            small, _ = projection.project(params, pca, **sizes)
            losses[P_i, allowed[0]] = loss(projection.unproject(small))
    assert len(losses) > 1 or given
    chosen, info = projection.project(
        params, pca, learnables_reduction_goal=goal, loss=loss, **given
    )
    assert info.layers[0].sizes[1][2:4] == min(losses, key=losses.get)
    assert info.learnables_reduction >= goal
    assert loss(projection.unproject(chosen)) == pytest.approx(min(losses.values()))


def test_the_loss_chooses_no_projector_that_grows():
    params = params_of(width=12)
    pca = projection.neuron_pca(params, [RNG.normal(size=(B, T, 12))])

    def loss(dense):
        return abs(np.linalg.matrix_rank(dense.input_weights) - 11)  # (3H + I) 11 > 3H I

    _, info = projection.project(params, pca, learnables_reduction_goal=0.01, loss=loss)
    P_i = info.layers[0].sizes[1].input_projector_size
    assert P_i is None or (3 * H + 12) * P_i < 3 * H * 12


def test_nan_is_no_loss():
    params, pca = analysis()
    goal = {"learnables_reduction_goal": 0.1}
    with pytest.raises(ValueError, match="loss must be finite, got nan"):
        projection.project(params, pca, **goal, loss=lambda dense: np.nan)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"explained_variance_goal": 0}, ValueError, "must lie between 0 and 1, both excluded"),
        ({"explained_variance_goal": 1.0}, ValueError, "must lie between 0 and 1, both excluded"),
        ({"explained_variance_goal": 95}, ValueError, "explained_variance_goal must"),
        ({"explained_variance_goal": float("nan")}, ValueError, "explained_variance_goal must"),
        ({"explained_variance_goal": "high"}, TypeError, "explained_variance_goal must"),
        ({"learnables_reduction_goal": 1}, ValueError, "learnables_reduction_goal must lie"),
        ({"learnables_reduction_goal": -0.1}, ValueError, "learnables_reduction_goal must"),
        (
            {"explained_variance_goal": 0.9, "learnables_reduction_goal": 0.5},
            ValueError,
            "not both of them",
        ),
        ({"learnables_reduction_goal": 0.75}, ValueError, "0.75 cannot be reached.* save 0.6768"),
        ({"input_projector_size": I + 1}, ValueError, "must be at most 4, got 5"),
        ({"output_projector_size": H + 1}, ValueError, "must be at most 6, got 7"),
        ({"output_projector_size": 0}, ValueError, "positive integer, got 0"),
        ({"input_projector_size": "all"}, TypeError, "positive integer, got 'all'"),
        ({"method": "svd"}, ValueError, "method must be one of 'pca', 'output'"),
        ({"method": "output"}, ValueError, "pass key="),
        ({"loss": len}, ValueError, "learnables_reduction_goal: give one"),
    ],
)
def test_errors(options, error, words):
    params, pca = analysis()
    with pytest.raises(error, match=words):
        projection.project(params, pca, **options)


@pytest.mark.parametrize("other", [{"seed": 0, "width": 3}, {"mode": BEFORE}])
def test_an_analysis_of_another_gru(other):
    _, pca = analysis()
    with pytest.raises(ValueError, match="pca must be of the same GRU as params"):
        projection.project(params_of(**other), pca)
    with pytest.raises(TypeError, match="pca must come from neuron_pca, got dict"):
        projection.project(params_of(), {(): pca})


def test_summary():
    params, pca = analysis()
    _, info = projection.project(params, pca, input_projector_size=None, output_projector_size=2)
    head, row = projection.summary(info).splitlines()
    assert head.split()[:3] == ["layer", "P_i", "P_o"]
    before, after = learnables(None, None), learnables(None, 2)
    share = f"{1 - after / before:.1%}"
    assert row.split()[:7] == ["GRU", "dense", "2", str(before), "->", str(after), share]
    assert row.endswith(f"{info.explained_variance:.1%}")


# The maps that change the output the least


def perturbed(leaves, mode, e, x):
    """h_t of one sequence, by hand, with e (2, T, 3H) added to W x_t and to R h_{t-1}."""
    (W, R, b), h, states = leaves, jnp.zeros(H), []
    for t in range(T):
        a, s = W @ x[t] + e[0, t] + b[: 3 * H], R[: 2 * H] @ h + e[1, t, : 2 * H]
        s = s + b[3 * H : 5 * H] if mode == RECURRENT_BIAS else s
        r, z = jax.nn.sigmoid(a[:H] + s[:H]), jax.nn.sigmoid(a[H : 2 * H] + s[H:])
        inside = r * h if mode == BEFORE else h
        c = R[2 * H :] @ inside + e[1, t, 2 * H :]
        c = c + b[5 * H :] if mode == RECURRENT_BIAS else c
        h = (1 - z) * jnp.tanh(a[2 * H :] + (c if mode == BEFORE else r * c)) + z * h
        states.append(h)
    return jnp.stack(states)


@pytest.mark.parametrize("mode", MODES)
def test_sensitivity(mode):
    key = jax.random.key(5)
    params, pca = analysis(mode, key=key)
    keys = jax.random.split(jax.random.fold_in(key, 0), DRAWS)
    directions = [jax.random.normal(k, (B, T, H), "float64") for k in keys]
    leaves = (params.input_weights, params.recurrent_weights, params.bias)

    def output(e, x, v):
        return jnp.sum(v * perturbed(leaves, mode, e, x))

    zeros = jnp.zeros((2, T, 3 * H))
    gradient = jax.jit(jax.vmap(jax.grad(output), in_axes=(None, 0, 0)))
    g = np.stack([gradient(zeros, jnp.asarray(X), v) for v in directions])
    for n in range(2):
        rows = g[:, :, n].reshape(-1, 3 * H)
        np.testing.assert_allclose(pca.sensitivity[n], rows.T @ rows / len(rows), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_output_method_has_the_smaller_error(k, seed):
    params, pca = analysis(key=jax.random.key(seed), seed=seed)
    dense, errors = as_dict(params), {}
    for method in ("pca", "output"):
        sizes = {"input_projector_size": k, "output_projector_size": k}
        small, _ = projection.project(params, pca, **sizes, method=method)
        cut = as_dict(projection.unproject(small))
        for n, name in enumerate(("input_weights", "recurrent_weights")):
            Q = small.arrays()[f"{('input', 'output')[n]}_projector"]
            assert relative_error(Q.T @ Q, np.eye(k)) < 1e-12
            gap = np.asarray(dense[name] - cut[name])
            G = pca.sensitivity[n]
            G = G + DAMPING * np.trace(G) / len(G) * np.eye(len(G))
            C = (pca.inputs, pca.states)[n].covariance
            errors[name, method] = np.trace(G @ gap @ C @ gap.T)
    for name in ("input_weights", "recurrent_weights"):
        assert errors[name, "output"] <= errors[name, "pca"] * (1 + 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_output_method_where_the_output_depends_on_nothing(mode):
    """z is 1, so that the state never moves."""
    params = params_of(mode)
    params = params.replace(bias=params.bias.at[H : 2 * H].set(200.0))
    pca = projection.neuron_pca(params, [X], key=jax.random.key(0))
    assert not any(G.any() for G in pca.sensitivity)
    sizes = {"input_projector_size": 2, "output_projector_size": 3}
    small, _ = projection.project(params, pca, **sizes, method="output")
    principal, _ = projection.project(params, pca, **sizes)
    assert_close(as_dict(small), as_dict(principal), 0)
    np.testing.assert_array_equal(run(small), np.zeros((B, T, H)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_output_method_needs_finite_gradients(bad):
    params, pca = analysis(key=jax.random.key(0))
    G, other = pca.sensitivity
    other = np.where(np.eye(len(other)), bad, other)
    with pytest.raises(ValueError, match=r"finite gradients of the output.*Pass method='pca'"):
        projection.project(
            params, dataclasses.replace(pca, sensitivity=(G, other)), method="output"
        )


def test_output_method_with_more_inputs_than_rows():
    params = as_params(random_params(np.random.default_rng(0), 1, 5, AFTER), AFTER)
    x = RNG.normal(size=(B, T, 5))
    pca = projection.neuron_pca(params, [x], key=jax.random.key(0))
    sizes = {"input_projector_size": 5, "output_projector_size": None}
    small, info = projection.project(params, pca, **sizes, method="output")
    assert info.learnables[1] == gru_jax.num_learnables(small)
    np.testing.assert_allclose(run(small, x), run(params, x), rtol=0, atol=1e-12)


# Dense layers


def moments_of(rank, n=7):
    """Of vectors in an affine subspace, and the vectors."""
    vectors = RNG.normal(size=(50, rank)) @ RNG.normal(size=(rank, n)) + RNG.normal(size=n)
    return projection.neuron_pca(params_of(width=n), [vectors.reshape(5, 10, n)]).inputs, vectors


@pytest.mark.parametrize("size", [None, 3, 7])
def test_dense_is_exact_where_the_inputs_span_less(size):
    moments, x = moments_of(3)
    kernel, bias = RNG.normal(size=(7, 9)), RNG.normal(size=9)
    projected = projection.project_dense(kernel, bias, moments, 1 - 1e-9, projector_size=size)
    Q, small, shifted = map(np.asarray, projected)
    assert (Q.shape, small.shape) == ((7, size or 3), (size or 3, 9))
    np.testing.assert_allclose(Q.T @ Q, np.eye(size or 3), rtol=0, atol=1e-12)
    np.testing.assert_allclose((x @ Q) @ small + shifted, x @ kernel + bias, rtol=0, atol=1e-12)


def test_dense_drops_the_smallest_directions():
    moments, x = moments_of(7)
    kernel, bias = RNG.normal(size=(7, 30)), RNG.normal(size=30)
    centred = x - x.mean(axis=0)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    goal = variances[:4].sum() / variances.sum() - 1e-6
    Q, small, shifted = map(np.asarray, projection.project_dense(kernel, bias, moments, goal))
    assert Q.shape == (7, 4)
    right = np.linalg.svd(centred)[2][:4].T
    expected = (x.mean(axis=0) + centred @ right @ right.T) @ kernel + bias
    np.testing.assert_allclose((x @ Q) @ small + shifted, expected, rtol=0, atol=1e-12)


def test_dense_that_would_grow_stays():
    moments, _ = moments_of(7)
    kernel, bias = jnp.ones((7, 2), "float32"), jnp.ones(2, "float32")
    Q, same, also = projection.project_dense(kernel, bias, moments, 0.99)
    assert (Q, same is kernel, also is bias) == (None, True, True)
    arrays = projection.project_dense(kernel, bias, moments, projector_size=6)
    assert {array.dtype for array in arrays} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("kernel", "bias", "how", "error", "words"),
    [
        (
            (6, 2),
            (2,),
            {},
            ValueError,
            r"shape \(7, m\) and bias \(m,\) for 7 inputs, got \(6, 2\)",
        ),
        ((7, 2), (3,), {}, ValueError, r"and \(3,\)"),
        ((7, 2), (2,), {"explained_variance_goal": 1}, ValueError, "between 0 and 1"),
        ((7, 2), (2,), {"projector_size": 8}, ValueError, "must be at most 7, got 8"),
        ((7, 2), (2,), {"projector_size": 1.5}, TypeError, "must be a positive integer"),
    ],
)
def test_dense_errors(kernel, bias, how, error, words):
    with pytest.raises(error, match=words):
        projection.project_dense(np.ones(kernel), np.ones(bias), moments_of(7)[0], **how)


def test_dense_refuses_what_is_no_dense_layer_and_no_moments():
    moments, K, b = moments_of(7)[0], np.ones((7, 2)), np.zeros(2)
    for kernel, bias, words in (
        (K.astype(int), b, "kernel must be of a floating-point type"),
        (K, b.astype(int), "bias must be of a floating-point type"),
        (K, None, "bias must be an array"),
    ):
        with pytest.raises(TypeError, match=words):
            projection.project_dense(kernel, bias, moments, projector_size=7)
    with pytest.raises(TypeError, match=r"moments must come from.*states.*got NeuronPCA"):
        projection.project_dense(K, b, analysis()[1])
    Q, small, shifted = projection.project_dense(K.tolist(), b, moments, projector_size=7)
    np.testing.assert_allclose(Q @ small, K, rtol=0, atol=1e-12)
    np.testing.assert_allclose(shifted, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_unproject_is_traceable(mode):
    small = params_of(mode, sizes=(2, 3))
    compiled = jax.jit(projection.unproject)(small)
    assert_close(as_dict(compiled), as_dict(projection.unproject(small)), 1e-14)
    gradient = jax.grad(lambda p: jnp.sum(projection.unproject(p).recurrent_weights ** 2))(small)
    dense = np.asarray(small.recurrent_weights) @ np.asarray(small.output_projector).T
    expected = 2 * dense @ np.asarray(small.output_projector)
    assert relative_error(gradient.recurrent_weights, expected) < 1e-13
