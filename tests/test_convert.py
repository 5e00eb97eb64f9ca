"""Weights of PyTorch, Keras, Flax, Haiku and Equinox: the same numbers, there and back, or refused.

Recorded cases run everywhere, live ones where a framework is installed (Flax always is).
"""

import functools
import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import TOLERANCE, random_params, relative_error
from convert_cases import (
    OBJECTS,
    OPTIONS,
    PACKAGE,
    SHAPES,
    climate,
    inputs_of,
    recorded,
    run,
)
from flax import nnx
from reference import MODES
from torch_cases import KINDS
from torch_cases import recorded as torch_recorded

import gru_jax
from gru_jax import convert, projection

AFTER, BEFORE, RECURRENT_BIAS = MODES
DTYPES = ("float64", "float32", "float16", ml_dtypes.bfloat16)
SIZES = ((4, 3), (2, 6), (3, 1), (1, 2))  # (H, I): I ≠ H, 3H = I, I = 1, H = 1
# how each framework is read and written, the modes that it holds, and which gates have b_R there
FRAMEWORKS = {
    "torch": (convert.from_torch, convert.to_torch, (AFTER, RECURRENT_BIAS), "rzn"),
    "torch-cell": (
        functools.partial(convert.from_torch, layer=None),
        functools.partial(convert.to_torch, layer=None),
        (AFTER, RECURRENT_BIAS),
        "rzn",
    ),
    "keras": (convert.from_keras, convert.to_keras, MODES, "rzn"),
    "linen": (convert.from_flax, convert.to_flax, (AFTER, RECURRENT_BIAS), "n"),
    "nnx": (
        convert.from_flax,
        functools.partial(convert.to_flax, api="nnx"),
        (AFTER, RECURRENT_BIAS),
        "",
    ),
    "haiku": (
        lambda params, reset_gate_mode=None: convert.from_haiku(params),
        convert.to_haiku,
        (BEFORE,),
        "",
    ),
    "equinox": (convert.from_equinox, convert.to_equinox, (AFTER, RECURRENT_BIAS), "n"),
}
PAIRS = [(name, mode) for name, (_, _, modes, _) in FRAMEWORKS.items() for mode in modes]
DEFAULT = {"nnx": AFTER, "haiku": BEFORE}  # of the others the recurrent-bias mode


def params_of(framework, mode, H, I, dtype="float64", seed=0, **sizes):  # noqa: E741
    """Random parameters that the framework can hold."""
    arrays = random_params(np.random.default_rng(seed), H, I, mode, dtype=dtype, **sizes)
    if mode == RECURRENT_BIAS:
        for n, gate in enumerate("rzn"):
            if gate not in FRAMEWORKS[framework][3]:
                arrays["bias"][(3 + n) * H : (4 + n) * H] = 0
    return gru_jax.GRUParams(**arrays, reset_gate_mode=mode)


