"""The steps of `gru_jax.optim` against the documented update: solvers, clipping, factors, rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import TOLERANCE, as_dict, as_params, assert_close, random_params
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from reference import MODES, gru_ref_grads
from training_reference import METHODS, SOLVERS, clip, prepare, rows, train

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import optim

H, I, P_I, P_O = 2, 3, 2, 1  # noqa: E741
SMALL, DOUBLE = MODES[0], MODES[2]
L2 = 0.05
THRESHOLD = {"l2norm": 1.2, "global-l2norm": 3.0, "absolute-value": 0.7}
SCALES = {"input_weights": 1.0, "recurrent_weights": 0.15, "bias": 0.6}
RATES = 0.03 / (1 + np.arange(50)) ** 0.5

LEARN_RATE_FACTORS = {
    "scalar": {"input_weights": 0.5, "recurrent_weights": 2.0, "bias": 3.0, "input_projector": 0.0},
    "triple": {
        "input_weights": (1.0, 0.0, 2.0),
        "recurrent_weights": (0.5, 2.0, 1.0),
        "bias": (3.0, 1.0, 0.0),
        "output_projector": 0.25,
    },
}
L2_FACTORS = {
    "scalar": {"input_weights": 1.5, "recurrent_weights": 0.0, "bias": 0.5, "input_projector": 2.0},
    "triple": {
        "input_weights": (0.0, 1.0, 2.0),
        "recurrent_weights": (1.0, 2.0, 3.0),
        "bias": (0.5, 0.0, 1.0),
        "output_projector": 0.0,
    },
}
PLAIN = {"input_weights": 1.0, "recurrent_weights": 1.0, "bias": 1.0}
WEIGHTS_ONLY = {**PLAIN, "bias": 0.0}


def schedule(step):
    """A rate that changes with every step, for the library and for the oracle."""
    return RATES[step] if isinstance(step, int) else jnp.asarray(RATES)[step]


def case(mode=DOUBLE, *, projected=False, seed=0, dtype="float64"):
    """Random parameters as a dict."""
    rng = np.random.default_rng(seed)
    sizes = (P_I, P_O) if projected else ()
    return random_params(rng, H, I, mode, *sizes, dtype=dtype)


def gradients(params, steps, *, seed=1, dtype="float64"):
    """Another random gradient for each step, some large and some small."""
    rng = np.random.default_rng(seed)
    loud = (1.0, 0.2, 2.0, 0.5, 0.1)
    return [
        {
            name: (loud[t % 5] * SCALES.get(name, 1.0) * rng.normal(size=p.shape)).astype(dtype)
            for name, p in params.items()
        }
        for t in range(steps)
    ]


def factors_of(params, kind):
    """Learn-rate and L2 factors of every array there is; 1 where the tables above say nothing."""
    return tuple(
        {name: table[kind].get(name, 1.0) for name in params}
        for table in (LEARN_RATE_FACTORS, L2_FACTORS)
    )


def by_hand(params, mode, learn_rate_factors, l2_factors):
    """Dicts of factors as the keyword arguments of `training_solver`."""
    tree = as_params(params, mode)
    return {
        "learn_rate_factors": optim.gate_factors(tree, **learn_rate_factors),
        "l2_factors": optim.gate_factors(tree, **l2_factors),
    }


def eager(tx, params, gradients, state=None):
    """The parameters and the state after several updates, operation by operation."""
    state = tx.init(params) if state is None else state
    for g in gradients:
        g = g(params) if callable(g) else g
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def compiled(tx, params, gradients):
    """The same as one compiled loop."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    (params, state), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, stacked))(
        params, tx.init(params)
    )
    return params, state


def as_trees(arrays, mode):
    """Dicts of arrays as the library's parameters or gradients."""
    return [as_params(one, mode) for one in arrays]


def tolerant(tx, solver="adam"):
    """The transformation; Optax's Adam raises a float to an integer, against strict promotion."""
    if solver != "adam":
        return tx

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(tx).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def names_of(tree):
    """A tree of dicts as one dict."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def moments(state):
    """The moments among the state of an optimiser."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, gru_jax.GRUParams))
    return [leaf for leaf in leaves if isinstance(leaf, gru_jax.GRUParams)]


