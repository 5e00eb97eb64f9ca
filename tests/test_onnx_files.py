"""ONNX files in and out: bit by bit, in every form a tensor may have, and nothing from bad ones."""

import itertools
import pickle
import re
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import pytest
from cases import random_params
from onnx import TensorProto, helper, numpy_helper
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS

import gru_jax
from gru_jax import convert, export

DTYPES = ("float64", "float32", "float16", "bfloat16")
RECURRENT = MODES[2]
H, CHANNELS = 2, 3


def gru_params(seed, H, channels, mode, dtype="float64", *, P=(), state="tanh", gate="sigmoid"):
    """Random parameters whose leaves are NumPy arrays."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    arrays = random_params(np.random.default_rng(seed), H, channels, mode, *P, dtype=dtype)
    return gru_jax.GRUParams(
        **arrays,
        reset_gate_mode=mode,
        state_activation_function=state,
        gate_activation_function=gate,
    )


def assert_same(one, two):
    """The same bits, types and options."""
    for name, a in two.arrays().items():
        b = getattr(one, name)
        assert isinstance(b, np.ndarray)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes(), name
    assert one.arrays().keys() == two.arrays().keys()
    assert one.reset_gate_mode == two.reset_gate_mode
    assert one.state_activation_function == two.state_activation_function
    assert one.gate_activation_function == two.gate_activation_function


# Round trips


@pytest.mark.parametrize("sizes", [(4, 3), (4, 12), (5, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_round_trip(mode, dtype, sizes, tmp_path):
    kinds = itertools.product((0, 1), STATE_ACTIVATIONS, GATE_ACTIVATIONS)
    for seed, (layout, state, gate) in enumerate(kinds):
        params = gru_params(seed, *sizes, mode, dtype, state=state, gate=gate)
        for reverse in (False, True):
            model = convert.to_onnx(params, reverse=reverse, layout=layout)
            path = tmp_path / "gru.onnx"
            path.write_bytes(model.SerializeToString())
            for source in (model, model.SerializeToString(), path, str(path)):
                again = convert.from_onnx(source, reverse=reverse, reset_gate_mode=mode)
                assert_same(again, params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_round_trip_of_a_pair(mode, dtype):
    pair = [
        gru_params(1, 4, 3, mode, dtype, state="softsign"),
        gru_params(2, 4, 3, mode, dtype, gate="hard-sigmoid"),
    ]
    model = convert.to_onnx(pair)
    for reverse, params in enumerate(pair):
        again = convert.from_onnx(model, reverse=bool(reverse), reset_gate_mode=mode)
        assert_same(again, params)


def test_round_trip_of_special_numbers():
    params = gru_params(1, 4, 3, RECURRENT, "float32")
    bits = np.array([0x7F800001, 0xFFC00000, 0x80000000, 1, 0xFF800000], np.uint32)
    params.bias[:5] = bits.view(np.float32)  # NaN, negative NaN, −0, the smallest number, −∞
    assert_same(convert.from_onnx(convert.to_onnx(params)), params)


def test_projected_parameters_become_dense():
    params = gru_params(1, 4, 3, RECURRENT, P=(2, 3))
    again = convert.from_onnx(convert.to_onnx(params))
    W = params.input_weights @ params.input_projector.T
    R = params.recurrent_weights @ params.output_projector.T
    np.testing.assert_allclose(again.input_weights, W, rtol=1e-14)
    np.testing.assert_allclose(again.recurrent_weights, R, rtol=1e-14)
    assert again.input_projector is again.output_projector is None


@pytest.mark.parametrize("layout", [0, 1])
def test_records(layout):
    pair = [gru_params(seed, 4, 3, MODES[0], "float32") for seed in (1, 2)]
    h0 = np.random.default_rng(0).normal(size=(7, 2, 4) if layout else (2, 7, 4)).astype("float32")
    model = convert.to_onnx(pair, layout=layout, initial_h=h0, lengths=True, name="both")
    (gru,) = convert.read_onnx(model)
    assert (gru.name, gru.direction, gru.layout) == ("both", "bidirectional", layout)
    assert (gru.hidden_size, gru.input_size, len(gru.params)) == (4, 3, 2)
    assert (gru.x, gru.y, gru.y_h, gru.sequence_lens) == ("X", "Y", "Y_h", "sequence_lens")
    assert np.array_equal(gru.initial_h, h0)
    (gru,) = convert.read_onnx(convert.to_onnx(pair, layout=layout, initial_h=True))
    assert (gru.initial_h, gru.sequence_lens) == ("initial_h", None)
    assert convert.read_onnx(convert.to_onnx(pair))[0].initial_h is None


# Nodes written by hand: rows of the update gate are 1, of the reset gate 2, of the candidate 3


def weights(directions=1, dtype="float32"):
    """W, R and B whose numbers say where they stand."""
    gates = np.repeat([1.0, 2.0, 3.0], H)
    columns = np.arange(CHANNELS) / 8
    W = gates[:, None] + columns
    R = -gates[:, None] - columns[:H]
    B = np.concatenate((10 * gates, -10 * gates))
    return {
        n: np.stack([a] * directions).astype(dtype) for n, a in zip("WRB", (W, R, B), strict=True)
    }


def model_of(inputs=("X", "W", "R", "B"), tensors=None, nodes=(), outputs=("Y",), **attributes):
    """A model of one GRU node, written with ONNX's own helpers."""
    if tensors is None:
        tensors = [numpy_helper.from_array(a, n) for n, a in weights().items()]
    node = helper.make_node("GRU", inputs, outputs, name="node", **attributes)
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ("time", "batch", CHANNELS))
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
    graph = helper.make_graph([*nodes, node], "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])


EXPECTED_GATES = np.repeat([2.0, 1.0, 3.0], H)  # reset, update, candidate


def assert_expected(params, mode=RECURRENT):
    """The numbers of `weights`, in the order of the library."""
    assert params.reset_gate_mode == mode
    columns = np.arange(CHANNELS) / 8
    assert np.array_equal(params.input_weights, EXPECTED_GATES[:, None] + columns)
    assert np.array_equal(params.recurrent_weights, -EXPECTED_GATES[:, None] - columns[:H])
    bias = np.concatenate((10 * EXPECTED_GATES, -10 * EXPECTED_GATES))
    assert np.array_equal(params.bias, bias if mode == RECURRENT else np.zeros(3 * H))


@pytest.mark.parametrize("form", ["raw", "typed", "constants", "copies", "inputs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_of_tensors(form, dtype):
    arrays = weights(dtype=np.dtype(getattr(ml_dtypes, dtype, dtype)))
    tensors = [convert_tensor(n, a, raw=form != "typed") for n, a in arrays.items()]
    nodes, names = [], ("X", "W", "R", "B")
    if form == "constants":
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors]
        tensors = []
    if form == "copies":
        nodes = [helper.make_node("Identity", [f"{n}{i}" if i else n], [f"{n}{i + 1}"])
                 for n in "WRB" for i in range(2)]  # fmt: skip
        names = ("X", "W2", "R2", "B2")
    model = model_of(names, tensors, nodes, linear_before_reset=1)
    if form == "inputs":  # as old files list their initialisers
        model.graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors
        )
    params = convert.from_onnx(model)
    assert params.bias.dtype == dtype
    assert_expected(params)


def convert_tensor(name, a, *, raw):
    """A tensor by ONNX's own helper, as bytes or as a list of numbers."""
    kind = {"float64": "DOUBLE", "float32": "FLOAT"}.get(a.dtype.name, a.dtype.name.upper())
    data = a.tobytes() if raw else a.astype("float64").ravel().tolist()
    return helper.make_tensor(name, TensorProto.DataType.Value(kind), a.shape, data, raw=raw)


def test_defaults():
    """Without attributes a node is before-multiplication with tanh and sigmoid, without a bias."""
    params = convert.from_onnx(model_of(("X", "W", "R")))
    assert_expected(params, "before-multiplication")
    assert (params.state_activation_function, params.gate_activation_function) == (
        "tanh",
        "sigmoid",
    )
    asked = convert.from_onnx(
        model_of(("X", "W", "R"), linear_before_reset=1), reset_gate_mode="after-multiplication"
    )
    assert_expected(asked, "after-multiplication")


@pytest.mark.parametrize("numbers", [{}, {"activation_alpha": [0.2], "activation_beta": [0.5]}])
def test_activations(numbers):
    params = convert.from_onnx(
        model_of(linear_before_reset=1, activations=["HardSigmoid", "Softsign"], **numbers)
    )
    assert params.state_activation_function == "softsign"
    assert params.gate_activation_function == "hard-sigmoid"


def test_two_biases_that_only_their_sum_counts():
    arrays = weights()
    arrays["B"][0, 3 * H :] = np.arange(3 * H)
    tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    model = model_of(tensors=tensors)
    with pytest.raises(ValueError, match="fold_biases=True"):
        convert.from_onnx(model)
    params = convert.from_onnx(model, fold_biases=True)
    added = np.array([2, 3, 0, 1, 4, 5])  # rows z, r, h as r, z, h
    assert np.array_equal(params.bias, 10 * EXPECTED_GATES + added)
    assert convert.read_onnx(model, fold_biases=True)[0].params[0].bias.shape == (3 * H,)


def test_reset_gate_mode():
    after, before = model_of(linear_before_reset=1), model_of(("X", "W", "R"))
    with pytest.raises(ValueError, match="the recurrent bias is not zero"):
        convert.from_onnx(after, reset_gate_mode="after-multiplication")
    for model, mode in ((after, "before-multiplication"), (before, RECURRENT)):
        with pytest.raises(ValueError, match="reset_gate_mode must be"):
            convert.from_onnx(model, reset_gate_mode=mode)
    with pytest.raises(ValueError, match="reset_gate_mode must be one of"):
        convert.from_onnx(after, reset_gate_mode="sometimes")


def test_directions():
    one, two = weights(), {n: np.concatenate((a, 2 * a)) for n, a in weights().items()}
    both = [numpy_helper.from_array(a, n) for n, a in two.items()]
    model = model_of(tensors=both, linear_before_reset=1, direction="bidirectional")
    assert_expected(convert.from_onnx(model))
    backward = convert.from_onnx(model, reverse=True)
    assert np.array_equal(backward.bias, 2 * convert.from_onnx(model).bias)
    forward, reverse = (
        model_of(direction=d, linear_before_reset=1) for d in ("forward", "reverse")
    )
    assert_expected(convert.from_onnx(reverse, reverse=True))
    with pytest.raises(ValueError, match="reverse must be True, because 'node' is a node of dir"):
        convert.from_onnx(reverse)
    with pytest.raises(ValueError, match="reverse must be False"):
        convert.from_onnx(forward, reverse=True)
    assert one["W"].shape[0] == 1


def test_several_nodes():
    model = model_of(linear_before_reset=1)
    other = helper.make_node("GRU", ["Y", "V", "R", "B"], ["Z"], name="other", clip=1.0)
    model.graph.node.append(other)
    assert_expected(convert.from_onnx(model, node="node"))
    for number in (0, np.int64(0), np.uint8(0)):
        assert_expected(convert.from_onnx(model, node=number))
    for node in (None, "no such", 2, -1, -2):
        with pytest.raises(ValueError, match=r"GRU nodes 0 'node', 1 'other', got"):
            convert.from_onnx(model, node=node)
    with pytest.raises(ValueError, match="clip"):
        convert.read_onnx(model)
    for node in (True, np.True_, 0.0, b"node"):
        with pytest.raises(TypeError, match="node must be a name or a number, got"):
            convert.from_onnx(model, node=node)
    other.CopyFrom(helper.make_node("GRU", ["Y", "W", "R"], ["Z"], name="node"))
    model.graph.node[1].CopyFrom(other)
    with pytest.raises(ValueError, match="GRU nodes 0 'node', 1 'node'"):
        convert.from_onnx(model, node="node")
    assert [gru.x for gru in convert.read_onnx(model)] == ["X", "Y"]


# Weights in another file


def external(tmp_path, **changes):
    """A model on disk whose W lies in another file."""
    model = model_of(linear_before_reset=1)
    W = model.graph.initializer[0]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"1234" + W.raw_data)
    (tmp_path / "outside.bin").write_bytes(b"1234" + W.raw_data)
    entries = {"location": "weights.bin", "offset": "4", "length": str(len(W.raw_data))} | changes
    W.ClearField("raw_data")
    W.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        if value is not None:
            W.external_data.add(key=key, value=value)
    path = tmp_path / "model" / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data(tmp_path):
    path = external(tmp_path)
    assert_expected(convert.from_onnx(path))
    assert_expected(convert.from_onnx(onnx.load(path)))
    for unloaded in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(ValueError, match="lies in another file: pass the model's path"):
            convert.from_onnx(unloaded)


