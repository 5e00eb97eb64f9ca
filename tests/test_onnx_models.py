"""Whole Flax models in ONNX Runtime, at sizes of batch and time other than the example's."""

import collections
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS

import gru_jax.linen
import gru_jax.nnx
from gru_jax.export._onnx_model import model_to_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CHANNELS, H = 3, 4
TOLERANCE = 1e-6
LENGTHS = np.array([11, 3, 0, 1, 5], np.int32)
FACES = {"linen": gru_jax.linen, "nnx": gru_jax.nnx}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


SMALL, LARGE = normal(1, 2, 7, CHANNELS), normal(2, 5, 11, CHANNELS)


def run(made, *inputs):
    """The outputs in ONNX Runtime, inputs in the order of the model."""
    onnx.checker.check_model(made, full_check=True)
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=providers)
    names = [port.name for port in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def counts(made):
    return collections.Counter(node.op_type for node in made.graph.node)


def names(ports):
    return [port.name for port in ports]


def assert_same(found, expected, tolerance=TOLERANCE):
    expected = jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, map(np.asarray, expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def drawn(shapes, seed=3):
    """Random arrays of these shapes: no bias is zero, no scale is one; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        a = rng.uniform(-0.6, 0.6, leaf.shape) * min(1, 2 / np.sqrt(leaf.shape[-1]))
        return jnp.asarray((a**2 if "var" in str(path[-1]) else a).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def variables_of(model, *inputs, **options):
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs, **options), jax.random.key(0))
    return drawn(shapes)


def as_linen(function, *example):
    """A linen module as it is, or one that calls a function; and its variables."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *others):
            return function(x, *others)

    model = function if isinstance(function, nn.Module) else Model()
    return model, variables_of(model, *example)


def check_linen(function, example=(SMALL,), inputs=(LARGE,), **options):
    model, variables = as_linen(function, *example)
    made = model_to_onnx(model, variables, tuple(example), **options)
    assert_same(run(made, *jax.tree.leaves(inputs)), model.apply(variables, *inputs))
    return made


def drawn_nnx(model):
    nnx.update(model, drawn(nnx.state(model, nnx.Param)))
    return model


def layer_of(face, cls="GRULayer", sizes=(H,), **options):
    """A layer of either face as a function of its inputs, with what `model_to_onnx` needs."""
    make = getattr(FACES[face], cls)
    if face == "nnx":
        model = make(*sizes, input_size=CHANNELS, rngs=nnx.Rngs(0), **options)
        return drawn_nnx(model), None
    model = make(*sizes, **options)
    shape = options.get("data_format", "BTC")
    x = np.zeros([{"B": 2, "T": 7, "C": CHANNELS}[letter] for letter in shape], "float32")
    hidden = np.zeros(H, "float32")
    ports = [(hidden, hidden) if cls.startswith("Bi") else hidden]
    return model, variables_of(model, x, *ports * bool(options.get("has_state_inputs")))


def call(model, variables, *inputs, **options):
    return model(*inputs, **options) if variables is None else model.apply(variables, *inputs)


# Whole networks


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, lengths=None):
        h = gru_jax.linen.GRULayer(100, output_mode="last", name="gru")(x, lengths=lengths)
        return nn.Dense(9)(h)


class NnxClassifier(nnx.Module):
    def __init__(self, rngs):
        self.gru = gru_jax.nnx.GRULayer(100, input_size=CHANNELS, output_mode="last", rngs=rngs)
        self.dense = nnx.Linear(100, 9, rngs=rngs)

    def __call__(self, x, lengths=None):
        return self.dense(self.gru(x, lengths=lengths))


def classifier(face):
    if face == "nnx":
        return drawn_nnx(NnxClassifier(nnx.Rngs(0))), None
    return Classifier(), variables_of(Classifier(), SMALL)


@pytest.mark.parametrize("face", FACES)
def test_classifier(face):
    model, variables = classifier(face)
    made = model_to_onnx(model, variables, (SMALL, np.array([7, 4])), name="vowels")
    assert names(made.graph.input) == ["x", "lengths"]
    assert names(made.graph.output) == ["y"]
    assert made.graph.name == "vowels"
    assert counts(made) == {
        "Transpose": 1, "Cast": 1, "GRU": 1, "Reshape": 1, "MatMul": 1, "Add": 1,
    }  # fmt: skip
    node = next(node for node in made.graph.node if node.op_type == "GRU")
    assert (node.name, node.input[1]) == ("gru", "gru.W")
    padded = np.where(np.arange(11)[:, None] < LENGTHS[:, None, None], LARGE, np.float32(np.nan))
    lengths = LENGTHS.astype(int)
    expected = call(model, variables, LARGE, lengths)
    assert_same(run(made, padded, lengths), expected)
    assert np.ptp(np.asarray(expected)) > 1  # no constant function

    shape = jax.ShapeDtypeStruct(SMALL.shape, SMALL.dtype)
    made = model_to_onnx(model, variables and variables["params"], {"x": shape})
    assert names(made.graph.input) == ["x"]
    assert_same(run(made, LARGE), call(model, variables, LARGE))


class Deep(nnx.Module):
    """Three layers with residual sums and normalisation, a dense layer and softmax."""

    def __init__(self, rngs):
        self.one = gru_jax.nnx.GRULayer(H, input_size=CHANNELS, rngs=rngs)
        self.two = gru_jax.nnx.GRUProjectedLayer(H, 2, 3, input_size=H, rngs=rngs)
        self.three = gru_jax.nnx.BidirectionalGRULayer(2, input_size=H, rngs=rngs)
        self.norm, self.batch_norm = nnx.LayerNorm(H, rngs=rngs), nnx.BatchNorm(H, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(H, 6, rngs=rngs)

    def __call__(self, x):
        x = self.one(x)
        x = self.norm(x + self.two(x))
        x = self.dropout(self.batch_norm(x + self.three(x)))
        return nnx.softmax(self.dense(x))


def test_deep_nnx_model():
    model = drawn_nnx(Deep(nnx.Rngs(0)))
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    made = model_to_onnx(model, None, SMALL)
    assert counts(made)["GRU"] == 4
    paths = [node.name for node in made.graph.node if node.op_type == "GRU"]
    assert paths == ["one", "two", "three/forward", "three/backward"]
    assert not counts(made).keys() & {"Loop", "Scan", "If"}
    assert_same(run(made, LARGE), model(LARGE))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert "_path" not in vars(model.one)


def test_deep_linen_model():
    def deep(x):
        x = gru_jax.linen.GRULayer(H)(x)
        x = nn.LayerNorm()(x + gru_jax.linen.GRUProjectedLayer(H, 2, 3)(x))
        x = nn.BatchNorm(use_running_average=True)(x + gru_jax.linen.BidirectionalGRULayer(2)(x))
        return nn.softmax(nn.Dense(6)(nn.Dropout(0.5, deterministic=True)(x)))

    assert counts(check_linen(deep))["GRU"] == 4


def test_plain_stack_is_plain():
    """Between two layers the arrays stay time-major, and nothing is broadcast by hand."""
    layers = [gru_jax.linen.GRULayer(H), gru_jax.linen.GRULayer(5), nn.Dense(2)]
    made = check_linen(nn.Sequential(layers))
    expected = {"Transpose": 2, "GRU": 2, "Squeeze": 2, "MatMul": 1, "Add": 1}
    assert counts(made) == expected


def test_shared_layer():
    """A layer called twice is two nodes, which share their weights."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = gru_jax.linen.GRULayer(CHANNELS, name="layer")
            return layer(layer(x))

    made = check_linen(Twice())
    one, two = [node for node in made.graph.node if node.op_type == "GRU"]
    assert one.name == "layer" != two.name
    assert one.input[1:4] == two.input[1:4] == ["layer.W", "layer.R", "layer.B"]
    assert sum(name.startswith("layer") for name in names(made.graph.initializer)) == 3


# The layer's options


@pytest.mark.parametrize(
    ("mode", "state", "gate"), list(itertools.product(MODES, STATE_ACTIVATIONS, GATE_ACTIVATIONS))
)
def test_modes_and_activations(mode, state, gate):
    face = "linen" if (state == "tanh") == (gate == "sigmoid") else "nnx"
    model, variables = layer_of(
        face, reset_gate_mode=mode, state_activation_function=state, reverse=state == "tanh",
        gate_activation_function=gate,
    )  # fmt: skip
    made = model_to_onnx(model, variables, SMALL)
    assert counts(made) == {"Transpose": 2, "GRU": 1, "Squeeze": 1}
    assert_same(run(made, LARGE), call(model, variables, LARGE))


@pytest.mark.parametrize("face", FACES)
def test_projected(face):
    model, variables = layer_of(face, "GRUProjectedLayer", (H, 2, 3), output_mode="last")
    made = model_to_onnx(model, variables, SMALL)
    assert counts(made) == {"Transpose": 1, "GRU": 1, "Reshape": 1}
    assert_same(run(made, LARGE), call(model, variables, LARGE))


@pytest.mark.parametrize("mode", ["sequence", "last"])
@pytest.mark.parametrize("merge", ["concat", "sum", "mul", "ave"])
def test_bidirectional(merge, mode):
    face = "linen" if (merge in ("concat", "mul")) == (mode == "last") else "nnx"
    model, variables = layer_of(face, "BidirectionalGRULayer", merge=merge, output_mode=mode)
    example = {"x": SMALL, "lengths": np.array([7, 4], np.int32)}
    made = model_to_onnx(model, variables, example)
    assert counts(made)["GRU"] == 2
    inputs = {"x": LARGE, "lengths": LENGTHS}
    expected = model(**inputs) if face == "nnx" else model.apply(variables, **inputs)
    assert_same(run(made, LARGE, LENGTHS), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_initial_states_and_empty_sequences(reverse):
    """A sequence of length 0 ends where it begins: ONNX Runtime alone would return zeros."""
    options = {"reverse": reverse, "hidden_state": (1, -2, 0.5, 3), "has_state_outputs": True}
    inputs = {"x": LARGE, "lengths": LENGTHS}
    model, variables = layer_of("linen", **options)
    made = model_to_onnx(model, variables, {"x": SMALL, "lengths": LENGTHS[:2]})
    found = run(made, *inputs.values())
    assert_same(found, model.apply(variables, **inputs))
    assert found[1][2].tolist() == [1, -2, 0.5, 3]
    assert not found[0][2].any()


@pytest.mark.parametrize(
    ("face", "data_format"),
    [("linen", "BTC"), ("nnx", "BTC"), ("linen", "CBT"), ("nnx", "TCB"), ("linen", "BCT")],
)
def test_streams_in_pieces(face, data_format):
    """State ports in the layer's own format; pieces of two sizes give what one run gives."""
    options = {"has_state_inputs": True, "has_state_outputs": True, "data_format": data_format}
    model, variables = layer_of(face, **options)
    axes = ["BTC".index(letter) for letter in data_format]
    x, time = LARGE.transpose(axes), data_format.index("T")
    hidden = normal(4, 5, H)
    hidden = hidden if "".join(data_format.split("T")) == "BC" else hidden.T
    small = SMALL.transpose(axes)
    rows = np.ones((H, 2), "float32")
    example = (small, rows if hidden.shape[0] == H else rows.T)
    made = model_to_onnx(model, variables, example)
    assert (names(made.graph.input), names(made.graph.output)) == (["x", "h0"], ["y", "hidden"])
    whole = call(model, variables, x, hidden)
    pieces, state = [], hidden
    for piece in np.split(x, [4], axis=time):
        y, state = run(made, piece, state)
        pieces.append(y)
    assert_same([np.concatenate(pieces, axis=time), state], whole)


def test_states_of_a_stack():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            ports = {"has_state_inputs": True, "has_state_outputs": True, "rngs": rngs}
            self.one = gru_jax.nnx.GRULayer(H, input_size=CHANNELS, **ports)
            self.two = gru_jax.nnx.BidirectionalGRULayer(2, input_size=H, **ports)

        def __call__(self, x, hidden):
            x, one = self.one(x, hidden["one"])
            x, two = self.two(x, hidden["two"])
            return x, {"one": one, "two": two}

    model = drawn_nnx(Stack(nnx.Rngs(0)))
    sizes = {"one": H, "two": (2, 2)}
    hidden = jax.tree.map(lambda n: jax.ShapeDtypeStruct((2, n), np.float32), sizes)
    made = model_to_onnx(model, None, (SMALL, hidden))
    assert names(made.graph.input) == ["x", "h0_one", "h0_two_0", "h0_two_1"]
    assert names(made.graph.output) == ["y", "hidden_one", "hidden_two_0", "hidden_two_1"]
    hidden = jax.tree.map(lambda n: normal(n, 5, n), sizes)
    assert_same(run(made, LARGE, *jax.tree.leaves(hidden)), model(LARGE, hidden))


@pytest.mark.parametrize("shape", [(7, CHANNELS), (2, 3, 7, CHANNELS)], ids=str)
def test_other_numbers_of_axes(shape):
    """No batch axis, or two of them: then the second keeps its size."""
    large = normal(6, *(4, *shape[1:-2], 9, CHANNELS)[-len(shape) :])
    check_linen(gru_jax.linen.GRULayer(H), (normal(5, *shape),), (large,))
    last = gru_jax.linen.GRULayer(H, output_mode="last")
    check_linen(last, (normal(5, *shape),), (large,))


def test_axes_are_what_they_are_called():
    swapped = SMALL.swapaxes(0, 2), LARGE.swapaxes(0, 2)
    layer = gru_jax.linen.GRULayer(H, data_format="CTB")
    made = check_linen(nn.Sequential([layer]), swapped[:1], swapped[1:], axes={"x": "CTB"})
    assert names(made.graph.input) == ["x"]
    made = check_linen(lambda x: x.reshape(2, 21), (SMALL,), (SMALL,), axes={"x": "---"})
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_types():
    """A layer in bfloat16 keeps its state in float32, so its node computes in float32."""
    for mode in ("sequence", "last"):
        layer = {"dtype": "bfloat16", "output_mode": mode}
        made = check_linen(lambda x, layer=layer: gru(x, **layer).astype("float32"))
        assert counts(made)["Cast"] >= 3  # x, y to bfloat16, y to float32
    reference = pytest.importorskip("onnx.reference")
    model, variables = layer_of("linen", param_dtype="float64", hidden_state=(1, 2, 3, 4))
    made = model_to_onnx(model, variables, SMALL.astype("float64"))
    onnx.checker.check_model(made, full_check=True)
    x = LARGE.astype("float64")
    found = reference.ReferenceEvaluator(made).run(None, {"x": x})
    assert_same(found, model.apply(variables, x), 1e-12)


# The rest of a model


def gru(x, hidden=None, lengths=None, **options):
    return gru_jax.linen.GRULayer(H, **options)(x, hidden, lengths=lengths)


PARTS = {
    "activations": lambda x: [
        f(gru(x))
        for f in (nn.relu, nn.gelu, nn.softplus, nn.silu, nn.elu, nn.leaky_relu, nn.log_softmax,
                  nn.hard_tanh, nn.glu, jax.nn.mish)
    ],
    "attention": lambda x: nn.MultiHeadDotProductAttention(2)(gru(x)),
    "checkpointed": lambda x: nn.remat(gru_jax.linen.GRULayer)(H)(x),
    "broadcast": lambda x: jnp.concatenate([x, jnp.exp(jnp.broadcast_to(x[:, :1], x.shape))], 1),
    "clipped": lambda x: (jnp.clip(x, -0.5, 0.5), jax.lax.clamp(np.float32(0), x, np.float32(1))),
    "compiled": lambda x: nn.jit(gru_jax.linen.GRULayer)(H)(x),
    "constants": lambda x: (jnp.zeros(x.shape[0]), jnp.full(x.shape, 2.0), x),
    "differences": lambda x: x[:, 1:] - x[:, :-1],
    "every second": lambda x: (x[:, ::2], x[:, ::-1], jnp.flip(x, 2)),
    "exact gelu": lambda x: nn.gelu(x, approximate=False),
    "extrema": lambda x: (x.max(1), x.min(-1), jnp.argmax(x, -1), jnp.any(x > 1, -1)),
    "first and last": lambda x: (gru(x)[:, 0], gru(x)[:, -1], x[0]),
    "flat": lambda x: nn.Dense(2)(gru(x).reshape(-1, H)).reshape(*x.shape[:2], 2),
    "joined": lambda x: jnp.concatenate([x, jnp.stack([x, -x]).sum(0), jnp.tile(x, (1, 1, 2))], -1),
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=-1),
    "means": lambda x: (gru(x).mean(axis=1), jnp.std(x, -1), jnp.var(x, (0, 1)), x.sum() / 100),
    "norms": lambda x: (nn.GroupNorm(2)(gru(x)), nn.RMSNorm()(gru(x))),
    "padded": lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 0)), constant_values=3),
    "places": lambda x: (
        x + jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None],
        jax.lax.broadcasted_iota("int32", x.shape, 1),
    ),
    "powers": lambda x: (x**2, x**3, jnp.abs(x)**0.5, x * jnp.exp(x), jnp.cumsum(x, 1)),
    "products": lambda x: (jnp.einsum("btc,bsc->bts", x, x), jnp.vdot(x[0, 0], x[-1, -1])),
    "rounded": lambda x: (jnp.round(x), jnp.floor(x), x.astype("int32"), jnp.sign(x)),
    "same": lambda x: (x, x, *[jnp.exp(x)] * 2, jnp.ones(3)),
    "split": lambda x: jnp.split(x, [1], -1),
    "taken": lambda x: (jnp.take(x, jnp.array([[0, 2], [1, -1]]), axis=1), x[:, :, 1:2],
                        jnp.take(x, jnp.array([2, 0], "int32"), axis=-1), x[..., 2]),
    "tests": lambda x: (jnp.isfinite(x), jnp.isnan(x), ~(x > 0) | (x < 1), jnp.where(x > 0, x, 7)),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_parts(part):
    check_linen(PARTS[part])


