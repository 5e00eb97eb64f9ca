"""Against ONNX Runtime: one GRU node for every mode, activation and projection, float32.

Its gates stand in the order z, r, h; a projected layer is one node by W = W' Q_iᵀ, R = R' Q_oᵀ. The
exported models are compared with the NumPy oracle, the node written by hand with the library.
"""

import itertools
import warnings

import jax
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from cases import as_params, assert_close, random_params
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS, gru_ref

import gru_jax
from gru_jax import convert, export, ragged

H, CHANNELS, T, B = 4, 3, 5, 3
LENGTHS = np.array([5, 1, 3], np.int32)
KINDS = list(itertools.product(MODES, STATE_ACTIVATIONS, GATE_ACTIVATIONS))
ACTIVATIONS = {
    "tanh": "Tanh",
    "softsign": "Softsign",
    "sigmoid": "Sigmoid",
    "hard-sigmoid": "HardSigmoid",
}


def session_of(model):
    """An ONNX Runtime session of a model that ONNX itself finds sound."""
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


# A node written by hand


def reordered(stack):
    """Rows r, z, h̃ as z, r, h̃."""
    r, z, candidate = np.split(stack, 3)
    return np.concatenate([z, r, candidate])


def weights_of(arrays, mode):
    """W, R and B of one direction."""
    W, R, bias = arrays["input_weights"], arrays["recurrent_weights"], arrays["bias"]
    if "input_projector" in arrays:
        W = W.astype(np.float64) @ arrays["input_projector"].T
        R = R.astype(np.float64) @ arrays["output_projector"].T
    recurrent = bias[3 * H :] if mode.startswith("recurrent") else np.zeros_like(bias)
    B = np.concatenate([reordered(bias[: 3 * H]), reordered(recurrent)])
    return [a.astype(np.float32) for a in (reordered(W), reordered(R), B)]


def node_model(directions, mode, state, gate):
    """A model of one bidirectional GRU node with these weights."""
    stacks = [np.stack(w) for w in zip(*(weights_of(a, mode) for a in directions), strict=True)]
    weights = [numpy_helper.from_array(w, n) for w, n in zip(stacks, "WRB", strict=True)]
    options = {"activations": [ACTIVATIONS[gate], ACTIVATIONS[state]] * 2}
    if gate == "hard-sigmoid":
        options |= {"activation_alpha": [0.2, 0.2], "activation_beta": [0.5, 0.5]}
    node = helper.make_node(
        "GRU",
        ["x", "W", "R", "B", "lengths", "h0"],
        ["y", "hidden"],
        hidden_size=H,
        direction="bidirectional",
        linear_before_reset=int(mode != "before-multiplication"),
        **options,
    )
    kinds = {"x": (T, B, CHANNELS), "h0": (2, B, H), "y": (T, 2, B, H), "hidden": (2, B, H)}
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in kinds.items()}
    lengths = helper.make_tensor_value_info("lengths", TensorProto.INT32, (B,))
    inputs, outputs = [values["x"], lengths, values["h0"]], [values["y"], values["hidden"]]
    graph = helper.make_graph([node], "gru", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=9)


@jax.jit
def both_directions(forward, backward, x, h0, lengths):
    """Outputs and states, stacked as the node has them."""
    pairs = [
        gru_jax.gru(params, x, h0[i], lengths=lengths, reverse=bool(i))
        for i, params in enumerate((forward, backward))
    ]
    return {"y": [y for y, _ in pairs], "hidden": [hidden for _, hidden in pairs]}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("mode", "state", "gate"), KINDS)
