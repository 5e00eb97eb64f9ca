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


def flags_of(rng, name, T):
    lengths, mask = np.array([T, 0, T // 2], np.int32), rng.random((B, T)) < 0.7
    resets = rng.random((B, T)) < 0.15
    return {
        "plain": {}, "lengths": {"lengths": lengths}, "mask": {"mask": mask},
        "resets": {"resets": resets}, "mask and resets": {"mask": mask, "resets": resets},
    }[name]  # fmt: skip


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def weighted(run, rng_seed=3):
    """A loss of everything that `run` returns, with random weights."""

    def loss(params, x, h0):
        y, hidden = run(params, x, h0)[:2]
        rng = np.random.default_rng(rng_seed)
        weights = [jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in (y, hidden)]
        return sum(jnp.sum(w * a) for w, a in zip(weights, (y, hidden), strict=True))

    return loss


def assert_equal_gradients(run, other, arguments, tolerance):
    """Each leaf of the gradients, relative to its largest number."""
    got, right = (jax.jit(jax.grad(weighted(f), (0, 1, 2)))(*arguments) for f in (run, other))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize(
    ("mode", "flags", "reverse"),
    [
        (MODES[0], "mask and resets", True),
        (MODES[1], "lengths", True),
        (MODES[1], "resets", False),
        (MODES[2], "mask", False),
    ],
)
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_values_and_gradients_are_those_of_a_plain_loop(jacobian, mode, flags, reverse):
    rng = np.random.default_rng(1)
    arrays, (x, h0), flags = network(rng, mode=mode), inputs(rng, 12), flags_of(rng, flags, 12)
    if "mask" in flags:
        x[~flags["mask"]] = np.nan
    options = {"reverse": reverse, **flags}
    params = as_params(arrays, mode)
    run = partial(gru_jax.gru_parallel, jacobian=jacobian, **options)
    right, last = gru_ref(arrays, x, h0, mode=mode, **options)
    cy, ch = rng.normal(size=right.shape), rng.normal(size=last.shape)

    def loss(params, x, h0):
        y, hidden, info = run(params, x, h0)
        return jnp.sum(cy * y) + jnp.sum(ch * hidden), (y, hidden, info)

    (d_params, d_x, d_h0), found = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, h0)
    y, hidden, info = found
    assert info.converged.all()
    assert relative_error(y, right) < 1e-12
    assert relative_error(hidden, last) < 1e-12
    grads = gru_ref_grads(arrays, x, h0, cy, ch, mode=mode, **options)
    for name, got in {"x": d_x, "h0": d_h0, **d_params.arrays()}.items():
        assert got is None or relative_error(got, grads[name]) < 1e-12, name


@pytest.mark.parametrize(("units", "mode"), [*zip((1, 4, 16), MODES, strict=True)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("jacobian", "least", "most"), [("full", 3, 6), ("diagonal", 4, 28)])
def test_networks_that_forget_converge_in_few_steps(jacobian, least, most, dtype, mode, units):
    rng = np.random.default_rng(units)
    arrays, (x, h0) = (
        network(rng, units, mode=mode, dtype=dtype),
        inputs(rng, 200, units, CHANNELS, dtype),
    )
    arguments = as_params(arrays, mode), x, h0
    run = partial(gru_jax.gru_parallel, jacobian=jacobian)
    y, hidden, info = run(*arguments)
    assert info.converged.all()  # so that no loop hides what comes
    assert least <= info.iterations.min() <= info.iterations.max() <= most
    assert (info.error <= {"float32": 5e-7, "float64": 5e-13}[dtype]).all()
    right, last = gru_jax.gru(*arguments)
    assert relative_error(y, right) < TOLERANCE[dtype]
    assert relative_error(hidden, last) < TOLERANCE[dtype]
    assert_equal_gradients(run, gru_jax.gru, arguments, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "mode"), [("float32", MODES[0]), ("float64", MODES[1])])
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_chaotic_networks_fall_back_and_equal_the_loop(jacobian, dtype, mode):
    rng = np.random.default_rng(5)
    arrays = network(rng, 16, mode=mode, scale=12.0, dtype=dtype)
    x, h0 = inputs(rng, 100, 16, CHANNELS, dtype)
    arguments = as_params(arrays, mode), 0.1 * x, h0
    shaken = arguments[0], arguments[1], h0 * (1 + 1e-6)
    right = gru_jax.gru(*arguments)[0]
    assert np.abs(gru_jax.gru(*shaken)[0] - right).max() > 0.01  # it is chaotic
    run = partial(gru_jax.gru_parallel, jacobian=jacobian)
    y, _, info = run(*arguments)
    assert not info.converged.any()
    assert (info.iterations < 32).all()  # given up early
    np.testing.assert_array_equal(y, right)
    short = arguments[0], arguments[1][:, :20], arguments[2]  # where gradients can be compared
    assert_equal_gradients(run, gru_jax.gru, short, 1e-6 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_each_sequence_is_judged_by_itself(jacobian):
    rng = np.random.default_rng(7)
    arrays = network(rng, 16, scale=12.0)
    x, h0 = inputs(rng, 100, 16)
    resets = np.zeros((B, 100), bool)
    resets[1] = True  # nothing is amplified here
    x[2, 50] = np.nan
    params = as_params(arrays, MODES[2])
    y, hidden, info = gru_jax.gru_parallel(params, x, h0, resets=resets, jacobian=jacobian)
    assert info.converged.tolist() == [False, True, False]
    right, last = gru_jax.gru(params, x, h0, resets=resets)
    np.testing.assert_allclose(y, right, rtol=0, atol=1e-12)
    np.testing.assert_allclose(hidden, last, rtol=0, atol=1e-12)
    assert np.isnan(y[2, 50:]).all()
    assert np.isfinite(y[2, :50]).all()


@pytest.mark.parametrize(("T", "units"), [(3, 6), (60, 1), (61, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_hostile_networks(jacobian, dtype, units, T):
    """Of all scales, biases and states: what is accepted equals the loop."""
    N, mode = 60, MODES[T % 3]
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


def test_a_state_that_happens_to_be_exact_is_no_proof():
    """A residual of exactly 0, where the next program rounds otherwise and ends elsewhere."""
    rng = np.random.default_rng(0)
    arrays = network(rng, 16, scale=12.0, dtype="float32")
    x, h0 = inputs(rng, 60, 16, CHANNELS, "float32")
    params, T = as_params(arrays, MODES[2]), x.shape[1]
    for jacobian in JACOBIANS:
        many = {"max_iterations": 10 * T, "jacobian": jacobian}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_newton, "PATIENCE", 10 * T)
            info = gru_jax.gru_parallel(params, 0.1 * x[:, : T - 1], h0, **many)[2]
        assert not info.converged.any()


def test_tolerance_and_iterations():
    rng = np.random.default_rng(9)
    params, (x, h0) = as_params(network(rng), MODES[2]), inputs(rng, 40)
    right = gru_jax.gru(params, x, h0)[0]
    for jacobian in JACOBIANS:
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


@pytest.mark.parametrize("jacobian", JACOBIANS)
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_derivatives_of_every_kind(jacobian, scale):
    rng = np.random.default_rng(11)
    arrays, (x, h0) = network(rng, 4, mode=MODES[1], scale=scale), inputs(rng, 9, 4)
    arguments = as_params(arrays, MODES[1]), x, h0
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), arguments)
    flags = {"resets": rng.random((B, 9)) < 0.2, "lengths": np.array([9, 4, 7])}
    run = partial(gru_jax.gru_parallel, jacobian=jacobian, **flags)
    losses = [weighted(f) for f in (run, partial(gru_jax.gru, **flags))]
    for transform in (
        lambda f: lambda *a: jax.jvp(f, a, direction)[1],
        lambda f: lambda *a: jax.jvp(jax.grad(f, (0, 1, 2)), a, direction)[1],
        lambda f: jax.grad(lambda *a: jax.jvp(f, a, direction)[1] ** 2, (0, 1, 2)),
    ):
        got, right = (flat(jax.jit(transform(loss))(*arguments)) for loss in losses)
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-11 * np.abs(right).max())


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_vmap_over_parameters(jacobian):
    rng = np.random.default_rng(13)
    some = [network(rng, scale=scale) for scale in (1.0, 12.0, 0.3)]
    stack = as_params(jax.tree.map(lambda *a: np.stack(a), *some), MODES[2])
    x, h0 = inputs(rng, 60)
    run = partial(gru_jax.gru_parallel, jacobian=jacobian)
    info = jax.vmap(run, (0, None, None))(stack, x, h0)[2]
    assert info.converged.shape == (3, B)
    assert info.converged[0].all()
    each = jax.vmap(jax.value_and_grad(weighted(run)), (0, None, None))(stack, x, h0)
    right = jax.vmap(jax.value_and_grad(weighted(gru_jax.gru)), (0, None, None))(stack, x, h0)
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(right), strict=True):
        axes = tuple(range(1, b.ndim))
        scale = np.abs(b).max(axes, keepdims=True)
        assert (np.abs(a - b) / scale)[[0, 2]].max() < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_types_projectors_and_activations(jacobian, dtype):
    rng = np.random.default_rng(15)
    arrays = network(rng, P_o=3, dtype="float32")
    params = as_params(arrays, MODES[2], jnp.sin, "hard-sigmoid")
    x, h0 = inputs(rng, 40, dtype="float32")
    rounded = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, x))
    y, hidden, info = gru_jax.gru_parallel(*rounded, h0, jacobian=jacobian, output_mode="last")
    right, last = gru_jax.gru(*rounded, h0, output_mode="last")
    assert info.converged.all()
    assert (y.dtype, hidden.dtype) == (right.dtype, last.dtype)
    np.testing.assert_allclose(hidden, last, rtol=0, atol=1e-6)