WITH_LENGTHS = {
    "last by place": lambda x, n: gru(x)[jnp.arange(x.shape[0]), jnp.maximum(n - 1, 0)],
    "last along axis": lambda x, n: jnp.take_along_axis(
        gru(x), jnp.maximum(n - 1, 0)[:, None, None], axis=1
    ),
    "masked mean": lambda x, n: (
        jnp.sum(
            gru(x) * jnp.where(jnp.arange(x.shape[1])[None] < n[:, None], 1.0, 0.0)[..., None], 1
        )
        / jnp.maximum(n, 1)[:, None].astype(x.dtype)
    ),
}


@pytest.mark.parametrize("part", WITH_LENGTHS)
def test_parts_with_lengths(part):
    lengths = LENGTHS.astype(int)
    check_linen(WITH_LENGTHS[part], (SMALL, lengths[:2]), (LARGE, lengths))


def test_embedding():
    """Integers with axes (batch, time); an index outside the table gives NaN, as in JAX."""
    small, large = (np.random.default_rng(7).integers(0, 9, shape) for shape in ((2, 7), (5, 11)))
    check_linen(lambda x: gru(nn.Embed(9, 5)(x)), (small,), (large,))
    large[0, :4] = (99, -1, -9, -10)
    made = check_linen(nn.Embed(9, 5), (small,), (large,))
    assert names(made.graph.input) == ["x"]  # though Flax calls it otherwise
    found = run(made, large)[0]
    assert np.isnan(found[0]).all(-1)[:4].tolist() == [True, False, False, True]