def test_equals_one_node(mode, state, gate, projected):
    rng = np.random.default_rng(8)
    sizes = (H, CHANNELS, mode, 2, 3) if projected else (H, CHANNELS, mode)
    directions = [random_params(rng, *sizes, dtype="float32") for _ in range(2)]
    for arrays in directions:
        arrays["bias"] *= 4  # far enough for hard-sigmoid to reach 0 and 1
    x, h0 = (rng.normal(size=s).astype("float32") for s in ((B, T, CHANNELS), (2, B, H)))
    model = node_model(directions, mode, state, gate)
    feed = {"x": x.swapaxes(0, 1), "h0": h0, "lengths": LENGTHS}
    y, hidden = session_of(model).run(None, feed)
    params = [as_params(arrays, mode, state, gate) for arrays in directions]
    got = both_directions(*params, x, h0, LENGTHS)
    got = {name: np.stack(parts) for name, parts in got.items()}
    assert_close(got, {"y": np.moveaxis(y, (0, 2), (2, 1)), "hidden": hidden}, 1e-6)
    read = convert.read_onnx(model)[0].params  # and the node is read as what it computes
    got = both_directions(*read, x, h0, LENGTHS)
    got = {name: np.stack(parts) for name, parts in got.items()}
    assert_close(got, {"y": np.moveaxis(y, (0, 2), (2, 1)), "hidden": hidden}, 1e-6)


# Exported models


class Case:
    """Random parameters of one or two directions, and what the oracle says of them."""

    def __init__(self, seed, mode, state="tanh", gate="sigmoid", *, way, sizes=(H, CHANNELS),
                 projectors=(), dtype="float32"):  # fmt: skip
        self.rng = np.random.default_rng(seed)
        self.kind = {"mode": mode, "state_activation": state, "gate_activation": gate}
        self.way, self.sizes, self.dtype = way, sizes, dtype
        count = 2 if way == "both" else 1
        self.arrays = [
            random_params(self.rng, *sizes, mode, *projectors, dtype=dtype) for _ in range(count)
        ]
        self.params = [as_params(a, mode, state, gate) for a in self.arrays]

    def export(self, **options):
        """The exported model."""
        params = tuple(self.params) if self.way == "both" else self.params[0]
        return export.to_onnx(params, reverse=self.way == "reverse", **options)

    def feed(self, batch=B, time=T):
        """Random x and h0."""
        state = (2, batch, self.sizes[0]) if self.way == "both" else (batch, self.sizes[0])
        shapes = {"x": (batch, time, self.sizes[1]), "h0": state}
        return {n: self.rng.normal(size=s).astype(self.dtype) for n, s in shapes.items()}

    def expected(self, x, h0, lengths=None):
        """Outputs and states of the oracle, as the exported model has them."""
        states = h0 if self.way == "both" else [h0]
        runs = [
            gru_ref(a, x, h, lengths=lengths, reverse=self.way == "reverse" or bool(i), **self.kind)
            for i, (a, h) in enumerate(zip(self.arrays, states, strict=True))
        ]
        hidden = np.stack([h for _, h in runs])
        y = np.concatenate([y for y, _ in runs], -1)
        return {"y": y, "hidden": hidden if self.way == "both" else hidden[0]}


def run(session, feed):
    """Outputs by name."""
    return dict(zip(("y", "hidden"), session.run(["y", "hidden"], feed), strict=True))


@pytest.mark.parametrize("lengths", [None, np.array([5, 0, 3], np.int32)])
@pytest.mark.parametrize("way", ["forward", "reverse", "both"])
@pytest.mark.parametrize(("mode", "state", "gate"), KINDS)
def test_exported_model_equals_the_oracle(mode, state, gate, way, lengths):
    case = Case(1, mode, state, gate, way=way)
    feed = case.feed()
    expected = case.expected(**feed, lengths=lengths)
    if lengths is not None:
        feed["lengths"] = lengths
        for x, n in zip(feed["x"], lengths, strict=True):
            x[n:] = np.nan  # reaches nothing
    assert_close(run(session_of(case.export(lengths=lengths is not None)), feed), expected, 1e-6)


@pytest.mark.parametrize("way", ["forward", "both"])
@pytest.mark.parametrize(
    ("sizes", "projectors"), [((4, 12), ()), ((5, 1), ()), ((6, 5), (3, 2)), ((33, 20), ())]
)
def test_sizes_and_projectors(sizes, projectors, way):
    for mode in MODES:
        case = Case(2, mode, way=way, sizes=sizes, projectors=projectors)
        feed = case.feed()
        assert_close(run(session_of(case.export()), feed), case.expected(**feed), 1e-6)


