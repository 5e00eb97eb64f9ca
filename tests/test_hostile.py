"""What a determined user does to the library, and what must not come of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_params, random_params
from flax import nnx

import gru_jax
import gru_jax.linen
import gru_jax.nnx

B, T, INPUTS, H = 2, 7, 3, 5
LENGTHS = np.array([7, 3])


def problem():
    rng = np.random.default_rng(3)
    arrays = random_params(rng, H, INPUTS, "after-multiplication", dtype="float32")
    x = jnp.asarray(rng.normal(size=(B, T, INPUTS)), "float32")
    return as_params(arrays, "after-multiplication"), x


@pytest.mark.parametrize("hidden_state", [None, (1.0, -2.0, 3.0, 0.5, 0.25)])
@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_a_reset_in_a_stateful_stream_returns_to_the_initial_state(face, hidden_state):
    params, x = problem()
    fresh = gru_jax.nnx.GRULayer(H, hidden_state=hidden_state, **params.arrays())
    resets = jnp.array([[True], [False]])
    if face == "nnx":
        layer = gru_jax.nnx.GRULayer(H, stateful=True, hidden_state=hidden_state, **params.arrays())
        before = layer(x[:, :3])
        after = layer(x[:, 3:4], resets=resets)
    else:
        layer = gru_jax.linen.GRULayer(H, stateful=True, hidden_state=hidden_state)
        run = partial(layer.apply, mutable=["state"])
        before, state = run({"params": params.arrays()}, x[:, :3])
        after, _ = run({"params": params.arrays(), **state}, x[:, 3:4], resets=resets)
    np.testing.assert_allclose(after[0], fresh(x[:1, 3:4])[0], atol=1e-6)
    whole = fresh(x)
    np.testing.assert_allclose(before, whole[:, :3], atol=1e-6)
    np.testing.assert_allclose(after[1], whole[1, 3:4], atol=1e-6)
    assert np.abs(after[0] - whole[0, 3:4]).max() > 1e-2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("checkpoint", [2, 50, "sqrt"])
def test_an_empty_batch_in_segments(checkpoint, reverse):
    params, x = problem()
    run = lambda p: gru_jax.gru(p, x[:0], checkpoint=checkpoint, reverse=reverse)  # noqa: E731
    assert run(params)[0].shape == (0, T, H)
    grad = jax.grad(lambda p: sum(out.sum() for out in run(p)))(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grad))


@jax.custom_vjp
def reverse_only(a):
    return jnp.tanh(a)


reverse_only.defvjp(lambda a: (jnp.tanh(a), a), lambda a, g: (g,))


def signed_root(a):
    """Its slope at 0 is infinite."""
    return jnp.sign(a) * jnp.sqrt(jnp.abs(a))


def test_skipped_steps_stay_out_of_gradients_of_singular_activations():
    params, x = problem()
    params = params.replace(bias=0.0 * params.bias, state_activation_function=signed_root)
    mask = jnp.arange(T)[None] >= T - LENGTHS[:, None]
    loss = lambda p, x, m: jnp.sum(gru_jax.gru(p, x, mask=m)[1][1])  # noqa: E731
    masked = jax.grad(loss)(params, x, mask)
    short = jax.grad(lambda p: jnp.sum(gru_jax.gru(p, x[1:, T - LENGTHS[1] :])[1]))(params)
    for actual, expected in zip(jax.tree.leaves(masked), jax.tree.leaves(short), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_skipped_steps_that_would_overflow_leave_the_gradient_of_the_state_alone():
    params, x = problem()
    large = params.replace(
        recurrent_weights=params.recurrent_weights * 1e25, state_activation_function=jax.nn.relu
    )
    nothing = jnp.zeros((B, T), bool)
    hidden = lambda h0: gru_jax.gru(large, x, h0, mask=nothing)[1].sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(hidden)(jnp.full((B, H), 1e20, "float32")), 1.0)


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_learnables_of_another_size_are_not_taken_silently(face):
    params, x = problem()
    if face == "linen":
        variables = {"params": params.arrays()}
        wide = partial(gru_jax.linen.GRULayer(50).apply, variables)
        narrow = partial(gru_jax.linen.GRULayer(H, input_size=12).apply, variables)
    else:
        wide = gru_jax.nnx.GRULayer(50, input_size=INPUTS, rngs=nnx.Rngs(0))
        narrow = gru_jax.nnx.GRULayer(H, input_size=12, rngs=nnx.Rngs(0))
        for layer in (wide, narrow):
            for name, value in params.arrays().items():
                setattr(layer, name, nnx.Param(value))
    with pytest.raises(ValueError, match=r"num_hidden_units of this GRULayer is 50.*for 5"):
        wide(x)
    with pytest.raises(ValueError, match=r"input_size of this GRULayer is 12.*for 3"):
        narrow(x)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (nnx.PReLU(), "without parameters"),
        (np.tanh, "that JAX can trace"),
        (lambda a: float(a), "that JAX can trace"),
        (jax.nn.softmax, "each element by itself"),
        (lambda a: jnp.cumsum(a, -1), "each element by itself"),
        (lambda a: jnp.cumsum(a[::-1], -1)[::-1], "each element by itself"),
        (reverse_only, "differentiate in forward mode"),
        (lambda a: a.sum(), "argument's shape"),
    ],
)
def test_activations_that_cannot_be_right(function, match):
    params, _ = problem()
    for option in ("state_activation_function", "gate_activation_function"):
        with pytest.raises(ValueError, match=f"{option} must .*{match}"):
            params.replace(**{option: function})


def test_an_array_assigned_to_an_absent_projector_becomes_a_learnable():
    params, x = problem()
    layer = gru_jax.nnx.GRULayer(H, **params.arrays())
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(INPUTS, 2)))[0].astype("float32")
    layer.input_projector = Q
    layer.input_weights = nnx.Param(params.input_weights @ Q)
    dense = params.replace(input_weights=params.input_weights @ (Q @ Q.T))
    np.testing.assert_allclose(layer(x), gru_jax.gru(dense, x)[0], atol=1e-6)
    assert isinstance(layer.input_projector, nnx.Param)


def test_a_donated_layer_leaves_the_arrays_it_was_made_from():
    params, x = problem()
    layer = gru_jax.nnx.GRULayer(H, **params.arrays())
    nnx.jit(lambda layer, x: layer(x), donate_argnums=0)(layer, x)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_a_state_port_in_another_layout_is_named(face):
    params, x = problem()
    options = {"data_format": "CBT", "has_state_inputs": True}
    h = jnp.ones((H, B), "float32")
    if face == "nnx":
        layer = gru_jax.nnx.GRULayer(H, **options, **params.arrays())
    else:
        made = gru_jax.linen.GRULayer(H, **options)
        layer = partial(made.apply, {"params": params.arrays()})
    matlab = jnp.moveaxis(x, -1, 0)
    assert layer(matlab, h).shape == (H, B, T)
    with pytest.raises(ValueError, match=r"hidden must have shape \(5, 2\), axes 'CB'.*\(2, 5\)"):
        layer(matlab, h.T)


def test_values_that_numpy_makes_are_taken():
    params, x = problem()
    layer = gru_jax.nnx.GRULayer(
        np.float32(H), bias_l2_factor=np.array(2.0), stateful=np.int32(1), **params.arrays()
    )
    assert (layer.bias_l2_factor, layer.stateful) == (2.0, True)
    assert gru_jax.gru(params, x[:0], lengths=[])[0].shape == (0, T, H)


def test_ports_and_memory_exclude_each_other():
    for face in (gru_jax.linen, gru_jax.nnx):
        with pytest.raises(ValueError, match="stateful must be False where has_state_inputs"):
            face.GRULayer(H, stateful=True, has_state_inputs=True)
    with pytest.raises(TypeError, match=r"rngs must be an nnx\.Rngs"):
        gru_jax.nnx.GRULayer(H, input_size=3, rngs=jax.random.key(0))
    with pytest.raises(TypeError, match="lengths must be integers"):
        gru_jax.gru(*problem(), lengths=[[1], [1, 2]])