def assert_same(actual, expected):
    """Two trees of arrays are equal bit by bit, in types and shapes, and all of NumPy."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(one) is type(two) is np.ndarray
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.tobytes() == two.tobytes()


def need(kind):
    """Skips where the framework of a kind is not installed; returns its name."""
    framework = kind.split("-")[0]
    with climate("float32"):
        pytest.importorskip(PACKAGE.get(framework, framework))
    return framework


def read(kind, weights):
    """The parameters in weights of a kind of `convert_cases`."""
    framework = kind.split("-")[0]
    function = convert.from_flax if framework in PACKAGE else getattr(convert, f"from_{framework}")
    return function(weights, **OPTIONS.get(kind, {}))


def states_of(params, x, h0):
    return gru_jax.gru(jax.tree.map(jnp.asarray, params), jnp.asarray(x), jnp.asarray(h0))[0]


# The same numbers


@pytest.mark.parametrize(("kind", "dtype"), [*itertools.product(SHAPES, TOLERANCE)])
@pytest.mark.parametrize("source", ["recorded", "live"])
def test_computes_what_the_framework_computes(source, kind, dtype):
    if source == "live":
        need(kind)
        weights, x, h0 = inputs_of(kind, dtype, seed=100)
        with climate(dtype):
            y = run(kind, weights, x, h0)
    else:
        weights, x, h0, y = recorded()[kind, dtype]
    params = read(kind, weights)
    assert {array.dtype.name for array in params.arrays().values()} == {dtype}
    assert relative_error(states_of(params, x, h0), y) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_layer_and_direction_of_torch(kind, dtype):
    case = torch_recorded()[kind, dtype]
    depth, bidirectional, *_ = KINDS[kind]
    states, h0 = case["x"], iter(case["h0"])
    lengths = jnp.asarray(case["lengths"]) if "lengths" in case else None
    hidden = []
    for layer in range(depth):
        outputs = []
        for reverse in (False, True)[: 1 + bidirectional]:
            params = convert.from_torch(case, layer=layer, reverse=reverse)
            y, last = gru_jax.gru(
                jax.tree.map(jnp.asarray, params), states, next(h0), lengths=lengths,
                reverse=reverse,
            )  # fmt: skip
            outputs.append(y)
            hidden.append(last)
        states = jnp.concatenate(outputs, -1)
    assert relative_error(states, case["y"]) <= TOLERANCE[dtype]
    assert relative_error(jnp.stack(hidden), case["hidden"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind.split("-")[0] in OBJECTS])
def test_reads_live_objects(kind):
    """An object gives what its arrays and its options give, and states the options itself."""
    framework = need(kind)
    weights, _, _ = inputs_of(kind, "float64", seed=3)
    needed = {k: v for k, v in OPTIONS.get(kind, {}).items() if not k.endswith("function")}
    with climate("float64"):
        thing = OBJECTS[framework](kind, weights)
        found = getattr(convert, f"from_{PACKAGE.get(framework, framework)}")(thing, **needed)
    assert_same(found, read(kind, weights))  # also the mode and the functions, which are structure


@pytest.mark.parametrize("sizes", [{}, {"P_i": 2, "P_o": 3}], ids=["dense", "projected"])
@pytest.mark.parametrize(("name", "mode"), [pair for pair in PAIRS if pair[0] != "torch"])
def test_writes_what_the_framework_computes(name, mode, sizes):
    framework = need(name)
    params = params_of(name, mode, 4, 3, **sizes)
    kind = "keras-before" if (name, mode) == ("keras", BEFORE) else framework
    _, x, h0 = inputs_of(kind, "float64", seed=4)
    with climate("float64"):
        y = run(kind, FRAMEWORKS[name][1](params), x, h0)
    assert relative_error(y, states_of(params, x, h0)) <= TOLERANCE["float64"]


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox"])
def test_folded_biases_are_the_same_function(name):
    reads, writes, *_ = FRAMEWORKS[name]
    params = params_of("torch", RECURRENT_BIAS, 4, 3)
    if name == "nnx":
        params.bias[5 * 4 :] = 0
    with pytest.raises(ValueError, match="Pass fold_biases=True to add them"):
        writes(params)
    folded = reads(writes(params, fold_biases=True), reset_gate_mode=RECURRENT_BIAS)
    _, x, h0 = inputs_of("nnx", "float64", seed=5)
    assert not folded.bias[12:20].any()
    assert relative_error(states_of(folded, x, h0), states_of(params, x, h0)) <= 1e-12


# There and back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H_I", SIZES, ids=str)
@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_round_trips_are_bitwise(name, mode, H_I, dtype):
    reads, writes, *_ = FRAMEWORKS[name]
    params = params_of(name, mode, *H_I, dtype=dtype)
    arrays = writes(params)
    again = reads(arrays, reset_gate_mode=mode)
    assert_same(again, params)
    assert_same(writes(again), arrays)
    on_device = jax.tree.map(jnp.asarray, params)  # JAX's arrays go out as NumPy's
    assert_same(writes(on_device), arrays)
    default = reads(arrays).reset_gate_mode
    assert default == (BEFORE if mode == BEFORE else DEFAULT.get(name, RECURRENT_BIAS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind not in ("keras-no-bias",)])
def test_round_trips_of_their_weights_are_bitwise(kind, dtype):
    weights, _, _ = inputs_of(kind, dtype, seed=6)
    name = {"torch": "torch-cell"}.get(kind, kind.split("-")[0])
    assert_same(FRAMEWORKS[name][1](read(kind, weights)), weights)


def test_a_stack_of_torch_goes_out_and_in_by_name():
    places = [(layer, reverse) for layer in range(2) for reverse in (False, True)]
    stack = [
        params_of("torch", RECURRENT_BIAS, 4, 8 if layer else 3, seed=layer + 2 * reverse)
        for layer, reverse in places
    ]
    arrays = {}
    for params, (layer, reverse) in zip(stack, places, strict=True):
        arrays |= convert.to_torch(params, layer=layer, reverse=reverse, prefix="encoder.gru.")
    assert set(arrays) == {
        f"encoder.gru.{kind}_l{layer}{end}"
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for layer in range(2)
        for end in ("", "_reverse")
    }
    for params, (layer, reverse) in zip(stack, places, strict=True):
        again = convert.from_torch(arrays, layer=layer, reverse=reverse, prefix="encoder.gru.")
        assert_same(again, params)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_torch_module_goes_in_and_out(dtype, bias):
    torch = pytest.importorskip("torch")
    module = torch.nn.GRU(3, 4, 2, bias=bias, bidirectional=True, dtype=getattr(torch, dtype))
    wide = (lambda a: a.astype("float32")) if dtype == "bfloat16" else lambda a: a
    for layer, reverse in itertools.product(range(2), (False, True)):
        params = convert.from_torch(module, layer=layer, reverse=reverse)
        assert {array.dtype.name for array in params.arrays().values()} == {dtype}
        assert params.bias.any() == bias
        entries = convert.to_torch(params, layer=layer, reverse=reverse)
        end = f"_l{layer}{'_reverse' if reverse else ''}"
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if bias else 2]:
            tensor = torch.tensor(wide(entries[name + end])).to(getattr(torch, dtype))
            assert torch.equal(tensor, module.state_dict()[name + end])


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_leaves_are_copies(name):
    reads, writes, modes, _ = FRAMEWORKS[name]
    params = params_of(name, modes[0], 4, 3)
    arrays = writes(params)
    before = jax.tree.map(np.copy, arrays)
    for leaf in params.arrays().values():
        leaf += 1
    assert_same(arrays, before)
    again = reads(arrays)
    before = jax.tree.map(np.copy, again)
    for leaf in jax.tree.leaves(arrays):
        leaf += 1
    assert_same(again, before)


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2"])
def test_either_byte_order(name, dtype):
    reads, writes, modes, _ = FRAMEWORKS[name]
    native = params_of(name, modes[-1], 4, 3, dtype=dtype[1:])
    arrays = writes(native)
    assert_same(reads(jax.tree.map(lambda a: a.astype(dtype), arrays)), reads(arrays))


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_projected_parameters_go_out_as_dense_ones(name, mode):
    params = params_of(name, mode, 5, 3, P_i=2, P_o=4)
    dense = FRAMEWORKS[name][0](FRAMEWORKS[name][1](params), reset_gate_mode=mode)
    expected = jax.tree.map(np.asarray, projection.unproject(params))
    assert dense.arrays().keys() == {"input_weights", "recurrent_weights", "bias"}
    for leaf, array in expected.arrays().items():
        assert relative_error(getattr(dense, leaf), array) <= 1e-15


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_projectors_that_overflow(name, dtype):
    writes, modes = FRAMEWORKS[name][1:3]
    params = params_of(name, modes[0], 5, 3, dtype=dtype, P_i=2, P_o=4)
    root = np.sqrt(float(ml_dtypes.finfo(dtype).max)).astype(dtype)
    for leaf, other in (("input_weights", "input_projector"),
                        ("recurrent_weights", "output_projector")):  # fmt: skip
        large = {n: np.full_like(getattr(params, n), 2 * root) for n in (leaf, other)}
        with pytest.raises(ValueError, match=f"too large for {np.dtype(dtype)}. Convert the wei"):
            writes(params.replace(**large))
        large[leaf][0] = np.inf  # what is not finite before goes out as it is
        writes(params.replace(**large))


@pytest.mark.parametrize("name", ["linen", "equinox"])
def test_sums_of_biases_that_overflow(name):
    params = params_of("torch", RECURRENT_BIAS, 4, 3, dtype="float16")
    params = params.replace(bias=np.full_like(params.bias, 4e4))
    with pytest.raises(ValueError, match=r"the sum of two biases must be finite.*float16"):
        FRAMEWORKS[name][1](params, fold_biases=True)


def test_what_other_frameworks_leave_out_is_zero():
    params = convert.from_equinox({"weight_ih": np.ones((12, 3)), "weight_hh": np.ones((12, 4))})
    assert params.bias.shape == (24,)
    assert not params.bias.any()
    entries = {"weight_ih_l0": np.ones((12, 3)), "weight_hh_l0": np.ones((12, 4))}
    assert_same(convert.from_torch(entries), params)
    kernels = [np.ones((3, 12)), np.ones((4, 12))]
    assert_same(convert.from_keras(kernels, reset_gate_mode=RECURRENT_BIAS), params)
    before = convert.from_keras(kernels, reset_gate_mode=BEFORE)
    assert before.bias.shape == (12,)
    assert not before.bias.any()


def test_trees_around_the_parameters():
    haiku = convert.to_haiku(params_of("haiku", BEFORE, 4, 3))
    assert_same(convert.from_haiku({"gru": haiku}), convert.from_haiku(haiku))
    linen = convert.to_flax(params_of("linen", AFTER, 4, 3))
    assert_same(convert.from_flax({"params": linen}), convert.from_flax(linen))
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    state = nnx.state(cell)
    assert_same(convert.from_flax(state), convert.from_flax(cell))
    assert_same(convert.from_flax(nnx.to_pure_dict(state)), convert.from_flax(cell))


# Refusals


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("mode", MODES)
def test_modes_that_a_framework_does_not_compute(name, mode):
    reads, writes, modes, _ = FRAMEWORKS[name]
    if mode in modes:
        return
    params = params_of("torch", mode, 4, 3)
    with pytest.raises(ValueError, match=f"cannot hold this GRU exactly.*got .*{mode}"):
        writes(params)
    if name != "haiku":  # it has one mode, so there is nothing to ask for
        with pytest.raises(ValueError, match=f"got '{mode}'.*acts after the product"):
            reads(writes(params_of(name, AFTER, 4, 3)), reset_gate_mode=mode)


@pytest.mark.parametrize("name", ["torch", "torch-cell", "keras", "linen", "equinox"])
def test_a_recurrent_bias_is_never_dropped(name):
    reads, writes, *_ = FRAMEWORKS[name]
    params = params_of(name, RECURRENT_BIAS, 4, 3)
    params.bias[12:-1] = 0  # one number is left
    with pytest.raises(ValueError, match="the recurrent bias is not zero"):
        reads(writes(params), reset_gate_mode=AFTER)


def test_a_recurrent_bias_that_a_cell_has_not():
    params = params_of("torch", RECURRENT_BIAS, 4, 3)
    for fold in (False, True):  # adding the other two would not help
        with pytest.raises(ValueError, match="api='linen'"):
            convert.to_flax(params, api="nnx", fold_biases=fold)
    without = params.replace(bias=np.where(np.arange(24) < 20, params.bias, 0))
    with pytest.raises(ValueError, match="fold_biases=True"):
        convert.to_flax(without, api="nnx")
    assert "bias" in convert.to_flax(without, api="nnx", fold_biases=True)["dense_i"]
    with pytest.raises(ValueError, match="fold_biases=True"):
        convert.to_equinox(params)


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("state_activation_function", "softsign"),
        ("gate_activation_function", "hard-sigmoid"),
        ("state_activation_function", jnp.sin),
        ("gate_activation_function", jax.nn.hard_sigmoid),
    ],
    ids=["softsign", "hard-sigmoid", "sin", "another hard sigmoid"],
)
def test_activations_that_a_framework_has_not(name, option, value):
    _, writes, modes, _ = FRAMEWORKS[name]
    params = params_of(name, modes[0], 4, 3).replace(**{option: value})
    if name in ("linen", "nnx") and isinstance(value, str):
        again = convert.from_flax(writes(params), reset_gate_mode=modes[0], **{option: value})
        assert_same(again, params)
    elif (name, value) == ("keras", "softsign"):
        again = convert.from_keras(writes(params), reset_gate_mode=modes[0], **{option: value})
        assert_same(again, params)
    else:
        words = "relu6" if (name, value) == ("keras", "hard-sigmoid") else f"{option} must be"
        with pytest.raises(ValueError, match=f"cannot hold this GRU exactly: .*{words}"):
            writes(params)


def test_functions_that_a_layer_states():
    """Known ones are read, unknown ones refused, contradicted ones too."""
    make = lambda **options: nnx.GRUCell(3, 4, rngs=nnx.Rngs(0), **options)  # noqa: E731
    params = convert.from_flax(make(activation_fn=jax.nn.soft_sign))
    assert params.state_activation_function == "softsign"
    hard = make(gate_fn=jax.nn.hard_sigmoid)
    with pytest.raises(ValueError, match=r"hard_sigmoid is none.*nnx\.state\(cell\)"):
        convert.from_flax(hard)
    state = nnx.state(hard)
    params = convert.from_flax(state, gate_activation_function=jax.nn.hard_sigmoid)
    assert params.gate_activation_function is jax.nn.hard_sigmoid
    with pytest.raises(ValueError, match="must be 'tanh', as the layer has it, got 'softsign'"):
        convert.from_flax(make(), state_activation_function="softsign")
    with pytest.raises(ValueError, match="must be 'softsign', as the layer has it, got 'tanh'"):
        convert.from_flax(make(activation_fn=jax.nn.soft_sign), state_activation_function="tanh")


def built(layer, weights=None):
    """A layer of Keras, for three channels."""
    layer.build((None, None, 3))
    if weights is not None:
        layer.set_weights(weights)
    return layer


@pytest.fixture
def keras():
    need("keras")
    with climate("float32"):
        import keras

        yield keras


def test_layers_of_keras_that_are_refused(keras):
    hard = built(keras.layers.GRU(4, recurrent_activation="hard_sigmoid"))
    with pytest.raises(ValueError, match=r"hard_sigmoid is none.*layer\.get_weights\(\)"):
        convert.from_keras(hard)
    with pytest.raises(ValueError, match=r"must be 'tanh', as the layer has it, got 'softsign'"):
        convert.from_keras(built(keras.layers.GRU(4)), state_activation_function="softsign")
    with pytest.raises(TypeError, match="forward_layer and backward_layer"):
        convert.from_keras(keras.layers.Bidirectional(keras.layers.GRU(4)))
    with pytest.raises(TypeError, match="must be of a Keras GRU or GRUCell, got LSTM"):
        convert.from_keras(keras.layers.LSTM(4))
    with pytest.raises(ValueError, match=r"got 0 arrays\. A layer has none before it is built"):
        convert.from_keras(keras.layers.GRU(4))


def test_ways_out_with_keras(keras):
    """What messages and docstrings advise gives the same numbers."""
    x = np.random.default_rng(0).normal(size=(3, 5, 3)).astype("float32")
    h0 = np.zeros((3, 4), "float32")
    theirs = built(keras.layers.GRU(4, return_sequences=True, recurrent_activation="hard_sigmoid"))
    params = convert.from_keras(theirs.get_weights(), gate_activation_function=jax.nn.hard_sigmoid)
    assert relative_error(theirs(x), states_of(params, x, h0)) <= 1e-6
    params = params_of("keras", RECURRENT_BIAS, 4, 3, dtype="float32")
    weights = convert.to_keras(params)
    function = lambda x: keras.ops.clip(0.2 * x + 0.5, 0, 1)  # noqa: E731
    ours = keras.layers.GRU(4, return_sequences=True, recurrent_activation=function)
    hard = params.replace(gate_activation_function="hard-sigmoid")
    assert relative_error(built(ours, weights)(x), states_of(hard, x, h0)) <= 1e-6
    backwards = built(keras.layers.GRU(4, return_sequences=True, go_backwards=True), weights)
    y = gru_jax.gru(jax.tree.map(jnp.asarray, params), x, reverse=True)[0]
    assert relative_error(np.asarray(backwards(x))[:, ::-1], y) <= 1e-6


def test_layers_around_those_of_keras(keras):
    around = built(keras.layers.RNN(keras.layers.GRUCell(4)))
    assert_same(convert.from_keras(around), convert.from_keras(around.get_weights()))
    assert_same(convert.from_keras(around.cell), convert.from_keras(around.cell.weights))
    pair = [params_of("keras", RECURRENT_BIAS, 4, 3, dtype="float32", seed=n) for n in range(2)]
    weights = convert.to_keras(pair[0]) + convert.to_keras(pair[1])
    both = built(keras.layers.Bidirectional(keras.layers.GRU(4)), weights)
    assert_same(convert.from_keras(both.forward_layer), pair[0])
    assert_same(convert.from_keras(both.backward_layer), pair[1])


class File:
    def read(self):
        raise AssertionError("nothing is opened")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("thing", [
    "gru.pt", b"PK", pickle.dumps(Bomb()), File(), None, 3, np.ones((12, 3)), [np.ones(3)] * 3,
], ids=lambda thing: type(thing).__name__)  # fmt: skip
def test_what_is_no_set_of_arrays(name, thing):
    words = "must be|must have 2 axes|files are not opened"
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        FRAMEWORKS[name][0](thing)
    if name.startswith("torch") and isinstance(thing, str | bytes | File):
        assert "torch.load(path, weights_only=True)" in str(caught.value)


BAD = {
    "transposed": (lambda a: a.T if a.ndim == 2 else a[None], ValueError),
    "short": (lambda a: a[:-1], ValueError),
    "narrow": (lambda a: a[..., :-1], ValueError),
    "empty": (lambda a: a[:0], ValueError),
    "three axes": (lambda a: a[None, None], ValueError),
    "integers": (lambda a: a.astype("int32"), TypeError),
    "complex": (lambda a: a.astype("complex64"), TypeError),
    "objects": (lambda a: a.astype(object), TypeError),
    "lists": (lambda a: a.tolist(), TypeError),
    "text": (lambda a: "weights", TypeError),
    "pickle": (pickle.dumps, TypeError),
}


INPUT = {  # the array with an axis of channels, and the faults that only change their number
    "keras": (0, ("short", "empty")),
    "keras-before": (0, ("short", "empty")),
    "nnx": (2, ("short", "empty")),
    "haiku": (2, ("short", "empty")),
    "equinox": (3, ("narrow",)),
    "torch": (3, ("narrow",)),
    "linen": (None, ()),
}


def faults():
    """(kind, number of the array, fault)."""
    for kind, (channels, harmless) in INPUT.items():
        for n, leaf in enumerate(jax.tree.leaves(inputs_of(kind, "float32", 0)[0])):
            for fault in BAD:
                square = fault == "transposed" and leaf.shape == leaf.T.shape and leaf.ndim == 2
                if not square and not (n == channels and fault in harmless):
                    yield kind, n, fault


@pytest.mark.parametrize(("kind", "n", "fault"), [*faults()])
def test_bad_arrays(kind, n, fault):
    """Every array of every framework, spoiled in every way, is refused in the framework's words."""
    change, error = BAD[fault]
    weights, _, _ = inputs_of(kind, "float32", seed=0)
    leaves, structure = jax.tree.flatten(weights)
    leaves[n] = change(leaves[n])
    with pytest.raises(error, match=r"(?s)must (be|have) .*(got|it has) ") as caught:
        read(kind, jax.tree.unflatten(structure, leaves))
    words = "the (kernel|bias) of" if kind in ("linen", "nnx") else "(?!input|recurrent_w|params)"
    assert re.match(words, str(caught.value))