def test_embedding_with_a_state():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens, hidden):
            return gru_jax.linen.GRULayer(H, has_state_inputs=True)(nn.Embed(9, 5)(tokens), hidden)

    rng = np.random.default_rng(7)
    small, large = (
        (rng.integers(0, 9, shape), normal(8, shape[0], H)) for shape in ((2, 7), (5, 11))
    )
    made = check_linen(Model(), small, large)
    assert names(made.graph.input) == ["x", "h0"]


def test_flags_and_dictionaries():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, hidden=None, *, train):
            x, hidden = gru_jax.linen.GRULayer(H, has_state_inputs=True, has_state_outputs=True)(
                x, hidden
            )
            return {"out": nn.Dropout(0.5, deterministic=not train)(x), "state": hidden, "x": -x}

    model, hidden = Model(), normal(4, 5, H)
    variables = variables_of(model, SMALL, hidden[:2], train=False)
    example = {"train": False, "hidden": hidden[:2], "x": SMALL}
    made = model_to_onnx(model, variables, example)
    assert names(made.graph.input) == ["x", "h0"]
    assert names(made.graph.output) == ["out", "state", "x_out"]
    assert_same(run(made, LARGE, hidden), model.apply(variables, LARGE, hidden, train=False))


# Names and sizes of inputs and outputs