def test_shapes_of_batch_and_time():
    rng = np.random.default_rng(17)
    params, (x, h0) = as_params(network(rng), MODES[2]), inputs(rng, 8)
    for data, start in ((x[0], h0[0]), (x[:1, None], h0[:1, None]), (x[:, None], h0[:, None]),
                        (x[:0], h0[:0]), (x[:, :0], h0), (x[:, :1], h0)):  # fmt: skip
        y, hidden, info = gru_jax.gru_parallel(params, data, start)
        right, last = gru_jax.gru(params, data, start)
        assert relative_error(y, right) < 1e-13
        assert relative_error(hidden, last) < 1e-13
        assert {a.shape for a in info} == {data.shape[:-2]}
        assert info.converged.all()


def test_a_skipped_step_keeps_the_state_bit_by_bit():
    rng = np.random.default_rng(19)
    params, (x, h0) = as_params(network(rng), MODES[2]), inputs(rng, 30)
    for reverse, at in ((False, 11), (True, 0)):
        y, hidden, _ = gru_jax.gru_parallel(
            params, x, h0, lengths=np.array([30, 12, 0]), reverse=reverse
        )
        np.testing.assert_array_equal(hidden[1], y[1, at])
        np.testing.assert_array_equal(hidden[2], h0[2])
        assert not y[1, 12:].any()


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_layers_take_it_as_an_implementation(face):
    x = jax.random.normal(jax.random.key(0), (B, 20, CHANNELS))
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
        variables = layers[0].init(jax.random.key(1), x)
        got, right = (layer.apply(variables, x) for layer in layers)
    np.testing.assert_allclose(flat(got), flat(right), rtol=0, atol=1e-12)


def test_data_parallel_over_a_mesh():
    rng = np.random.default_rng(21)
    params, (x, h0) = as_params(network(rng), MODES[2]), inputs(rng, 20)
    x, h0 = (jnp.concatenate([a, a[:1]]) for a in (x, h0))
    grad = jax.jit(jax.grad(weighted(gru_jax.gru_parallel), (0, 1, 2)))
    right = grad(params, x, h0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    got = grad(params, *jax.device_put((x, h0), rows))
    np.testing.assert_allclose(flat(got), flat(right), rtol=0, atol=1e-12)
    mapped = jax.shard_map(
        lambda p, x, h: gru_jax.gru_parallel(p, x, h), mesh=mesh,
        in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P("data"),
    )  # fmt: skip
    y, _, info = jax.jit(mapped)(params, x, h0)
    assert info.converged.all()
    np.testing.assert_allclose(y, gru_jax.gru(params, x, h0)[0], rtol=0, atol=1e-12)


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