@pytest.mark.parametrize("kind", ["linen", "nnx", "haiku", "equinox", "torch"])
def test_missing_arrays(kind):
    weights, _, _ = inputs_of(kind, "float32", seed=0)
    for path, _ in jax.tree_util.tree_leaves_with_path(weights):
        without = jax.tree.map(lambda leaf: leaf, weights)  # a copy of the dicts
        part = without
        for key in path[:-1]:
            part = part[key.key]
        del part[path[-1].key]
        with pytest.raises(ValueError, match=rf"must have .*{path[-1].key}.*; it has "):
            read(kind, without)
    with pytest.raises(ValueError, match="it has nothing"):
        read(kind, {})


def test_arrays_that_do_not_belong():
    weights = inputs_of("linen", "float32", seed=0)[0]
    weights["hr"]["bias"] = np.ones(4, "float32")
    with pytest.raises(ValueError, match="hr must have only kernel in a GRUCell, got bias"):
        convert.from_flax(weights)
    weights = inputs_of("nnx", "float32", seed=0)[0]
    weights["dense_h"]["bias"] = np.ones(12, "float32")
    with pytest.raises(ValueError, match="dense_h must have only kernel in a GRUCell, got bias"):
        convert.from_flax(weights)
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    cell.dense_h = nnx.Linear(4, 12, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dense_h must have only kernel in a GRUCell, got bias"):
        convert.from_flax(cell)
    entries = convert.to_torch(params_of("torch", AFTER, 4, 3))
    entries["weight_hr_l0"] = np.ones((2, 4))
    with pytest.raises(ValueError, match="got weight_hr_l0, which only an LSTM has"):
        convert.from_torch(entries)


@pytest.mark.parametrize("kind", ["LSTMCell", "OptimizedLSTMCell", "SimpleCell"])
def test_other_cells_of_nnx(kind):
    cell = getattr(nnx, kind)(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises((TypeError, ValueError), match=r"cell must be|must have (shape|bias)"):
        convert.from_flax(cell)


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
@pytest.mark.parametrize("hidden", [3, 4])
def test_other_modules_of_torch(kind, hidden):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="weight_hh_l0 must have shape"):
        convert.from_torch(getattr(torch.nn, kind)(2, hidden))


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"layer": 1}, ValueError, "must have weight_ih_l1, weight_hh_l1; it has bias_hh_l0"),
    ({"reverse": True}, ValueError, "must have weight_ih_l0_reverse"),
    ({"layer": None}, ValueError, "must have weight_ih, weight_hh; it has"),
    ({"prefix": "gru."}, ValueError, r"must have gru\.weight_ih_l0"),
    ({"layer": -1}, ValueError, "layer must be 0 for the first layer, 1 for the next, got -1"),
    ({"layer": True}, TypeError, "layer must be an integer, or None"),
    ({"layer": "0"}, TypeError, "layer must be an integer, or None"),
    ({"layer": 1.0}, TypeError, "layer must be an integer, or None.*got 1.0"),
    ({"layer": np.True_}, TypeError, "layer must be an integer, or None"),
    ({"layer": None, "reverse": True}, ValueError, "an nn.GRUCell has no direction"),
    ({"reverse": 2}, TypeError, "reverse must be True or False, got 2"),
    ({"reset_gate_mode": "after"}, ValueError, "reset_gate_mode must be one of"),
])  # fmt: skip
def test_wrong_options_of_torch(options, error, words):
    params = params_of("torch", AFTER, 4, 3)
    entries = convert.to_torch(params)
    with pytest.raises(error, match=words):
        convert.from_torch(entries, **options)
    if "must have" not in words and "mode" not in words:
        with pytest.raises(error, match=words):
            convert.to_torch(params, **options)