def shapes(made):
    """The sizes of all inputs by name; open ones are texts."""
    ports = [(port.name, port.type.tensor_type.shape.dim) for port in made.graph.input]
    return {name: [size.dim_param or size.dim_value for size in sizes] for name, sizes in ports}


class TokensFirst(nn.Module):
    @nn.compact
    def __call__(self, tokens, x):
        return gru(jnp.concatenate([nn.Embed(9, 4)(tokens), x], -1))


class LabelFirst(nn.Module):
    @nn.compact
    def __call__(self, label, x):
        return gru(x, output_mode="last") + nn.Embed(9, H)(label)


class HiddenFirst(nn.Module):
    @nn.compact
    def __call__(self, hidden, x):
        return gru(x, hidden, has_state_inputs=True)


class HiddenAndH0(nn.Module):
    @nn.compact
    def __call__(self, x, hidden, h0):
        return gru(x, hidden, has_state_inputs=True), 2 * h0


class TreeFirst(nn.Module):
    @nn.compact
    def __call__(self, batch, x_c):
        return gru(batch["x"]) + (batch["c"] * x_c)[:, None]


def tokens(*shape):
    return np.random.default_rng(7).integers(0, 9, shape)


EQUAL_INPUTS = {
    TokensFirst: (["tokens", "x"], lambda x: (tokens(*x.shape[:2]), x)),
    LabelFirst: (["label", "x"], lambda x: (tokens(len(x)), x)),
    HiddenFirst: (["h0", "x"], lambda x: (normal(8, len(x), H), x)),
    HiddenAndH0: (["x", "hidden", "h0"], lambda x: (x, normal(8, len(x), H), normal(9, len(x), 2))),
    TreeFirst: (
        ["x_c_2", "x_x", "x_c"],
        lambda x: ({"x": x, "c": normal(8, len(x), H)}, normal(9, len(x), H)),
    ),
}


