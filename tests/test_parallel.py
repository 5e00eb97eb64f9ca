"""The recurrence in parallel over time: it equals the loop, in values and derivatives, always."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, as_params, relative_error
from jax import export
from reference import MODES, gru_ref, gru_ref_grads

import gru_jax
from gru_jax import _newton

JACOBIANS = ("full", "diagonal")
B, CHANNELS, H = 3, 3, 5


def network(rng, units=H, channels=CHANNELS, mode=MODES[2], scale=1.0, dtype="float64", P_o=None):
    """Drawn as PyTorch draws it; chaotic where the recurrent weights are `scale` times as large."""
    k = 1 / np.sqrt(units)
    halves = 2 if mode.startswith("recurrent") else 1
    arrays = {
        "input_weights": rng.uniform(-k, k, (3 * units, channels)),
        "recurrent_weights": scale * rng.uniform(-k, k, (3 * units, P_o or units)),
        "bias": rng.uniform(-k, k, halves * 3 * units),
    }
    if P_o:
        arrays["output_projector"] = rng.normal(size=(units, P_o)) / np.sqrt(P_o)
    return {name: array.astype(dtype) for name, array in arrays.items()}


def inputs(rng, T, units=H, channels=CHANNELS, dtype="float64"):
    x, h0 = rng.normal(size=(B, T, channels)), rng.normal(size=(B, units))
    return x.astype(dtype), h0.astype(dtype)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def by_loop(*args, jacobian=None, **options):
    """`gru` with the signature of `gru_parallel`."""
    return *gru_jax.gru(*args, **options), None


def weighted(run, *arguments, weights=None, **options):
    """A loss of both outputs, with random weights by default; and all that `run` returns."""
    y, hidden, info = run(*arguments, **options)
    rng = np.random.default_rng(3)
    weights = weights or [jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in (y, hidden)]
    return sum(jnp.sum(w * a) for w, a in zip(weights, (y, hidden), strict=True)), (y, hidden, info)


@partial(jax.jit, static_argnames=("run", "jacobian", "reverse"))
def everything(run, *arguments, **options):
    """The gradients in params, x, h0, and the outputs with info: one program for many tests."""
    return jax.grad(partial(weighted, run), (0, 1, 2), has_aux=True)(*arguments, **options)


@partial(jax.jit, static_argnames=("run", "jacobian"))
@partial(jax.vmap, in_axes=(None, None, 0, None, None))
def each_network(run, jacobian, params, x, h0):
    return everything(run, params, x, h0, jacobian=jacobian)


def assert_equal_leaves(got, right, tolerance):
    """Each leaf, relative to its largest number."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize(
    ("mode", "P_o", "flags", "reverse"),
    [
        (MODES[0], None, ("mask", "resets"), False),
        (MODES[1], 3, ("lengths", "resets"), True),
        (MODES[2], 3, ("mask",), True),
    ],
)
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_it_is_a_plain_loop(jacobian, mode, P_o, flags, reverse):
    """Values, gradients, and that a skipped step keeps the state bit by bit."""
    T, rng = 9, np.random.default_rng(1)
    arrays, (x, h0) = network(rng, mode=mode, P_o=P_o), inputs(rng, T)
    mask, resets = rng.random((B, T)) < 0.7, rng.random((B, T)) < 0.15
    lengths = np.array([T, 0, T // 2], np.int32)
    every = {"lengths": lengths, "mask": mask, "resets": resets}
    options = {"reverse": reverse, **{name: every[name] for name in flags}}
    if "lengths" in flags:
        mask = np.arange(T) < lengths[:, None]
    x[~mask] = np.nan
    right, last = gru_ref(arrays, x, h0, mode=mode, **options)
    weights = [rng.normal(size=a.shape) for a in (right, last)]
    options |= {"jacobian": jacobian}
    found = everything(
        gru_jax.gru_parallel, as_params(arrays, mode), x, h0, weights=weights, **options
    )
    (d_params, d_x, d_h0), (y, hidden, info) = found
    assert info.converged.all()
    assert relative_error(y, right) < 1e-12
    assert relative_error(hidden, last) < 1e-12
    options.pop("jacobian")
    grads = gru_ref_grads(arrays, x, h0, *weights, mode=mode, **options)
    for name, got in {"x": d_x, "h0": d_h0, **d_params.arrays()}.items():
        assert got is None or relative_error(got, grads[name]) < 1e-12, name
    for one, state, start, kept in zip(y, hidden, h0, mask, strict=True):
        assert not one[~kept].any()
        steps = np.flatnonzero(kept)[:: -1 if reverse else 1]
        np.testing.assert_array_equal(state, one[steps[-1]] if steps.size else start)


@pytest.mark.parametrize(("dtype", "mode"), [("float32", MODES[2]), ("float64", MODES[1])])
@pytest.mark.parametrize(("jacobian", "least", "most"), [("full", 3, 6), ("diagonal", 8, 28)])
def test_what_forgets_converges_and_what_is_chaotic_falls_back(jacobian, least, most, dtype, mode):
    """Each sequence by itself; values and gradients are those of the loop in any case."""
    T, units, rng = 96, 16, np.random.default_rng(5)
    forgets, chaotic = (
        as_params(network(rng, units, mode=mode, scale=scale, dtype=dtype), mode)
        for scale in (1.0, 12.0)
    )
    x, h0 = inputs(rng, T, units, CHANNELS, dtype)
    never, always = np.zeros((B, T), bool), np.zeros((B, T), bool)
    always[1] = True  # nothing is amplified here
    run = partial(everything, gru_jax.gru_parallel, jacobian=jacobian)
    loop = partial(everything, by_loop)

    arguments, resets = (forgets, x, h0), never
    d, (y, hidden, info) = run(*arguments, resets=resets)
    assert info.converged.all()  # so that no loop hides what comes
    assert least <= info.iterations.min() <= info.iterations.max() <= most
    assert (info.error <= {"float32": 5e-7, "float64": 5e-13}[dtype]).all()
    d_right, (right, last, _) = loop(*arguments, resets=resets)
    assert relative_error(y, right) < TOLERANCE[dtype]
    assert relative_error(hidden, last) < TOLERANCE[dtype]
    assert_equal_leaves(d, d_right, TOLERANCE[dtype])

    arguments = chaotic, 0.1 * x, h0
    right = gru_jax.gru(*arguments)[0]
    shaken = gru_jax.gru(chaotic, 0.1 * x, h0 * (1 + 1e-6))[0]
    assert np.abs(shaken - right).max() > 0.01  # it is chaotic
    y, _, info = run(*arguments, resets=never)[1]
    assert not info.converged.any()
    assert (info.iterations < 32).all()  # given up early
    np.testing.assert_array_equal(y, right)

    at_times = never.copy()
    at_times[:, ::16] = True  # for as long gradients can be compared
    d, (_, _, info) = run(*arguments, resets=at_times)
    assert not info.converged.all()
    assert_equal_leaves(d, loop(*arguments, resets=at_times)[0], TOLERANCE[dtype])

    x[2, 50] = np.nan
    y, hidden, info = run(chaotic, x, h0, resets=always)[1]
    exact = dtype == "float64"  # in float32 a single step of these weights rounds too much
    assert info.converged.tolist() == [False, exact, False]
    right, last = gru_jax.gru(chaotic, x, h0, resets=always)
    np.testing.assert_allclose(y, right, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(hidden, last, rtol=0, atol=TOLERANCE[dtype])
    assert np.isnan(y[2, 50:]).all()
    assert np.isfinite(y[2, :50]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "mode", "T", "units"),
    [
        ("float32", MODES[0], 3, 6),
        ("float32", MODES[1], 61, 4),
        ("float64", MODES[1], 61, 4),
        ("float64", MODES[2], 60, 1),
    ],
)
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_hostile_networks(jacobian, dtype, mode, T, units):
    """Of all scales, biases and states: what is accepted equals the loop."""
    N = 150
    rng = np.random.default_rng(T + units)
    scales = lambda low, high, ndim: 10 ** rng.uniform(low, high, (N, *(1,) * ndim))  # noqa: E731
    halves = 2 if mode.startswith("recurrent") else 1
    W, R = (rng.normal(size=(N, 3 * units, k)) for k in (CHANNELS, units))
    bias = rng.normal(size=(N, halves * 3 * units)) * scales(-1, 0.7, 1)
    bias[: N // 3, units : 2 * units] += rng.uniform(0, 6, (N // 3, 1))  # a long memory
    x = rng.normal(size=(N, B, T, CHANNELS)) * scales(-1, 1, 3)
    h0 = rng.normal(size=(N, B, units)) * scales(-1, 2, 2)
    arrays = (W * scales(-1.5, 1, 2), R * scales(-1, 1, 2) / np.sqrt(units), bias)
    arguments = [a.astype(dtype) for a in (*arrays, x, h0)]

    @jax.jit
    @jax.vmap
    def both(W, R, bias, x, h0):
        params = gru_jax.GRUParams(W, R, bias, reset_gate_mode=mode)
        y, _, info = gru_jax.gru_parallel(params, x, h0, jacobian=jacobian)
        return y, gru_jax.gru(params, x, h0)[0], info

    y, right, info = jax.tree.map(np.asarray, both(*arguments))
    error = np.abs(y - right) / np.maximum(1, np.abs(right))
    assert error.max() <= TOLERANCE[dtype]
    share = info.converged.mean()
    assert (0.1 if dtype == "float32" else 0.5) < share  # it is no trivial guarantee
    np.testing.assert_array_equal(y[~info.converged], right[~info.converged])


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_a_state_that_happens_to_be_exact_is_no_proof(jacobian, monkeypatch):
    """A residual of exactly 0, where the next program rounds otherwise and ends elsewhere."""
    rng, T = np.random.default_rng(0), 59
    params = as_params(network(rng, 16, scale=12.0, dtype="float32"), MODES[2])
    x, h0 = inputs(rng, T, 16, CHANNELS, "float32")
    monkeypatch.setattr(_newton, "PATIENCE", 10 * T)
    options = {"max_iterations": 10 * T, "jacobian": jacobian}
    assert not gru_jax.gru_parallel(params, 0.1 * x, h0, **options)[2].converged.any()


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_tolerance_and_iterations(jacobian):
    rng = np.random.default_rng(9)
    params, (x, h0) = as_params(network(rng), MODES[2]), inputs(rng, 12)
    right = gru_jax.gru(params, x, h0)[0]
    run = partial(gru_jax.gru_parallel, params, x, h0, jacobian=jacobian)
    y, _, loose = run(tolerance=1e-3)
    assert loose.converged.all()
    assert (loose.error <= 1e-3).all()
    assert np.abs(y - right).max() <= 1e-3
    tight = run()[2]
    assert (loose.iterations < tight.iterations).all()
    assert (tight.residual < loose.residual).all()
    y, _, none = run(max_iterations=2)
    assert not none.converged.any()
    assert none.iterations.tolist() == [2] * B
    np.testing.assert_array_equal(y, right)


@partial(jax.jit, static_argnames=("run", "jacobian"))
def second_derivatives(run, arguments, direction, **options):
    """Forward over reverse, with the plain tangent beside it; and reverse over forward."""
    loss = lambda *a: weighted(run, *a, **options)[0]  # noqa: E731
    along = lambda *a: jax.jvp(loss, a, direction)[1]  # noqa: E731
    forward = jax.jvp(jax.value_and_grad(loss, (0, 1, 2)), arguments, direction)[1]
    return *forward, jax.grad(lambda *a: along(*a) ** 2, (0, 1, 2))(*arguments)


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_derivatives_of_every_kind(jacobian):
    """Where Newton's method has found the trajectory, and where the loop has."""
    T, rng = 6, np.random.default_rng(11)
    options = {"resets": rng.random((B, T)) < 0.2, "lengths": np.array([T, 2, 5])}
    for scale in (1.0, 12.0):
        params, (x, h0) = (
            as_params(network(rng, mode=MODES[1], scale=scale), MODES[1]),
            inputs(rng, T),
        )
        direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (params, x, h0))
        got, right = (
            second_derivatives(run, (params, x, h0), direction, **options, **how)
            for run, how in ((gru_jax.gru_parallel, {"jacobian": jacobian}), (by_loop, {}))
        )
        for a, b in zip(got, right, strict=True):
            np.testing.assert_allclose(flat(a), flat(b), rtol=0, atol=1e-11 * np.abs(flat(b)).max())


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_vmap_over_parameters(jacobian):
    rng = np.random.default_rng(13)
    some = [network(rng, scale=scale) for scale in (1.0, 12.0, 0.3)]
    stack = as_params(jax.tree.map(lambda *a: np.stack(a), *some), MODES[2])
    x, h0 = inputs(rng, 40)
    d, (_, _, info) = each_network(gru_jax.gru_parallel, jacobian, stack, x, h0)
    assert info.converged.shape == (3, B)
    assert info.converged[0].all()
    assert info.converged[2].all()
    assert not info.converged[1].any()
    d_right, _ = each_network(by_loop, None, stack, x, h0)
    for got, right in zip(jax.tree.leaves(d), jax.tree.leaves(d_right), strict=True):
        for n in (0, 2):  # the gradients of the chaotic one are no numbers to compare
            assert_equal_leaves(got[n], right[n], 1e-12)


@pytest.mark.parametrize(("jacobian", "dtype"), [("full", "bfloat16"), ("diagonal", "float16")])
def test_types_projectors_and_activations(jacobian, dtype):
    rng = np.random.default_rng(15)
    arrays = network(rng, P_o=3, dtype="float32")
    params = as_params(arrays, MODES[2], jnp.sin, "hard-sigmoid")
    x, h0 = inputs(rng, 12, dtype="float32")
    rounded = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, x))
    y, hidden, info = gru_jax.gru_parallel(*rounded, h0, jacobian=jacobian, output_mode="last")
    right, last = gru_jax.gru(*rounded, h0, output_mode="last")
    assert info.converged.all()
    assert (y.dtype, hidden.dtype) == (right.dtype, last.dtype)
    np.testing.assert_allclose(hidden, last, rtol=0, atol=1e-6)