def solver_pair(solver, method, kind, mode, rate, params):
    """The library's solver and the options of the oracle that say the same."""
    learn_rate_factors, l2_factors = factors_of(params, kind)
    rate = {"constant": 0.02, "schedule": schedule}[rate]
    tx = optim.training_solver(
        solver,
        None,
        as_params(params, mode),
        learning_rate=rate,
        l2_regularization=L2,
        gradient_threshold=THRESHOLD[method],
        gradient_threshold_method=method,
        **by_hand(params, mode, learn_rate_factors, l2_factors),
    )
    options = {
        "solver": solver,
        "learning_rate": rate,
        "l2": L2,
        "l2_factors": l2_factors,
        "learn_rate_factors": learn_rate_factors,
        "threshold": THRESHOLD[method],
        "method": method,
    }
    return tolerant(tx, solver), options


def default_options(solver, rate):
    """What the oracle needs to follow a solver of which only the learning rate is given."""
    options = {"solver": solver, "learning_rate": rate, "threshold": np.inf, "method": "l2norm"}
    return options | {"l2": 1e-4, "l2_factors": WEIGHTS_ONLY, "learn_rate_factors": PLAIN}


def assert_clipping_matters(clipped, method):
    """Some arrays, steps or entries were clipped and others were not."""
    if method == "global-l2norm":
        reached = [any(step.values()) for step in clipped]
        assert any(reached)
        assert not all(reached)
    elif method == "l2norm":
        assert any(any(step.values()) and not all(step.values()) for step in clipped)
    else:
        assert any(0 < part < 0.5 for step in clipped for part in step.values())


def assert_bits(actual, expected):
    """Equal bytes, so that -0.0, NaN and dtype count."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


# The documented update


@pytest.mark.parametrize("rate", ["constant", "schedule"])
@pytest.mark.parametrize("mode", [SMALL, DOUBLE])
@pytest.mark.parametrize("kind", ["scalar", "triple"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_five_steps(solver, method, kind, mode, rate):
    params = case(mode, projected=mode == DOUBLE)
    tx, options = solver_pair(solver, method, kind, mode, rate, params)
    g = gradients(params, 5)
    want, state = train(params, g, **options)
    assert_clipping_matters(state["clipped"], method)
    got, _ = eager(tx, as_params(params, mode), as_trees(g, mode))
    assert_close(as_dict(got), want, TOLERANCE["float64"])


@pytest.mark.parametrize(
    ("solver", "method", "kind", "mode", "rate"),
    [
        ("sgdm", "l2norm", "triple", DOUBLE, "schedule"),
        ("sgdm", "absolute-value", "scalar", SMALL, "constant"),
        ("adam", "global-l2norm", "triple", DOUBLE, "schedule"),
        ("adam", "l2norm", "scalar", DOUBLE, "constant"),
        ("rmsprop", "global-l2norm", "triple", SMALL, "schedule"),
        ("rmsprop", "absolute-value", "triple", DOUBLE, "constant"),
    ],
)
def test_fifty_steps(solver, method, kind, mode, rate):
    params = case(mode, projected=mode == DOUBLE)
    tx, options = solver_pair(solver, method, kind, mode, rate, params)
    g = gradients(params, 50)
    want, state = train(params, g, **options)
    assert_clipping_matters(state["clipped"], method)
    got, _ = compiled(tx, as_params(params, mode), as_trees(g, mode))
    assert_close(as_dict(got), want, TOLERANCE["float64"])


@pytest.mark.parametrize("mode", [SMALL, DOUBLE])
def test_gradients_of_a_loss(mode):
    """True gradients: the library's on one side, back-propagation by hand on the other."""
    params = case(mode, projected=True)
    rng = np.random.default_rng(2)
    x, h0 = rng.normal(size=(2, 4, I)), rng.normal(size=(2, H))
    cy, ch = rng.normal(size=(2, 4, H)), rng.normal(size=(2, H))

    @jax.jit
    @jax.grad
    def library(params):
        y, hidden = gru_jax.gru(params, x, h0)
        return jnp.sum(cy * y) + jnp.sum(ch * hidden)

    def oracle(params):
        grads = gru_ref_grads(params, x, h0, cy, ch, mode=mode)
        return {name: grads[name] for name in params}

    for solver in SOLVERS:
        tx, options = solver_pair(solver, "l2norm", "triple", mode, "schedule", params)
        want, _ = train(params, [oracle] * 5, **options)
        got, _ = eager(tx, as_params(params, mode), [library] * 5)
        assert_close(as_dict(got), want, TOLERANCE["float64"])