@pytest.mark.parametrize("model", EQUAL_INPUTS)
def test_inputs_of_equal_names(model):
    """No argument gets the name of another."""
    expected, arguments = EQUAL_INPUTS[model]
    made = check_linen(model(), arguments(SMALL), arguments(LARGE))
    assert names(made.graph.input) == expected
    assert names(made.graph.output) == ["y", "hidden_out"][: 1 + (model is HiddenAndH0)]
    assert {sizes[0] for sizes in shapes(made).values()} == {"batch"}
    assert ["batch", "time", CHANNELS] in shapes(made).values()


def layer_y(x):
    """A layer whose tensors in the graph are y.W, y.y and so on."""
    y = gru_jax.linen.GRULayer(H, name="y")(x)
    return {"y": y, "y.W": y + 1, "y.y": 2 * y}


EQUAL_OUTPUTS = {
    "as an input": (lambda x: {"x": gru(x), "x_out": 2 * x}, ["x_out_2", "x_out"]),
    "paths": (
        lambda x: {"a": {"b": gru(x), "c": -x}, "a_b": 2 * x, "a_b_2": 3 * x},
        ["a_b_3", "a_c", "a_b", "a_b_2"],
    ),
    "dots": (lambda x: {"a.b": gru(x), "a_b": 2 * x}, ["a_b_2", "a_b"]),
    "tensors of a layer": (layer_y, ["y", "y_W", "y_y"]),
}