def test_external_data_without_a_length(tmp_path):
    assert_expected(convert.from_onnx(external(tmp_path, length=None)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"location": "../outside.bin"}, "in a file of the model's folder"),
        ({"location": "/etc/passwd"}, "in a file of the model's folder"),
        ({"location": "link.bin"}, "in a file of the model's folder"),
        ({"location": "missing.bin"}, "in a file of the model's folder"),
        ({"location": ""}, "in a file of the model's folder"),
        ({"location": None}, "in a file of the model's folder"),
        ({"location": "."}, "in a file of the model's folder"),
        ({"offset": "5"}, "must hold 72 bytes"),
        ({"offset": "-4"}, "must hold 72 bytes"),
        ({"offset": "9" * 30}, "must hold 72 bytes"),
        ({"offset": "four"}, "must hold 72 bytes"),
        ({"length": str(2**40)}, "must hold 72 bytes"),
        ({"length": "71"}, "must hold 72 bytes"),
    ],
)
def test_bad_external_data(changes, text, tmp_path):
    path = external(tmp_path, **changes)
    (path.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(ValueError, match=text):
        convert.from_onnx(path)


def test_external_data_smaller_than_their_shape(tmp_path):
    path = external(tmp_path, length=str(2**42))
    model = onnx.load(path, load_external_data=False)
    set_field(dims=[1, 2**20, 2**20])(model.graph.initializer[0], None, None)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"must hold 4398046511104 bytes, got .* in a file of 76"):
        convert.from_onnx(path)