def test_shapes_of_batch_and_time():
    rng = np.random.default_rng(17)
    params, (x, h0) = as_params(network(rng), MODES[2]), inputs(rng, 3)
    for data, start in ((x[0], h0[0]), (x[:1, None], h0[:1, None]), (x[:0], h0[:0]),
                        (x[:, None, :1], h0[:, None]), (x[:, :0], h0)):  # fmt: skip
        y, hidden, info = gru_jax.gru_parallel(params, data, start)
        right, last = gru_jax.gru(params, data, start)
        assert relative_error(y, right) < 1e-13
        assert relative_error(hidden, last) < 1e-13
        assert {a.shape for a in info} == {data.shape[:-2]}
        assert info.converged.all()


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_layers_take_it_as_an_implementation(face):
    x = jax.random.normal(jax.random.key(0), (B, 6, CHANNELS))
    options = {"has_state_outputs": True}
    if face == "nnx":
        from flax import nnx as flax_nnx

        layers = [
            gru_jax.nnx.GRULayer(H, input_size=CHANNELS, rngs=flax_nnx.Rngs(1), implementation=how,
                                 **options) for how in ("parallel", "scan")
        ]  # fmt: skip
        got, right = (layer(x) for layer in layers)
    else:
        layers = [gru_jax.linen.GRULayer(H, implementation=how, **options)
                  for how in ("parallel", "scan")]  # fmt: skip
        variables = layers[1].init(jax.random.key(1), x)
        got, right = (layer.apply(variables, x) for layer in layers)
    np.testing.assert_allclose(flat(got), flat(right), rtol=0, atol=1e-12)