@pytest.mark.parametrize("case", EQUAL_OUTPUTS)
def test_outputs_of_equal_names(case):
    function, expected = EQUAL_OUTPUTS[case]
    assert names(check_linen(function).graph.output) == expected


def attend(x, other):
    """A decoder that attends to an encoder of another time."""
    source, query = gru(x), gru(other)
    weights = nn.softmax(query @ source.swapaxes(1, 2), -1)
    return nn.Dense(2)(jnp.concatenate([weights @ source, query], -1)), weights


@pytest.mark.parametrize("axes", [None, {"x": "BTC", "others": "BTC"}], ids=["read", "given"])
def test_two_times(axes):
    small, large = normal(8, 2, 5, CHANNELS), normal(9, 5, 6, CHANNELS)
    made = check_linen(attend, (SMALL, small), (LARGE, large), axes=axes)
    assert shapes(made) == {"x": ["batch", "time", 3], "others": ["batch", "time2", 3]}


def test_sizes_that_agree_are_one():
    """Both times of a matrix, each that of another input; batches of two sizes."""

    def weigh(x, source, weights, table):
        return gru(x) + weights @ gru(source), jnp.tanh(table)

    def example(B, T, S, N):
        return normal(1, B, T, 3), normal(2, B, S, 3), normal(3, B, T, S), normal(4, N, 2)

    axes = {"others_1": "BTT"}
    made = check_linen(weigh, example(2, 7, 5, 9), example(3, 4, 6, 8), axes=axes)
    assert shapes(made) == {
        "x": ["batch", "time", 3],
        "others_0": ["batch", "time2", 3],
        "others_1": ["batch", "time", "time2"],
        "others_2": ["batch2", 2],
    }