@pytest.mark.parametrize("way", ["forward", "both"])
def test_one_session_takes_every_batch_and_length(way):
    case = Case(3, MODES[0], way=way)
    session = session_of(case.export(lengths=True))
    for batch, time in ((1, 1), (7, 2), (2, 40)):
        feed = case.feed(batch, time)
        lengths = np.arange(batch, dtype=np.int32) % (time + 1)
        expected = case.expected(**feed, lengths=lengths)
        assert_close(run(session, feed | {"lengths": lengths}), expected, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_in_pieces_equals_one_run(mode):
    case = Case(4, mode, way="forward")
    session, feed = session_of(case.export(lengths=True)), case.feed(time=9)
    lengths = np.array([9, 4, 6], np.int32)
    hidden, outputs = feed["h0"], []
    for piece, steps in ragged.chunks(feed["x"], 4, lengths):
        got = run(session, {"x": piece, "h0": hidden, "lengths": np.asarray(steps, np.int32)})
        hidden = got["hidden"]
        outputs.append(got["y"])
    got = {"y": np.concatenate(outputs, 1), "hidden": hidden}
    assert_close(got, case.expected(**feed, lengths=lengths), 1e-6)
    assert np.array_equal(hidden[1], outputs[0][1, 3]), "a finished sequence keeps its state"


def test_float16_runs():
    case = Case(5, MODES[2], way="both", dtype="float16")
    feed = case.feed()
    got = run(session_of(case.export()), feed)
    assert {a.dtype for a in got.values()} == {np.dtype("float16")}
    assert_close(got, case.expected(**feed), 2e-3)


# The reference implementation of ONNX knows tanh and sigmoid, forward, in float64 and both layouts


@pytest.mark.parametrize("mode", MODES)
def test_float64_model_equals_the_oracle(mode):
    case = Case(6, mode, way="forward", dtype="float64")
    feed = case.feed()
    y, hidden = ReferenceEvaluator(case.export()).run(None, feed)
    assert_close({"y": y, "hidden": hidden}, case.expected(**feed), 1e-14)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_layouts_equal_the_oracle(mode, layout):
    if layout and tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23):
        pytest.skip("the reference implementation of older versions has the axes wrong")
    case = Case(6, mode, way="forward", dtype="float64")
    feed = case.feed()
    x = feed["x"] if layout else feed["x"].swapaxes(0, 1)
    h0 = np.expand_dims(feed["h0"], layout)
    given = convert.to_onnx(case.params[0], layout=layout, initial_h=True)
    fixed = convert.to_onnx(case.params[0], layout=layout, initial_h=h0)
    for model, inputs in ((given, {"X": x, "initial_h": h0}), (fixed, {"X": x})):
        onnx.checker.check_model(model, full_check=True)
        y, hidden = ReferenceEvaluator(model).run(None, inputs)
        y = y[:, :, 0] if layout else y[:, 0].swapaxes(0, 1)
        got = {"y": y, "hidden": hidden.squeeze(layout)}
        assert_close(got, case.expected(**feed), 1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_bare_node_runs_in_onnx_runtime(mode):
    case = Case(7, mode, way="reverse")
    feed, lengths = case.feed(), LENGTHS
    model = convert.to_onnx(case.params[0], reverse=True, initial_h=feed["h0"][None], lengths=True)
    inputs = {"X": feed["x"].swapaxes(0, 1), "sequence_lens": lengths}
    y, hidden = session_of(model).run(None, inputs)
    got = {"y": y[:, 0].swapaxes(0, 1), "hidden": hidden[0]}
    assert_close(got, case.expected(**feed, lengths=lengths), 1e-6)


# What a model looks like


def ports(values):
    """Names, element types and shapes."""
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return shapes, types


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", ["forward", "both"])
def test_interface(way, dtype):
    case = Case(9, MODES[0], way=way, dtype=np.dtype(getattr(ml_dtypes, dtype, dtype)))
    model = case.export(lengths=True, name="layer")
    onnx.checker.check_model(model, full_check=True)
    state = [2, "batch", H] if way == "both" else ["batch", H]
    number = TensorProto.DataType.Value(
        {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())
    )
    shapes, types = ports(model.graph.input)
    assert shapes == {"x": ["batch", "time", CHANNELS], "h0": state, "lengths": ["batch"]}
    assert types == {"x": number, "h0": number, "lengths": TensorProto.INT32}
    shapes, types = ports(model.graph.output)
    assert shapes == {"y": ["batch", "time", 2 * H if way == "both" else H], "hidden": state}
    assert types == {"y": number, "hidden": number}
    assert [n.name for n in model.graph.node if n.op_type == "GRU"] == ["layer"]
    assert model.opset_import[0].version == (22 if dtype == "bfloat16" else 17)
    assert model.ir_version <= 10  # what ONNX Runtime 1.20 reads
    assert model.producer_name == "gru_jax"
    assert MODES[0] in model.doc_string


def test_what_is_absent_is_absent():
    params = Case(10, MODES[0], way="forward").params[0]
    (node,) = convert.to_onnx(params).graph.node
    assert list(node.input) == ["X", "gru.W", "gru.R", "gru.B"]
    assert "layout" not in {a.name for a in node.attribute}
    assert list(ports(convert.to_onnx(params).graph.input)[0]) == ["X"]
    assert list(ports(export.to_onnx(params).graph.input)[0]) == ["x", "h0"]


# Refusals


def squash(v):
    return v / (1 + v * v)


@pytest.mark.parametrize("to_onnx", [convert.to_onnx, export.to_onnx])
def test_refusals(to_onnx):
    one = Case(11, MODES[0], way="forward").params[0]
    wide = Case(11, MODES[0], way="forward", sizes=(5, CHANNELS)).params[0]
    half = jax.tree.map(lambda a: a.astype("float16"), one)
    before = one.replace(reset_gate_mode="before-multiplication")
    for params, options, text in (
        (one.replace(state_activation_function=squash), {}, "state_activation_function must be"),
        ((one, one, one), {}, "one GRU, or a pair"),
        ((), {}, "one GRU, or a pair"),
        ((one, one), {"reverse": True}, "reverse=True is for one GRU"),
        ((one, wide), {}, "agree in num_hidden_units, got 4 and 5"),
        ((one, half), {}, "agree in dtype, got float32 and float16"),
        ((one, before), {}, "agree in linear_before_reset, got 1 and 0"),
        (one, {"name": ""}, "name must be a text"),
    ):
        with pytest.raises(ValueError, match=text):
            to_onnx(params, **options)
    with pytest.raises(TypeError, match=r"params must be a gru_jax\.GRUParams"):
        to_onnx([one.arrays()])
    with pytest.raises(TypeError, match="arrays of one floating-point type"):
        to_onnx(one.replace(bias=one.bias.astype("float64")))


def test_refusals_of_the_bare_node():
    params = Case(12, MODES[0], way="forward").params[0]
    with pytest.raises(ValueError, match="layout must be 0 or 1, got 2"):
        convert.to_onnx(params, layout=2)
    with pytest.raises(ValueError, match=r"initial_h must have shape \(1, 3, 4\), got \(2, 3, 4\)"):
        convert.to_onnx(params, initial_h=np.zeros((2, B, H), "float32"))
    with pytest.raises(TypeError, match="initial_h must be of the parameters' float32"):
        convert.to_onnx(params, initial_h=np.zeros((1, B, H)))


# PyTorch's exporter writes such nodes


@pytest.mark.parametrize("way", ["forward", "both"])
def test_reads_what_torch_exports(way, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.GRU(CHANNELS, H, num_layers=2, batch_first=True, bidirectional=way == "both")
    path = tmp_path / "torch.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (torch.ones(B, T, CHANNELS),), str(path), dynamo=False)
    for depth, gru in enumerate(convert.read_onnx(path)):
        ends = ("", "_reverse")[: len(gru.params)]
        assert gru.direction == ("forward" if way == "forward" else "bidirectional")
        for params, end in zip(gru.params, ends, strict=True):
            assert params.reset_gate_mode == "recurrent-bias-after-multiplication"
            own = {name: getattr(layer, f"{name}_l{depth}{end}").detach().numpy() for name in (
                "weight_ih", "weight_hh", "bias_ih", "bias_hh")}  # fmt: skip
            assert np.array_equal(params.input_weights, own["weight_ih"])
            assert np.array_equal(params.recurrent_weights, own["weight_hh"])
            assert np.array_equal(params.bias, np.concatenate((own["bias_ih"], own["bias_hh"])))
    assert depth == 1