@pytest.mark.parametrize("solver", SOLVERS)
def test_eager_equals_compiled(solver):
    params = case(projected=True)
    tx, _ = solver_pair(solver, "l2norm", "triple", DOUBLE, "schedule", params)
    start, g = as_params(params, DOUBLE), as_trees(gradients(params, 5), DOUBLE)
    (slow, slow_state), (fast, fast_state) = eager(tx, start, g), compiled(tx, start, g)
    assert_close(as_dict(slow), as_dict(fast), 1e-15)
    assert jax.tree.structure(slow_state) == jax.tree.structure(fast_state)


@pytest.mark.parametrize("kind", ["scalar", "triple"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_float32(solver, method, kind):
    """Everything stays float32, a few roundings (1.6e-7 is the most measured) from the oracle."""
    params = case(projected=True, dtype="float32")
    tx, options = solver_pair(solver, method, kind, DOUBLE, "schedule", params)
    g = gradients(params, 5, dtype="float32")
    want, _ = train(params, g, **options)
    trees = as_trees(g, DOUBLE)
    got, state = eager(tx, as_params(params, DOUBLE), trees)
    updates, _ = tx.update(trees[0], state, got)
    of_arrays = [updates, got, moments(state)]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(of_arrays)} == {"float32"}
    assert_close(as_dict(got), want, 4e-7)


@pytest.mark.parametrize(("solver", "rate"), [("sgdm", 0.01), ("adam", 1e-3), ("rmsprop", 1e-3)])
def test_defaults(solver, rate):
    """The rates, the other constants of the solvers, λ, the factors and the method of clipping."""
    params = case()
    g, start = gradients(params, 5), as_params(params, DOUBLE)
    for given in ({}, {"gradient_threshold": THRESHOLD["l2norm"]}):
        options = default_options(solver, rate)
        options["threshold"] = given.get("gradient_threshold", np.inf)
        want, _ = train(params, g, **options)
        tx = tolerant(optim.training_solver(solver, None, start, **given), solver)
        got, _ = eager(tx, start, as_trees(g, DOUBLE))
        assert_close(as_dict(got), want, TOLERANCE["float64"])


def test_default_factors_of_a_tree():
    """L2 factor 1 for projectors and matrices, 0 for every bias; each GRU of a tree is found."""
    first, second = case(projected=True), case(SMALL, seed=3)
    head = {"kernel": jnp.ones((H, 2)), "bias": jnp.ones(2)}
    model = {"first": as_params(first, DOUBLE), "rest": [as_params(second, SMALL), head]}
    arrays = {f"first/{k}": v for k, v in first.items()} | {
        f"rest/0/{k}": v for k, v in second.items()
    }
    arrays |= {f"rest/1/{k}": np.asarray(v) for k, v in head.items()}
    g = gradients(arrays, 5)
    want, _ = train(
        arrays,
        g,
        solver="sgdm",
        learning_rate=0.01,
        l2=L2,
        l2_factors={path: float(not path.endswith("bias")) for path in arrays},
        learn_rate_factors=dict.fromkeys(arrays, 1.0),
        threshold=np.inf,
        method="l2norm",
    )
    tx = optim.training_solver("sgdm", None, model, l2_regularization=L2)
    structure = jax.tree.structure(model)
    trees = [structure.unflatten([one[path] for path in names_of(model)]) for one in g]
    got, _ = eager(tx, model, trees)
    assert_close(names_of(got), want, TOLERANCE["float64"])


# The learning rate


FIGURES = np.array([0.9, 0.71, 0.529, 0.3561])
FIGURES_OF_OPTAX = np.array([0.9, 0.71, 0.6829, 0.64851])


def figure_rate(step):
    return jnp.where(step < 2, 0.1, 0.01)


def figures(tx, params):
    """Every entry of the parameters after each of four steps with unit gradients from 1."""
    seen, state = [], tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
    return np.stack(seen)


def test_figures_of_sgdm():
    got = figures(optim.sgdm(figure_rate, 0.9), jnp.ones(()))[:, 0]
    np.testing.assert_allclose(got, FIGURES, rtol=0, atol=1e-15)
    other = figures(optax.sgd(figure_rate, momentum=0.9), jnp.ones(()))[:, 0]
    np.testing.assert_allclose(other, FIGURES_OF_OPTAX, rtol=0, atol=1e-15)
    params = jax.tree.map(jnp.ones_like, as_params(case(), DOUBLE))
    tx = optim.training_solver(
        "sgdm", None, params, learning_rate=figure_rate, l2_regularization=0.0
    )
    everywhere = figures(tx, params)
    want = np.broadcast_to(FIGURES[:, None], everywhere.shape)
    np.testing.assert_allclose(everywhere, want, rtol=0, atol=1e-15)


def test_momentum_of_sgdm():
    got = figures(optim.sgdm(0.1), jnp.ones(()))
    np.testing.assert_allclose(got[:, 0], [0.9, 0.71, 0.439, 0.0951], rtol=0, atol=1e-15)
    got = figures(optim.sgdm(0.1, momentum=0.5), jnp.ones(()))
    np.testing.assert_allclose(got[:, 0], [0.9, 0.75, 0.575, 0.3875], rtol=0, atol=1e-15)


def injected(solver, params, learning_rate):
    """A solver of default factors whose learning rate is part of its state."""
    tx = optax.inject_hyperparams(
        lambda learning_rate: optim.training_solver(
            solver, None, params, learning_rate=learning_rate
        )
    )(learning_rate=learning_rate)
    return tolerant(tx, solver)


@pytest.mark.parametrize("run", [eager, compiled])
@pytest.mark.parametrize("rate", [1e-3, schedule])
@pytest.mark.parametrize("solver", SOLVERS)
def test_inject_hyperparams(solver, rate, run):
    params = case()
    g = gradients(params, 5)
    want, _ = train(params, g, **default_options(solver, rate))
    start = as_params(params, DOUBLE)
    got, state = run(injected(solver, start, rate), start, as_trees(g, DOUBLE))
    assert_close(as_dict(got), want, TOLERANCE["float64"])
    last = rate(4) if callable(rate) else rate
    np.testing.assert_allclose(state.hyperparams["learning_rate"], last, rtol=1e-15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_learning_rate_changed_by_hand(solver):
    params = case()
    g = gradients(params, 5)
    rates = [1e-2, 1e-2, 1e-3, 1e-3, 1e-3]
    want, _ = train(params, g, **default_options(solver, lambda step: rates[step]))
    got, trees = as_params(params, DOUBLE), as_trees(g, DOUBLE)
    tx = injected(solver, got, 1e-2)
    got, state = eager(tx, got, trees[:2])
    state.hyperparams["learning_rate"] = jnp.asarray(1e-3)
    got, _ = eager(tx, got, trees[2:], state)
    assert_close(as_dict(got), want, TOLERANCE["float64"])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_injected_regularization_and_threshold(dtype):
    params = case(dtype=dtype)
    g, start = gradients(params, 5, dtype=dtype), as_params(params, DOUBLE)
    options = default_options("sgdm", 0.01) | {"l2": L2, "threshold": THRESHOLD["l2norm"]}
    want, _ = train(params, g, **options)
    tx = optax.inject_hyperparams(
        lambda l2, threshold: optim.training_solver(
            "sgdm", None, start, l2_regularization=l2, gradient_threshold=threshold
        )
    )(l2=L2, threshold=THRESHOLD["l2norm"])
    for run in (eager, compiled):
        got, _ = run(tx, start, as_trees(g, DOUBLE))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {dtype}
        assert_close(as_dict(got), want, TOLERANCE[dtype])


# Frozen gates and arrays


ADAMW = optax.adamw(0.1, weight_decay=0.5)
FROZEN = {"input_weights": (1.0, 0.0, 2.0), "recurrent_weights": 0.0, "bias": (0.0, 1.0, 0.5)}
HOSTILE = (-0.0, np.inf, np.nan, 1e-300)


def frozen_case(mode, method, solver, *, hostile):
    """A solver with frozen parts, parameters, gradients, and masks of what is frozen."""
    params = case(mode)
    masks = {name: rows(FROZEN[name], name, params) == 0 for name in params}
    g = gradients(params, 50)
    for name, mask in masks.items():
        assert mask.any()
        if hostile:
            params[name][mask] = np.resize(HOSTILE, mask.sum())
            for one in g:
                one[name][mask] = np.resize((np.nan, np.inf, 1e300, 1.0), mask.sum())
    tx = optim.training_solver(
        solver,
        None,
        as_params(params, mode),
        learning_rate=None if solver is ADAMW else schedule,
        l2_regularization=L2,
        gradient_threshold=THRESHOLD[method],
        gradient_threshold_method=method,
        **by_hand(params, mode, FROZEN, PLAIN),
    )
    return tolerant(tx, "adam" if solver is ADAMW else solver), params, g, masks


@pytest.mark.parametrize("mode", [SMALL, DOUBLE])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_frozen_parts_do_not_move(solver, method, mode):
    """Whatever the frozen parameters and their gradients are, to the last bit, and no moment."""
    tx, params, g, masks = frozen_case(mode, method, solver, hostile=True)
    got, state = compiled(tx, as_params(params, mode), as_trees(g, mode))
    found = moments(state)
    assert len(found) == (2 if solver == "adam" else 1)
    for name, mask in masks.items():
        assert_bits(getattr(got, name)[mask], params[name][mask])
        assert np.all(np.isfinite(np.asarray(getattr(got, name))[~mask]))
        for moment in found:
            assert_bits(getattr(moment, name)[mask], np.zeros(mask.sum()))
            assert np.all(np.asarray(getattr(moment, name))[~mask] != 0)
    few, _ = eager(tx, as_params(params, mode), as_trees(g[:3], mode))
    for name, mask in masks.items():
        assert_bits(getattr(few, name)[mask], params[name][mask])


@pytest.mark.parametrize("method", METHODS)
def test_frozen_gradients_reach_nothing(method):
    """What moves does so as if the frozen parameters and gradients were any others."""
    ends = []
    for hostile in (False, True):
        tx, params, g, masks = frozen_case(DOUBLE, method, "sgdm", hostile=hostile)
        got, _ = eager(tx, as_params(params, DOUBLE), as_trees(g[:5], DOUBLE))
        ends.append({name: np.asarray(getattr(got, name))[~mask] for name, mask in masks.items()})
    for name in ends[0]:
        assert_bits(ends[1][name], ends[0][name])


def test_frozen_rows_of_any_solver():
    """A solver that moves by itself does not move what is frozen."""
    tx, params, g, masks = frozen_case(DOUBLE, "l2norm", ADAMW, hostile=True)
    got, _ = eager(tx, as_params(params, DOUBLE), as_trees(g[:3], DOUBLE))
    for name, mask in masks.items():
        assert_bits(getattr(got, name)[mask], params[name][mask])


# Other solvers, and wrappers of Optax


OTHERS = {
    "lion": optax.lion(1e-2),
    "adamw": tolerant(optax.adamw(schedule, weight_decay=0.1)),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "chain": optax.chain(optax.scale_by_rss(), optax.scale_by_learning_rate(schedule)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_solver(name):
    """Another solver gets the prepared gradients, and its updates are scaled at the end."""
    solver, params = OTHERS[name], case(projected=True)
    learn_rate_factors, l2_factors = factors_of(params, "triple")
    tx = optim.training_solver(
        solver,
        None,
        as_params(params, DOUBLE),
        l2_regularization=L2,
        gradient_threshold=THRESHOLD["l2norm"],
        **by_hand(params, DOUBLE, learn_rate_factors, l2_factors),
    )
    g = gradients(params, 5)
    got, _ = eager(tx, as_params(params, DOUBLE), as_trees(g, DOUBLE))
    want = {k: jnp.asarray(v) for k, v in params.items()}
    state = solver.init(want)
    for one in g:
        ready, _ = prepare(
            want,
            one,
            l2=L2,
            l2_factors=l2_factors,
            learn_rate_factors=learn_rate_factors,
            threshold=THRESHOLD["l2norm"],
            method="l2norm",
        )
        updates, state = solver.update({k: jnp.asarray(v) for k, v in ready.items()}, state, want)
        want = {k: p + rows(learn_rate_factors[k], k, params) * updates[k] for k, p in want.items()}
    assert_close(as_dict(got), want, TOLERANCE["float64"])


def test_extra_arguments_reach_the_solver():
    """A solver may ask for more than gradients, such as the value of the loss."""

    def update(updates, state, params=None, *, value, **extra):
        del params, extra
        return jax.tree.map(lambda u: -value * u, updates), state

    params = as_params(case(), DOUBLE)
    solver = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = optim.training_solver(solver, None, params, l2_regularization=0.0)
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    assert_close(as_dict(updates), {k: -3.0 * v for k, v in as_dict(params).items()}, 1e-15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_multi_steps(solver):
    """Gradients of two mini-batches, averaged, make one update."""
    params = case()
    tx, options = solver_pair(solver, "l2norm", "triple", DOUBLE, "schedule", params)
    g = gradients(params, 6)
    means = [{k: (a[k] + b[k]) / 2 for k in a} for a, b in zip(g[::2], g[1::2], strict=True)]
    want, _ = train(params, means, **options)
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.MultiSteps(tx, every_k_schedule=2, accumulator_dtype=jnp.float64)
        got, _ = eager(tx, as_params(params, DOUBLE), as_trees(g, DOUBLE))
    assert_close(as_dict(got), want, TOLERANCE["float64"])


# Each transform alone


def transforms(params, mode):
    """Every transform with the change it makes to one gradient, array by array, in NumPy."""
    learn_rate_factors, l2_factors = factors_of(params, "triple")
    tree, threshold = as_params(params, mode), THRESHOLD["l2norm"]
    return {
        "learn rate": (
            optim.scale_by_learn_rate_factors(optim.gate_factors(tree, **learn_rate_factors)),
            lambda name, g: rows(learn_rate_factors[name], name, params) * g,
        ),
        "l2": (
            optim.add_l2_regularization(L2, optim.gate_factors(tree, **l2_factors)),
            lambda name, g: g + L2 * rows(l2_factors[name], name, params) * params[name],
        ),
        "clip": (
            optim.clip_by_l2_norm(threshold),
            lambda name, g: clip({name: g}, threshold, "l2norm")[name],
        ),
        "sgdm": (optim.sgdm(schedule), lambda name, g: -RATES[0] * g),
    }


TRANSFORMS = ("learn rate", "l2", "clip", "sgdm")


@pytest.mark.parametrize("mode", [SMALL, DOUBLE])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_alone(transform, mode):
    params = case(mode, projected=True)
    (g,) = gradients(params, 1)
    tx, change = transforms(params, mode)[transform]
    tree, updates = as_params(params, mode), as_params(g, mode)
    assert isinstance(tx, optax.GradientTransformation)
    for update in (tx.update, jax.jit(tx.update)):
        got, _ = update(updates, tx.init(tree), tree)
        assert jax.tree.structure(got) == jax.tree.structure(updates)
        assert_close(as_dict(got), {k: change(k, v) for k, v in g.items()}, 1e-15)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_masked(transform):
    """Inside `optax.masked` the arrays outside pass as they are."""
    params = case(projected=True)
    (g,) = gradients(params, 1)
    inner, change = transforms(params, DOUBLE)[transform]
    tree, updates = as_params(params, DOUBLE), as_params(g, DOUBLE)
    inside = {name: name in ("recurrent_weights", "bias", "output_projector") for name in params}
    mask = tree.replace(**inside)
    tx = optax.masked(inner, mask)
    got, _ = tx.update(updates, tx.init(tree), tree)
    want = {name: change(name, v) if inside[name] else v for name, v in g.items()}
    assert_close(as_dict(got), want, 1e-15)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_partition(transform):
    """Inside `optax.partition` each transform has its own arrays."""
    params = case(projected=True)
    (g,) = gradients(params, 1)
    inner, change = transforms(params, DOUBLE)[transform]
    tree, updates = as_params(params, DOUBLE), as_params(g, DOUBLE)
    labels = {name: "theirs" if name == "input_weights" else "ours" for name in params}
    tx = optax.partition({"ours": inner, "theirs": optax.scale(3.0)}, tree.replace(**labels))
    got, _ = tx.update(updates, tx.init(tree), tree)
    want = {k: change(k, v) if labels[k] == "ours" else 3.0 * v for k, v in g.items()}
    assert_close(as_dict(got), want, 1e-15)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_masked_away_branch(transform):
    """A mask may also leave out a whole branch of a model."""
    params = case()
    (g,) = gradients(params, 1)
    _, change = transforms(params, DOUBLE)[transform]
    learn_rate_factors, l2_factors = (
        {
            "gru": optim.gate_factors(as_params(params, DOUBLE), **factors),
            "head": {"kernel": 2.0, "bias": 2.0},
        }
        for factors in factors_of(params, "triple")
    )
    inner = {
        "learn rate": optim.scale_by_learn_rate_factors(learn_rate_factors),
        "l2": optim.add_l2_regularization(L2, l2_factors),
        "clip": optim.clip_by_l2_norm(THRESHOLD["l2norm"]),
        "sgdm": optim.sgdm(schedule),
    }[transform]
    head = {"kernel": jnp.full((2, 2), 9.0), "bias": jnp.full(2, 9.0)}
    model, updates = ({"gru": as_params(one, DOUBLE), "head": head} for one in (params, g))
    tx = optax.masked(inner, {"gru": True, "head": False})
    got, _ = tx.update(updates, tx.init(model), model)
    assert_close(as_dict(got["gru"]), {k: change(k, v) for k, v in g.items()}, 1e-15)
    assert_close(got["head"], head, 0.0)


def test_training_solver_in_partition():
    """The whole solver for the GRU, another for the rest of a model."""
    params = case()
    tx, options = solver_pair("adam", "l2norm", "triple", DOUBLE, "schedule", params)
    g = gradients(params, 5)
    want, _ = train(params, g, **options)
    factors = by_hand(params, DOUBLE, options["learn_rate_factors"], options["l2_factors"])
    head = {"kernel": jnp.ones((2, 2))}
    model = {"gru": as_params(params, DOUBLE), "head": head}
    tx = optim.training_solver(
        "adam",
        None,
        model,
        learning_rate=schedule,
        l2_regularization=L2,
        gradient_threshold=THRESHOLD["l2norm"],
        **{name: {"gru": tree, "head": {"kernel": 1.0}} for name, tree in factors.items()},
    )
    labels = {"gru": "gru", "head": "head"}
    tx = optax.multi_transform({"gru": tolerant(tx), "head": optax.sgd(0.1)}, labels)
    updates = [{"gru": one, "head": head} for one in as_trees(g, DOUBLE)]
    got, _ = eager(tx, model, updates)
    assert_close(as_dict(got["gru"]), want, TOLERANCE["float64"])
    assert_close(got["head"], {"kernel": np.full((2, 2), 0.5)}, 1e-15)


def test_factor_zero_selects():
    """What factor 0 meets may be infinite or no number."""
    params = as_params(case(), DOUBLE)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    zero = optim.gate_factors(params, input_weights=0, recurrent_weights=(0, 0, 0), bias=0.0)
    tx = optim.scale_by_learn_rate_factors(zero)
    updates, _ = tx.update(bad, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    tx = optim.add_l2_regularization(L2, zero)
    kept, _ = tx.update(params, tx.init(bad), bad)
    for name, array in params.arrays().items():
        assert_bits(getattr(moved, name), array)
        assert_bits(getattr(kept, name), array)


def test_clip_of_extremes():
    """Zeros stay zeros, an infinite threshold does nothing, and the bound holds from below."""
    zeros, threshold = {"a": jnp.zeros(3)}, 2.0
    tx = optim.clip_by_l2_norm(threshold)
    assert_bits(tx.update(zeros, tx.init(zeros))[0]["a"], zeros["a"])
    at = {"a": jnp.asarray([0.0, 2.0]), "b": jnp.asarray([3.0, 4.0])}
    got, _ = tx.update(at, tx.init(at))
    assert_bits(got["a"], at["a"])
    np.testing.assert_allclose(got["b"], [1.2, 1.6], rtol=1e-15)
    free = optim.clip_by_l2_norm(np.inf)
    assert_bits(free.update(at, free.init(at))[0]["b"], at["b"])


@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e20), ("float16", 300.0)])
@pytest.mark.parametrize("method", METHODS)
def test_clip_of_gradients_whose_squares_overflow(method, dtype, large):
    """Exploding gradients are what clipping is for."""
    params = case(dtype=dtype)
    g = {name: np.full(p.shape, large) for name, p in params.items()}
    tree = as_params(params, DOUBLE)
    one = as_params({name: v.astype(dtype) for name, v in g.items()}, DOUBLE)
    tx = optim.training_solver(
        "sgdm",
        None,
        tree,
        learning_rate=1.0,
        l2_regularization=0.0,
        gradient_threshold=1.0,
        gradient_threshold_method=method,
    )
    updates, _ = tx.update(one, tx.init(tree), tree)
    want = {name: -v for name, v in clip(g, 1.0, method).items()}
    assert_close(as_dict(updates), want, {"float32": 4e-7, "float16": 2e-3}[dtype])


# Factors


def test_gate_factors():
    """NumPy float64 that broadcasts: scalars without axes, triples as row blocks."""
    for mode in (SMALL, DOUBLE):
        params = case(mode, projected=True)
        tree = as_params(params, mode)
        for kind in ("scalar", "triple"):
            factors, _ = factors_of(params, kind)
            got = optim.gate_factors(tree, **factors)
            assert isinstance(got, gru_jax.GRUParams)
            for name, value in got.arrays().items():
                assert isinstance(value, np.ndarray)
                assert value.dtype == np.float64
                full = np.broadcast_to(value, params[name].shape)
                assert_bits(full, rows(factors[name], name, params))
                triple = np.ndim(factors[name]) == 1
                rest = (1,) * (params[name].ndim - 1)
                assert value.shape == ((len(params[name]), *rest) if triple else ())


OPTIONS = {
    "input_weights_learn_rate_factor": (1, 0, 2),
    "recurrent_weights_learn_rate_factor": 0.5,
    "bias_learn_rate_factor": (3.0, 1.0, 0.25),
    "input_projector_learn_rate_factor": 0.0,
    "input_weights_l2_factor": (0.0, 1.0, 2.0),
    "bias_l2_factor": 0.5,
    "output_projector_l2_factor": 3.0,
    "reset_gate_mode": DOUBLE,
    "output_mode": "last",
    "param_dtype": jnp.float64,
}


def oracle_of_options(arrays, gradients, solver):
    """The end of a model of a projected GRU layer made with `OPTIONS` and a dense one."""
    learn_rate_factors, l2_factors = {}, {}
    for path, array in arrays.items():
        name = path.rpartition("/")[2]
        learn_rate_factors[path] = OPTIONS.get(f"{name}_learn_rate_factor", 1.0)
        l2_factors[path] = OPTIONS.get(f"{name}_l2_factor", float(np.ndim(array) > 1))
    (kernel,) = (path for path in arrays if path.endswith("kernel"))
    dense_bias = kernel.replace("kernel", "bias")
    learn_rate_factors[dense_bias], l2_factors[dense_bias] = 1.0, 0.0
    want, _ = train(
        arrays,
        gradients,
        solver=solver,
        learning_rate=schedule,
        l2=L2,
        l2_factors=l2_factors,
        learn_rate_factors=learn_rate_factors,
        threshold=THRESHOLD["global-l2norm"],
        method="global-l2norm",
    )
    return want


SETTINGS = {
    "learning_rate": schedule,
    "l2_regularization": L2,
    "gradient_threshold": THRESHOLD["global-l2norm"],
    "gradient_threshold_method": "global-l2norm",
}


def random_gradients(params, steps):
    """Random trees like the parameters."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    return [
        structure.unflatten([jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])
        for _ in range(steps)
    ]


@pytest.mark.parametrize("solver", SOLVERS)
def test_options_of_a_linen_layer(solver):
    layer = gru_jax.linen.GRUProjectedLayer(H, P_O, P_I, **OPTIONS)
    model = nn.Sequential([layer, nn.Dense(2, param_dtype=jnp.float64)])
    x = jnp.ones((1, 2, I))
    params = model.init(jax.random.key(0), x)["params"]
    tx = tolerant(optim.training_solver(solver, model, params, x, **SETTINGS), solver)
    g = random_gradients(params, 5)
    want = oracle_of_options(names_of(params), [names_of(one) for one in g], solver)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    step = jax.jit(lambda state, g: state.apply_gradients(grads=g))
    for one in g:
        state = step(state, one)
    assert_close(names_of(state.params), want, TOLERANCE["float64"])


@pytest.mark.parametrize("solver", SOLVERS)
def test_options_of_an_nnx_layer(solver):
    rngs = nnx.Rngs(0)
    layer = gru_jax.nnx.GRUProjectedLayer(H, P_O, P_I, input_size=I, rngs=rngs, **OPTIONS)
    model = nnx.Sequential(layer, nnx.Linear(H, 2, param_dtype=jnp.float64, rngs=rngs))
    params = nnx.state(model, nnx.Param)
    arrays = names_of(nnx.to_pure_dict(params))
    tx = tolerant(optim.training_solver(solver, model, None, **SETTINGS), solver)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    g = random_gradients(params, 5)
    want = oracle_of_options(arrays, [names_of(nnx.to_pure_dict(one)) for one in g], solver)
    step = nnx.jit(lambda model, optimizer, g: optimizer.update(model, g))
    for one in g:
        step(model, optimizer, one)
    got = names_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert_close(got, want, TOLERANCE["float64"])