def test_ones_are_broadcast():
    def scaled(x, scale):
        return gru(x * scale)

    scale = normal(8, 1, 1, CHANNELS)
    made = check_linen(scaled, (SMALL, scale), (LARGE, scale))
    assert shapes(made) == {"x": ["batch", "time", 3], "others": [1, 1, 3]}
    made = check_linen(attend, (SMALL, SMALL[:, :1]), (LARGE, LARGE), axes={"others": "BTC"})
    assert shapes(made)["others"] == ["batch", "time2", 3]


def test_inputs_that_do_not_fit():
    """A table of 100 places, of which the model takes as many as x has."""

    def placed(x, table):
        return gru(x + table[:, : x.shape[1]])

    example = SMALL, normal(8, 1, 100, CHANNELS)
    model, variables = as_linen(placed, *example)
    reason = r"x \(batch, time, 3\), others \(1, time2, 3\): pass `axes` where that is wrong"
    with pytest.raises(TypeError, match=reason):
        model_to_onnx(model, variables, example)
    check_linen(placed, example, (normal(9, 5, 7, CHANNELS), example[1]),
                axes={"x": "BFC", "others": "---"})  # fmt: skip


TREES = {
    "c": (lambda b: (gru(b["x"]), b["c"] * 2), ["batch", 4], lambda n: normal(8, n, 4)),
    "h": (
        lambda b: gru(b["x"], b["h"], has_state_inputs=True),
        ["batch", H],
        lambda n: normal(8, n, H),
    ),
    "lengths": (lambda b: gru(b["x"], lengths=b["lengths"]), ["batch"], lambda n: LENGTHS[-n:]),
    "scale": (lambda b: gru(b["x"]) * b["scale"], [], lambda n: np.array(3, "float32")),
}


@pytest.mark.parametrize("key", TREES)
def test_trees_of_inputs(key):
    """The sequence is the leaf with most axes, wherever it stands in the tree."""
    function, sizes, make = TREES[key]
    made = check_linen(function, ({key: make(2), "x": SMALL},), ({key: make(5), "x": LARGE},))
    assert shapes(made) == {f"x_{key}": sizes, "x_x": ["batch", "time", CHANNELS]}


def test_tree_of_tokens():
    """Integers of two axes are a sequence too, and not a state of two axes."""

    def stream(batch):
        return gru(nn.Embed(9, 5)(batch["tokens"]), batch["h"], has_state_inputs=True)

    small, large = ({"h": normal(8, B, H), "tokens": tokens(B, T)} for B, T in ((2, 7), (5, 11)))
    made = check_linen(stream, (small,), (large,))
    assert shapes(made) == {"x_h": ["batch", H], "x_tokens": ["batch", "time"]}

    def joined(batch):
        return gru(jnp.concatenate([nn.Embed(9, 5)(batch["tokens"]), batch["x"]], -1))

    small, large = ({"tokens": tokens(len(x)), "x": x} for x in (SMALL[0], LARGE[0]))
    made = check_linen(joined, (small,), (large,))
    assert shapes(made) == {"x_tokens": ["time"], "x_x": ["time", CHANNELS]}


# Caches, and what cannot be