def test_data_parallel_over_a_mesh():
    rng = np.random.default_rng(21)
    params, (x, h0) = as_params(network(rng), MODES[2]), inputs(rng, 6)
    x, h0 = (jnp.concatenate([a, a[:1]]) for a in (x, h0))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    got = everything(gru_jax.gru_parallel, params, *jax.device_put((x, h0), rows))
    d_right, right = everything(by_loop, params, x, h0)
    np.testing.assert_allclose(flat(got[0]), flat(d_right), rtol=0, atol=1e-12)
    mapped = jax.shard_map(
        lambda p, x, h: gru_jax.gru_parallel(p, x, h), mesh=mesh,
        in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P("data"),
    )  # fmt: skip
    y, hidden, info = jax.jit(mapped)(params, x, h0)
    assert info.converged.all()
    assert got[1][2].converged.all()
    for a in ((y, hidden), got[1][:2]):
        np.testing.assert_allclose(flat(a), flat(right), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"jacobian": "none"}, ValueError, ("jacobian", "'full', 'diagonal'", "'none'")),
        ({"tolerance": 0.0}, ValueError, ("tolerance", "positive", "0.0")),
        ({"tolerance": "small"}, TypeError, ("tolerance", "positive number", "'small'")),
        ({"max_iterations": 0}, ValueError, ("max_iterations", "positive integer", "0")),
        ({"max_iterations": 1.5}, TypeError, ("max_iterations", "positive integer", "1.5")),
    ],
)
def test_wrong_options(options, error, words):
    rng = np.random.default_rng(0)
    with pytest.raises(error) as raised:
        gru_jax.gru_parallel(as_params(network(rng), MODES[2]), inputs(rng, 4)[0], **options)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("options", [{"unroll": 2}, {"checkpoint": 1}, {"checkpoint": "sqrt"}])
def test_what_belongs_to_a_loop_is_refused(options):
    rng = np.random.default_rng(0)
    params, (x, _) = as_params(network(rng), MODES[2]), inputs(rng, 4)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be None .*no loop over time"):
        gru_jax.gru(params, x, implementation="parallel", **options)


def test_symbolic_time_is_refused():
    params = as_params(network(np.random.default_rng(0)), MODES[2])
    (t,) = export.symbolic_shape("t")
    with pytest.raises(ValueError, match="time axis is symbolic"):
        export.export(jax.jit(lambda x: gru_jax.gru(params, x, implementation="parallel")))(
            jax.ShapeDtypeStruct((2, t, CHANNELS), jnp.float64)
        )