# Bad files


def broken(change, **options):
    """A good model, after a change of its first tensor (W), its node or the whole."""
    model = model_of(linear_before_reset=1, **options)
    change(model.graph.initializer[0], model.graph.node[0], model)
    return model


def set_field(**fields):
    """A change of fields of W."""

    def change(W, node, model):
        for name, value in fields.items():
            if isinstance(value, list):
                del getattr(W, name)[:]
                getattr(W, name).extend(value)
            else:
                setattr(W, name, value)

    return change


def replace_tensor(name, a):
    """A change of one of the arrays."""

    def change(W, node, model):
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        tensor.CopyFrom(numpy_helper.from_array(a, name))

    return change


def attribute(name, value):
    """One more attribute."""
    return lambda W, node, model: node.attribute.append(helper.make_attribute(name, value))


def remove(name):
    """One tensor less."""

    def change(W, node, model):
        kept = [t for t in model.graph.initializer if t.name != name]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)

    return change


F32 = np.float32
BAD = {
    "too large": (set_field(dims=[1, 2**20, 2**20]), "must hold 4398046511104 bytes"),
    "overflowing": (set_field(dims=[2**40, 2**40, 2**40]), "bytes for shape"),
    "wraps to its size": (set_field(dims=[2**62, 4, 18]), "bytes for shape"),
    "negative": (set_field(dims=[1, -6, -3]), r"positive sizes, got shape \(1, -6, -3\)"),
    "empty": (set_field(dims=[1, 6, 0], raw_data=b""), "positive sizes"),
    "without a shape": (set_field(dims=[]), "must hold 4 bytes"),
    "short data": (set_field(raw_data=b"12345"), "must hold 72 bytes"),
    "no data": (set_field(raw_data=b""), "must hold 72 bytes"),
    "two kinds of data": (set_field(float_data=[1.0]), "raw_data and float_data"),
    "data of another kind": (set_field(raw_data=b"", int64_data=[1] * 18), "got int64_data"),
    "not 16 bits": (set_field(data_type=10, raw_data=b"", int32_data=[-1] * 18), "of 16 bits"),
    "no type": (set_field(data_type=0), "float16 or bfloat16, got undefined"),
    "a type of the future": (set_field(data_type=999), "got type 999"),
    "integers": (replace_tensor("W", np.ones((1, 6, 3), np.int64)), "got int64"),
    "strings": (replace_tensor("W", np.full((1, 6, 3), "a", object)), "got string"),
    "two types": (replace_tensor("W", np.ones((1, 6, 3))), "of R's type float32, got float64"),
    "two directions": (replace_tensor("W", np.ones((2, 6, 3), F32)), r"shape \(1, 6, 3\), got"),
    "W transposed": (replace_tensor("W", np.ones((1, 3, 6), F32)), r"shape \(1, 6, 6\), got"),
    "two axes": (replace_tensor("W", np.ones((6, 3), F32)), "must have 3 axes"),
    "R not square": (replace_tensor("R", np.ones((1, 6, 3), F32)), r"R .* shape \(1, 9, 3\), got"),
    "short B": (replace_tensor("B", np.ones((1, 6), F32)), r"B .* shape \(1, 12\), got \(1, 6\)"),
    "W missing": (remove("W"), "'W' is an input of the graph"),
    "clip": (attribute("clip", 3.0), "must not have the attribute clip"),
    "unknown attribute": (attribute("zoneout", 0.1), "got 'zoneout'"),
    "attribute of a wrong type": (attribute("hidden_size", 2.0), "for hidden_size"),
    "attribute of a function": (
        lambda W, node, model: setattr(node.attribute[0], "ref_attr_name", "a"),
        "for linear_before_reset",
    ),
    "attribute twice": (attribute("linear_before_reset", 0), "each attribute once"),
    "another hidden_size": (attribute("hidden_size", 4), "hidden_size = 4 columns, got 2"),
    "unknown layout": (attribute("layout", 2), "layout of .* must be 0 or 1, got 2"),
    "unknown direction": (attribute("direction", "up"), "direction of .* got 'up'"),
    "other gates": (attribute("activations", ["Relu", "Tanh"]), "got .'Relu', 'Tanh'"),
    "other state": (attribute("activations", ["Sigmoid", "Affine"]), "got .'Sigmoid', 'Affine'"),
    "few activations": (attribute("activations", ["Sigmoid"]), "for each of 1 directions"),
    "no GRU": (lambda W, node, model: setattr(node, "op_type", "LSTM"), "others: LSTM"),
    "another GRU": (lambda W, node, model: setattr(node, "domain", "com.other"), "others: GRU"),
    "two inputs": (lambda W, node, model: node.input.__delitem__(slice(2, 4)), "inputs X, W and R"),
    "no W": (lambda W, node, model: node.input.__setitem__(1, ""), "inputs X, W and R"),
    "seven inputs": (lambda W, node, model: node.input.extend("abc"), "inputs X, W and R"),
    "three outputs": (lambda W, node, model: node.output.extend("ab"), "outputs Y, Y_h"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("read", [convert.from_onnx, convert.read_onnx])
def test_bad_models(read, name, tmp_path):
    change, text = BAD[name]
    data = broken(change).SerializeToString()
    tracemalloc.start()
    with pytest.raises(ValueError, match=text):
        read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: (?s:.*){text}"):
            read(source)


@pytest.mark.parametrize(("alpha", "beta"), [([0.3], [0.5]), ([0.2], [0.4]), ([0.2, 0.2], [0.5])])
def test_other_hard_sigmoids(alpha, beta):
    names = ["HardSigmoid", "Tanh"]
    model = model_of(activations=names, activation_alpha=alpha, activation_beta=beta)
    with pytest.raises(ValueError, match="for each HardSigmoid"):
        convert.from_onnx(model)


def test_names_that_are_no_text():
    data = model_of().SerializeToString().replace(b"node", b"n\xffde")
    with pytest.raises(ValueError, match="names in UTF-8"):
        convert.from_onnx(data)


def test_weights_that_are_computed():
    for operator, inputs in (("Transpose", ["V"]), ("Identity", ["W"]), ("Identity", ["V"])):
        node = helper.make_node(operator, inputs, ["W"])
        tensors = [numpy_helper.from_array(a, n) for n, a in weights().items() if n != "W"]
        with pytest.raises(ValueError, match="W of GRU node 'node' must be a constant"):
            convert.from_onnx(model_of(tensors=tensors, nodes=[node]))


def test_initial_states_and_lengths():
    good = np.ones((1, 5, H), F32)
    names = ("X", "W", "R", "B", "lengths", "h0")
    for h0, lengths, text in (
        (good, np.arange(5, dtype=np.int32), None),
        (np.ones((5, 1, H), F32), np.arange(5, dtype=np.int32), r"initial_h .* shape \(1, 1, 2\)"),
        (good.astype("float64"), np.arange(5, dtype=np.int32), "of R's type float32"),
        (good, np.arange(5), "sequence_lens of GRU node 'node' must be of int32, got int64"),
        (good, np.ones((5, 1), np.int32), "sequence_lens .* must have 1 axes"),
    ):
        arrays = weights() | {"h0": h0, "lengths": lengths}
        tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
        model = model_of(names, tensors, linear_before_reset=1)
        if text is None:
            (gru,) = convert.read_onnx(model)
            assert np.array_equal(gru.initial_h, h0)
            assert np.array_equal(gru.sequence_lens, lengths)
        else:
            with pytest.raises(ValueError, match=text):
                convert.read_onnx(model)


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("something in a file was executed",)


@pytest.mark.parametrize(
    "data",
    [pickle.dumps(Trap()), b"not a model", b"", b"\x00" * 64, "größer".encode(), b"PK\x03\x04"],
)
def test_other_files(data, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    for source, name in ((data, ""), (path, f"{re.escape(str(path))}: ")):
        with pytest.raises(ValueError, match=f"^{name}model must"):
            convert.from_onnx(source)


def test_without_onnx(monkeypatch):
    params = gru_params(0, 4, 3, MODES[0])
    model = convert.to_onnx(params).SerializeToString()
    monkeypatch.setitem(sys.modules, "onnx", None)
    calls = (lambda: convert.to_onnx(params), lambda: convert.from_onnx(model),
             lambda: convert.read_onnx(model))  # fmt: skip
    for call in calls:
        with pytest.raises(ModuleNotFoundError, match=r'onnx: pip install "gru_jax\[onnx\]"'):
            call()


@pytest.mark.parametrize("write", [convert.to_onnx, export.to_onnx])
def test_what_are_no_parameters(write):
    for thing in (None, 5, {"bias": np.ones(3)}, object(), "ab", [1, 2]):
        found = thing[0] if isinstance(thing, str | list) else thing
        words = rf"params must be a gru_jax\.GRUParams, got {type(found).__name__}\."
        with pytest.raises(TypeError, match=words):
            write(thing)


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2"])
def test_initial_states_of_either_byte_order(dtype):
    params, h0 = (
        gru_params(1, 4, 3, RECURRENT, dtype[1:]),
        np.random.default_rng(0).normal(size=(1, 5, 4)),
    )
    one, two = (convert.to_onnx(params, initial_h=h0.astype(order)) for order in (dtype, dtype[1:]))
    assert one == two


def test_sums_of_biases_that_overflow():
    arrays = {n: np.full_like(a, 4e4) for n, a in weights(dtype="float16").items()}
    model = model_of(tensors=[numpy_helper.from_array(a, n) for n, a in arrays.items()])
    with pytest.raises(ValueError, match=r"the sum of two biases must be finite.*float16"):
        convert.from_onnx(model, fold_biases=True)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"an onnx\.ModelProto, its bytes or a path, got int"):
        convert.from_onnx(3)
    with pytest.raises(FileNotFoundError):
        convert.from_onnx("no such file.onnx")


def test_truncated_files():
    params = gru_params(1, 4, 3, RECURRENT, "float32")
    data = convert.to_onnx(params).SerializeToString()
    refused = 0
    for end in range(len(data)):
        try:
            assert_same(convert.from_onnx(data[:end]), params)
        except ValueError:
            refused += 1
    assert refused > len(data) - 8  # but for what stands behind the graph


def test_damaged_files():
    """A flipped byte is refused, or changes what it says, and never anything else."""
    data = convert.to_onnx(gru_params(1, 4, 3, RECURRENT, "float32")).SerializeToString()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        try:
            params = convert.from_onnx(bytes(damaged))
            assert params.input_weights.shape[0] == params.recurrent_weights.shape[0]
        except ValueError:
            refused += 1
    assert 100 < refused < 1900