def test_compiled_parts_are_seen_anew_and_left_as_they_were():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = gru_jax.nnx.GRULayer(H, input_size=CHANNELS, rngs=rngs)

        def __call__(self, x):
            return nnx.jit(lambda layer, x: layer(x))(self.inner, x)

    model = drawn_nnx(Outer(nnx.Rngs(0)))
    before = np.asarray(model(SMALL))
    for axes in (None, {"x": "---"}):
        made = model_to_onnx(model, None, SMALL, axes=axes)
        assert counts(made)["GRU"] == 1
        assert_same(run(made, SMALL), before)
        np.testing.assert_array_equal(model(SMALL), before)
    compiled = nn.jit(gru_jax.linen.GRULayer)(H)
    variables = compiled.init(jax.random.key(0), SMALL)
    before = np.asarray(compiled.apply(variables, SMALL))
    made = model_to_onnx(compiled, variables, SMALL, axes={"x": "---"})
    assert_same(run(made, SMALL), before)
    np.testing.assert_array_equal(compiled.apply(variables, SMALL), before)


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("first", ["called", "exported"])
def test_layers_in_plain_jit(first, precision):
    """At fixed sizes jax.jit could hand the export's trace to a call, or the other way round."""
    layer = gru_jax.linen.GRULayer(H)
    inner = variables_of(layer, SMALL)
    compiled = jax.jit(lambda x: layer.apply(inner, x))
    model = nn.Sequential([compiled])
    expected = layer.apply(inner, SMALL)
    with jax.default_matmul_precision(precision):
        if first == "called":
            model.apply({}, SMALL)
        made = model_to_onnx(model, {}, SMALL, axes={"x": "---"})
        assert counts(made) == {"Transpose": 2, "GRU": 1, "Squeeze": 1}
        assert_same(run(made, SMALL), expected)
        assert_same([model.apply({}, SMALL)], expected)


def odd(x):
    return x


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return gru_jax.linen.GRULayer(CHANNELS)(x), None


scanned = nn.scan(Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
mapped = nn.vmap(
    gru_jax.linen.GRULayer, variable_axes={"params": None}, split_rngs={"params": False}
)
REFUSED = {
    "a GRUCell is called step by step": lambda x: nn.RNN(gru_jax.linen.GRUCell(H))(x),
    "'scan' of JAX, at '.*RNN_0'.*nn.RNN": lambda x: nn.RNN(nn.GRUCell(H))(x),
    "'scan' of JAX.*Loops": lambda x: scanned()(x, None)[0],
    "'while' of JAX.*Loops": lambda x: jax.lax.while_loop(lambda c: c[0, 0, 0] < 0, odd, x),
    "'cond' of JAX.*Loops": lambda x: jax.lax.cond(x[0, 0, 0] < 0, odd, odd, x),
    "'sort' of JAX.*no ONNX operator.*jax.export": lambda x: jnp.sort(gru(x)),
    "'random_bits'.*dropout": lambda x: jax.random.normal(jax.random.key(0), x.shape, "float32"),
    "called with mask.*lengths": lambda x: gru_jax.linen.GRULayer(H)(x, mask=x[..., 0] > 0),
    "called with resets": lambda x: gru_jax.linen.GRULayer(H)(x, resets=x[..., 0] > 0),
    "under jax.vmap": lambda x: mapped(H)(x),
    "stateful GRULayer": lambda x: gru(x, stateful=True),
    "layer at 'GRULayer_0'.*state_activation_function": lambda x: gru(
        x, state_activation_function=jnp.sin
    ),
    "computed from inputs": lambda x: gru_jax.linen.GRULayer(H).apply(
        {"params": {"input_weights": jnp.ones((12, 3), "float32") * x[0, 0, 0],
                    "recurrent_weights": jnp.ones((12, 4), "float32"),
                    "bias": jnp.ones(12, "float32")}}, x),
    "'reshape'.*axes": lambda x: x.reshape(2, 7, 3),
    "must know a size.*axes": lambda x: jax.lax.dynamic_slice_in_dim(x, 0, 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    model, variables = as_linen(REFUSED[reason], SMALL)
    with pytest.raises(ValueError, match=reason):
        model_to_onnx(model, variables, SMALL)


def test_wrong_arguments():
    model, variables = layer_of("linen")
    with pytest.raises(TypeError, match="model must be a linen or nnx module, got function"):
        model_to_onnx(odd, None, SMALL)
    with pytest.raises(TypeError, match="params must be the variables"):
        model_to_onnx(model, None, SMALL)
    with pytest.raises(ValueError, match="axes must name inputs, x; got y"):
        model_to_onnx(model, variables, SMALL, axes={"y": "BTC"})
    with pytest.raises(ValueError, match="axes of x must have one letter"):
        model_to_onnx(model, variables, SMALL, axes={"x": "BT"})
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        model_to_onnx(model, variables, {"lengths": LENGTHS})