@pytest.mark.parametrize("integer", [int, np.int64, np.uint8, jnp.int32])
def test_numbers_of_layers_of_any_integer_type(integer):
    params = params_of("torch", RECURRENT_BIAS, 4, 3)
    entries = convert.to_torch(params, layer=integer(1))
    assert next(iter(entries)) == "weight_ih_l1"
    assert_same(convert.from_torch(entries, layer=integer(1)), params)


def test_wrong_options_of_the_others():
    params = params_of("nnx", AFTER, 4, 3)
    with pytest.raises(ValueError, match="api must be one of 'linen', 'nnx', got 'keras'"):
        convert.to_flax(params, api="keras")
    kernels = convert.to_keras(params)[:2]
    with pytest.raises(ValueError, match=r"reset_gate_mode must be given.*reset_after=True"):
        convert.from_keras(kernels)
    before = convert.to_keras(params_of("keras", BEFORE, 4, 3))
    with pytest.raises(ValueError, match="acts before the product"):
        convert.from_keras(before, reset_gate_mode=AFTER)
    with pytest.raises(ValueError, match=r"weights must be \[kernel, .*got 1 arrays"):
        convert.from_keras(before[:1])
    with pytest.raises(TypeError, match="the list of arrays that its get_weights"):
        convert.from_keras(dict(enumerate(before)))
    with pytest.raises(ValueError, match="state_activation_function must be one of 'tanh'"):
        convert.from_keras(before, state_activation_function="relu")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_parameters_that_are_none(name):
    writes = FRAMEWORKS[name][1]
    with pytest.raises(TypeError, match=r"params must be a gru_jax\.GRUParams"):
        writes({"input_weights": np.ones((12, 3))})
    params = params_of(name, FRAMEWORKS[name][2][0], 4, 3)
    with pytest.raises(ValueError, match="bias must have shape"):
        writes(params.replace(bias=params.bias[:-1]))
    with pytest.raises(TypeError, match="arrays of one floating-point type"):
        writes(params.replace(bias=params.bias.astype("float32")))
