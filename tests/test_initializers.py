"""Initialisers: moments over the whole stacked array, as the pages state them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import init_params

H, I = 100, 12  # noqa: E741
P_O, P_I = 25, 9
KEY = jax.random.key(7)
SIZES = {"input_projector_size": P_I, "output_projector_size": P_O}
NAMES = ("glorot", "he", "orthogonal", "narrow-normal", "zeros", "ones")
PROJECTED = {
    "input_weights": (3 * H, P_I),
    "recurrent_weights": (3 * H, P_O),
    "input_projector": (I, P_I),
    "output_projector": (H, P_O),
}
DENSE = {"input_weights": (3 * H, I), "recurrent_weights": (3 * H, H)}
FANS = [  # array, its shape, fan-in and fan-out as on the pages
    ("input_weights", DENSE["input_weights"], I, 3 * H),
    ("recurrent_weights", DENSE["recurrent_weights"], H, 3 * H),
    ("input_weights", PROJECTED["input_weights"], P_I, 3 * H),
    ("recurrent_weights", PROJECTED["recurrent_weights"], P_O, 3 * H),
    ("input_projector", PROJECTED["input_projector"], I, P_I),
    ("output_projector", PROJECTED["output_projector"], H, P_O),
]


@functools.cache
def draws(initializer, sizes):
    """Sixteen draws of every matrix, by one program; "rbg" keys compile sooner than others."""
    chosen = {f"{leaf}_initializer": initializer for leaf in PROJECTED}
    make = jax.jit(lambda key: init_params(key, H, I, **dict(sizes), **chosen).arrays())
    made = [make(jax.random.key(i, impl="rbg")) for i in range(16)]
    return {leaf: np.stack([np.float64(one[leaf]) for one in made]) for leaf in made[0]}


def many(leaf, shape, initializer):
    """Sixteen draws of one matrix."""
    sizes = () if shape in DENSE.values() else tuple(SIZES.items())
    values = draws(initializer, sizes)[leaf]
    assert values.shape == (16, *shape)
    return values


def assert_moments(values, variance):
    """Mean and variance within five standard errors of those of a normal or uniform draw."""
    n = values.size
    assert abs(values.mean()) < 5 * np.sqrt(variance / n)
    assert abs(values.var() / variance - 1) < 5 * np.sqrt(2 / n)


def test_glorot():
    for leaf, shape, fan_in, fan_out in FANS:
        values = many(leaf, shape, "glorot")
        bound = np.sqrt(6 / (fan_in + fan_out))
        assert_moments(values, 2 / (fan_in + fan_out))
        assert np.abs(values).max() <= bound * (1 + 1e-6)
        quarters, _ = np.histogram(values, bins=4, range=(-bound, bound))
        error = np.abs(quarters / values.size - 0.25).max()
        assert error < 2.5 / np.sqrt(values.size)  # uniform


def test_he():
    for leaf, shape, fan_in, _ in FANS:
        values = many(leaf, shape, "he")
        assert_moments(values, 2 / fan_in)
        kurtosis = (values**4).mean() / values.var() ** 2
        assert abs(kurtosis - 3) < 5 * np.sqrt(24 / values.size)  # normal, and not truncated


def test_narrow_normal_and_constants():
    for leaf, shape, _, _ in FANS:
        values = many(leaf, shape, "narrow-normal")
        assert_moments(values, 1e-4)
        assert np.abs(values).max() > 0.025
        assert (many(leaf, shape, "zeros") == 0).all()
        assert (many(leaf, shape, "ones") == 1).all()


def test_orthogonal_columns_go_across_all_gates():
    for leaf, shape, _, _ in FANS:
        values = many(leaf, shape, "orthogonal")
        for q in values:
            np.testing.assert_allclose(q.T @ q, np.eye(shape[1]), atol=1e-5)
        assert np.abs(values[0] - values[1]).max() > 0.01
        if leaf == "recurrent_weights":  # no gate is orthogonal by itself
            gate = values[0][:H]
            assert np.abs(gate.T @ gate - np.eye(shape[1])).max() > 0.1
        signs = np.mean(np.diagonal(values, axis1=1, axis2=2) > 0)
        assert 0.3 < signs < 0.7  # the QR's own signs would all be equal


def test_orthogonal_rows_where_wide():
    params = init_params(KEY, 2, 40, input_weights_initializer="orthogonal")
    q = np.asarray(params.input_weights, np.float64)
    assert q.shape == (6, 40)
    np.testing.assert_allclose(q @ q.T, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("rows", [3 * H, 6 * H])
def test_bias(rows):
    mode = "recurrent-bias-after-multiplication" if rows == 6 * H else "after-multiplication"

    def bias(initializer):
        options = {"reset_gate_mode": mode, "bias_initializer": initializer}
        make = jax.jit(lambda key: init_params(key, H, I, **options).bias)
        made = [make(jax.random.key(i, impl="rbg")) for i in range(16)]
        return np.stack([np.float64(one) for one in made])

    values = bias("narrow-normal")
    assert values.shape == (16, rows)
    assert_moments(values, 1e-4)
    assert (bias("zeros") == 0).all()
    assert (bias("ones") == 1).all()


def test_defaults_of_the_pages():
    sizes = {"input_projector_size": 2, "output_projector_size": 3}
    params = init_params(KEY, 4, 5, **sizes)
    explicit = init_params(
        KEY, 4, 5, **sizes, input_weights_initializer="glorot",
        recurrent_weights_initializer="orthogonal", bias_initializer="zeros",
        input_projector_initializer="orthogonal", output_projector_initializer="orthogonal",
    )  # fmt: skip
    for name, array in params.arrays().items():
        np.testing.assert_array_equal(array, getattr(explicit, name))
        assert array.dtype == jnp.float32


def test_keys():
    draw = functools.partial(init_params, num_hidden_units=4, input_size=5)
    sizes = {"input_projector_size": 2, "output_projector_size": 3}
    one, same = (draw(jax.random.key(0), **sizes) for _ in "ab")
    other = draw(jax.random.key(1), **sizes)
    old_style = draw(jax.random.PRNGKey(0), **sizes)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, getattr(same, name))
        np.testing.assert_array_equal(array, getattr(old_style, name))
        assert name == "bias" or (array != getattr(other, name)).any()
    square = init_params(KEY, 4, 4, recurrent_weights_initializer="glorot")
    assert (square.input_weights != square.recurrent_weights).all()  # every array has its own key
    dense = draw(jax.random.key(0))  # a projector does not change the other arrays
    half = draw(jax.random.key(0), output_projector_size=3)
    np.testing.assert_array_equal(dense.input_weights, half.input_weights)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_float64(name):
    options = {"input_weights_initializer": name, "recurrent_weights_initializer": name}
    wide = init_params(KEY, 20, 8, **options)
    narrow = init_params(KEY, 20, 8, **options, dtype=jnp.bfloat16)
    for leaf, array in narrow.arrays().items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, getattr(wide, leaf).astype(jnp.bfloat16))
    double = init_params(KEY, 20, 8, **options, dtype="float64").recurrent_weights
    assert double.dtype == jnp.float64
    if name == "orthogonal":
        np.testing.assert_allclose(double.T @ double, np.eye(20), atol=1e-12)


def test_functions_get_the_size_of_the_whole_array():
    calls = []

    def recorder(key, shape, dtype):
        calls.append((shape, dtype, jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)))
        return jnp.full(shape, len(calls), dtype)

    names = (*PROJECTED, "bias")
    options = {f"{name}_initializer": recorder for name in names}
    mode = "recurrent-bias-after-multiplication"
    params = init_params(KEY, H, I, **SIZES, **options, reset_gate_mode=mode, dtype=jnp.bfloat16)
    shapes = {(3 * H, P_I), (3 * H, P_O), (6 * H,), (I, P_I), (H, P_O)}
    assert set(calls) == {(shape, jnp.dtype(jnp.bfloat16), True) for shape in shapes}
    assert len(calls) == 5
    assert {float(array.ravel()[0]) for array in params.arrays().values()} == {1, 2, 3, 4, 5}

    own = init_params(KEY, 4, 3, input_weights_initializer=jax.nn.initializers.he_uniform())
    assert own.input_weights.shape == (12, 3)


def test_both_faces_draw_from_the_same_table():
    leaves = gru_jax.linen.GRUProjectedLayer(
        H, P_O, P_I, input_weights_initializer="ones", input_projector_initializer="narrow-normal"
    ).init(KEY, jnp.ones((1, 1, I), "float32"))["params"]
    layer = gru_jax.nnx.GRUProjectedLayer(
        H, P_O, P_I, input_weights_initializer="ones", input_projector_initializer="narrow-normal",
        input_size=I, rngs=nnx.Rngs(0),
    )  # fmt: skip
    made = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    for face in (leaves, made):
        assert {name: face[name].shape for name in PROJECTED} == PROJECTED
        assert (face["input_weights"] == 1).all()
        assert float(jnp.abs(face["input_projector"]).max()) < 0.05
        for name in ("recurrent_weights", "output_projector"):
            q = np.asarray(face[name], np.float64)
            np.testing.assert_allclose(q.T @ q, np.eye(P_O), atol=1e-5)


def shapes(**options):
    return jax.eval_shape(lambda key: init_params(key, H, I, **options), KEY)


def test_learnables():
    dense, projected = shapes(), shapes(**SIZES)
    head = {"kernel": jnp.zeros((H, 9)), "bias": jnp.zeros(9)}
    assert gru_jax.num_learnables(dense) == 3 * H * I + 3 * H**2 + 3 * H == 33_900
    assert gru_jax.num_learnables(projected) == (3 * H + I) * P_I + 4 * H * P_O + 3 * H == 13_108
    assert gru_jax.num_learnables((dense, head)) == 34_809
    assert gru_jax.num_learnables((projected, head)) == 14_017
    assert round(100 * (1 - 14_017 / 34_809), 1) == 59.7
    mode = "recurrent-bias-after-multiplication"
    assert gru_jax.num_learnables(shapes(reset_gate_mode=mode)) == 34_200
    one_side = shapes(output_projector_size=P_O)
    assert gru_jax.num_learnables(one_side) == 3 * H * I + 4 * H * P_O + 3 * H
    small = init_params(KEY, 4, 3)
    assert gru_jax.num_learnables(small) == sum(a.size for a in small.arrays().values()) == 96


def test_under_jit_and_vmap():
    params = jax.jit(lambda key: init_params(key, 4, 3))(KEY)
    eager = init_params(KEY, 4, 3)
    np.testing.assert_allclose(params.recurrent_weights, eager.recurrent_weights, atol=1e-6)
    stack = jax.vmap(lambda key: init_params(key, 4, 3))(jax.random.split(KEY, 2))
    assert stack.input_weights.shape == (2, 12, 3)
    assert (stack.input_weights[0] != stack.input_weights[1]).all()


def test_the_result_of_a_function_is_cast_and_checked():
    ints = lambda key, shape, dtype: np.ones(shape, int)  # noqa: E731
    params = init_params(KEY, 5, 3, input_weights_initializer=ints)
    assert params.input_weights.dtype == jnp.float32
    for wrong in (lambda *_: [1.0, 2.0], lambda *_: np.ones((3, 15), "float32"), lambda *_: "no"):
        with pytest.raises(ValueError, match=r"must return an array of shape \(15, 3\)"):
            init_params(KEY, 5, 3, input_weights_initializer=wrong)


def test_boxes_of_both_flax_apis_pass_through():
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    names = (None, "a")
    draw = jax.nn.initializers.normal(1.0)
    with jax.set_mesh(mesh):
        layer = gru_jax.nnx.GRULayer(
            5,
            input_size=3,
            input_weights_initializer=nnx.with_partitioning(draw, names),
            recurrent_weights_metadata={"out_sharding": names},
            rngs=nnx.Rngs(0),
        )
    assert layer.input_weights.get_metadata()["out_sharding"] == names
    assert layer.recurrent_weights.get_metadata()["out_sharding"] == names
    boxed = gru_jax.linen.GRULayer(5, input_weights_initializer=nn.with_partitioning(draw, names))
    variables = boxed.init(KEY, jnp.ones((2, 4, 3), jnp.float32))
    assert variables["params"]["input_weights"].names == names
    assert boxed.apply(variables, jnp.ones((2, 4, 3), jnp.float32)).shape == (2, 4, 5)


def test_a_learnable_that_was_taken_away_is_named():
    layer = gru_jax.nnx.GRULayer(5, input_size=3, rngs=nnx.Rngs(0))
    layer.bias = None
    with pytest.raises(ValueError, match="must have input_weights, recurrent_weights and bias"):
        layer(jnp.ones((2, 4, 3), jnp.float32))
