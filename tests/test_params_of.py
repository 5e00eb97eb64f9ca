"""From layers to `GRUParams` and back to bytes: what is computed stays what it was."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from reference import MODES

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import optim

H, I, SIZES = 5, 3, (5, 4, 2)  # noqa: E741
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, I)), "float32")
OPTIONS = [
    {},
    {"reset_gate_mode": MODES[1], "state_activation_function": "softsign"},
    {"reset_gate_mode": MODES[2], "gate_activation_function": "hard-sigmoid"},
]
RANDOM = {"bias_initializer": "narrow-normal"}


def assert_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["GRULayer", "GRUProjectedLayer"])
def test_params_of_compute_what_the_layer_computes(kind, options):
    sizes = SIZES if kind == "GRUProjectedLayer" else (H,)
    layer = getattr(gru_jax.linen, kind)(*sizes, **options, **RANDOM)
    y, variables = layer.init_with_output(jax.random.key(0), X)
    params = gru_jax.params_of(layer, variables["params"])
    np.testing.assert_array_equal(gru_jax.gru(params, X)[0], y)
    assert_equal(gru_jax.params_of(layer.bind(variables)), params)

    layer = getattr(gru_jax.nnx, kind)(*sizes, input_size=I, rngs=nnx.Rngs(0), **options, **RANDOM)
    params = gru_jax.params_of(layer)
    np.testing.assert_array_equal(gru_jax.gru(params, X)[0], layer(X))
    assert_equal(gru_jax.params_of(layer, nnx.state(layer, nnx.Param)), params)


def test_params_of_take_boxes_cells_and_both_directions():
    layer = gru_jax.linen.GRULayer(H, bias_metadata={"out_sharding": ("hidden",)})
    boxed = layer.init(jax.random.key(0), X)["params"]
    assert isinstance(boxed["bias"], nn.Partitioned)
    assert_equal(gru_jax.params_of(layer, boxed), gru_jax.GRUParams(**nn.unbox(boxed)))
    cell = gru_jax.nnx.GRUCell(H, input_size=I, rngs=nnx.Rngs(0), reset_gate_mode=MODES[2])
    assert gru_jax.params_of(cell).reset_gate_mode == MODES[2]
    for layer, held in (
        (gru_jax.nnx.BidirectionalGRULayer(H, input_size=I, rngs=nnx.Rngs(0)), None),
        (gru_jax.linen.BidirectionalGRULayer(H), "params"),
    ):
        if held:
            held = layer.init(jax.random.key(0), X)["params"]
        forward, backward = gru_jax.params_of(layer, held)
        y = layer.apply({"params": held}, X) if held else layer(X)
        parts = gru_jax.gru(forward, X)[0], gru_jax.gru(backward, X, reverse=True)[0]
        np.testing.assert_array_equal(jnp.concatenate(parts, -1), y)


def test_params_of_errors():
    layer = gru_jax.linen.GRULayer(H)
    variables = layer.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match=r"layer must be a GRU layer or cell.*got Dense"):
        gru_jax.params_of(nn.Dense(3), variables)
    for learnables in (None, variables, {"bias": 1}):
        with pytest.raises(ValueError, match="learnables must be those of this layer alone"):
            gru_jax.params_of(layer, learnables)
    with pytest.raises(ValueError, match="num_hidden_units of this GRULayer is 6"):
        gru_jax.params_of(gru_jax.linen.GRULayer(6), variables["params"])
    with pytest.raises(TypeError, match=r"gru_jax\.params_of\(layer"):
        gru_jax.gru(layer, X)


def test_pure_layers_of_nnx():
    layer = gru_jax.nnx.GRULayer(H, input_size=I, rngs=nnx.Rngs(0))
    pure = nnx.as_pure(layer)
    np.testing.assert_array_equal(pure(X), layer(X))
    assert str(pure) == str(layer)
    cell = gru_jax.nnx.GRUCell(H, input_size=I, rngs=nnx.Rngs(0))
    one, two = (nnx.RNN(c, rngs=nnx.Rngs(1))(X) for c in (nnx.as_pure(cell), cell))
    np.testing.assert_array_equal(one, two)
    stream = gru_jax.nnx.GRULayer(H, input_size=I, stateful=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"stateful must be False: nnx\.as_pure"):
        nnx.as_pure(stream)(X)


def test_params_and_the_states_of_their_solvers_are_saved_by_flax():
    params = gru_jax.init_params(jax.random.key(0), H, I)
    solver = optim.training_solver("adam", None, params)
    state = jax.tree.map(lambda a: a + 1, solver.init(params))
    fresh = jax.tree.map(jnp.zeros_like, (params, state))
    restored = serialization.from_bytes(fresh, serialization.to_bytes((params, state)))
    assert_equal(restored, (params, state))
    assert restored[0].reset_gate_mode == params.reset_gate_mode
    with pytest.raises(ValueError, match="bias"):
        serialization.from_state_dict(params, {"input_weights": params.input_weights})
