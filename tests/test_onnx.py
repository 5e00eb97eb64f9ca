"""Against ONNX Runtime: one GRU node for every mode, activation and projection, float32.

Its gates stand in the order z, r, h; a projected layer is one node by W = W' Q_iᵀ, R = R' Q_oᵀ.
"""

import itertools

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from cases import as_params, assert_close, random_params
from onnx import TensorProto, helper, numpy_helper
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS

import gru_jax

H, CHANNELS, T, B = 4, 3, 5, 3
LENGTHS = np.array([5, 1, 3], np.int32)
ACTIVATIONS = {
    "tanh": "Tanh",
    "softsign": "Softsign",
    "sigmoid": "Sigmoid",
    "hard-sigmoid": "HardSigmoid",
}


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


def node_session(directions, mode, state, gate):
    """An ONNX Runtime session of one bidirectional GRU node with these weights."""
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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=9)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@jax.jit
def both_directions(forward, backward, x, h0, lengths):
    """Outputs and states, stacked as the node has them."""
    pairs = [
        gru_jax.gru(params, x, h0[i], lengths=lengths, reverse=bool(i))
        for i, params in enumerate((forward, backward))
    ]
    return {"y": [y for y, _ in pairs], "hidden": [hidden for _, hidden in pairs]}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(
    ("mode", "state", "gate"), list(itertools.product(MODES, STATE_ACTIVATIONS, GATE_ACTIVATIONS))
)
def test_equals_one_node(mode, state, gate, projected):
    rng = np.random.default_rng(8)
    sizes = (H, CHANNELS, mode, 2, 3) if projected else (H, CHANNELS, mode)
    directions = [random_params(rng, *sizes, dtype="float32") for _ in range(2)]
    for arrays in directions:
        arrays["bias"] *= 4  # far enough for hard-sigmoid to reach 0 and 1
    x, h0 = (rng.normal(size=s).astype("float32") for s in ((B, T, CHANNELS), (2, B, H)))
    session = node_session(directions, mode, state, gate)
    feed = {"x": x.swapaxes(0, 1), "h0": h0, "lengths": LENGTHS}
    y, hidden = session.run(None, feed)
    params = [as_params(arrays, mode, state, gate) for arrays in directions]
    got = both_directions(*params, x, h0, LENGTHS)
    got = {name: np.stack(parts) for name, parts in got.items()}
    assert_close(got, {"y": np.moveaxis(y, (0, 2), (2, 1)), "hidden": hidden}, 1e-6)
