"""One GRU as an ONNX model, with the axes, states and lengths of `gru_jax.gru`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gru_jax._params import GRUParams
from gru_jax.convert._onnx import directions_of, gru_node
from gru_jax.convert._onnx_graph import Graph, model_of

if TYPE_CHECKING:
    import onnx


def to_onnx(
    params: GRUParams | Sequence[GRUParams],
    *,
    reverse: bool = False,
    lengths: bool = False,
    name: str = "gru",
) -> "onnx.ModelProto":
    """Exports a GRU as an ONNX model around one native `GRU` node.

    It computes what `gru_jax.gru(params, x, h0, lengths=lengths, reverse=reverse)` computes. Batch
    and time are free in every call; a stream runs in pieces, `hidden` of one being `h0` of the
    next. Every reset mode and named activation is possible; a projected GRU is exported through
    the equal dense one, W = W' Q_iᵀ and R = R' Q_oᵀ.

    All arrays have the parameters' type. ONNX Runtime's CPU kernels run float32, and float16 by
    way of float32; no float64 and no bfloat16, which are for other runtimes. Cast the parameters
    first, `jax.tree.map(lambda a: a.astype("float32"), params)`, to run them there, with at least
    one sequence and one step in each call: its kernel aborts on none.

    Args:
      params: the parameters, or a pair (forward, backward) for both directions.
      reverse: with one GRU, that it runs backwards; outputs stay aligned with inputs.
      lengths: whether there is a third input, the true lengths of right-padded sequences.
      name: the node's name, and the beginning of the weights'.

    Returns:
      A model of opset 17 (22 for bfloat16) with the inputs "x" (batch, time, channels), "h0"
      (batch, H) and, where asked for, "lengths" (batch,) of int32; and the outputs "y"
      (batch, time, H), zero in the padding, and "hidden" (batch, H), each sequence's last state,
      h0 where the length is 0. For a pair y is (batch, time, 2H), forward first, and h0 and hidden
      are (2, batch, H).

    Raises:
      ValueError: an activation is a function of your own, or the two directions differ in sizes,
        type or in whether the reset gate acts after the product.
      TypeError: an argument is of a wrong type.
      ModuleNotFoundError: the package onnx is missing.

    References:
      ONNX operators, GRU: https://onnx.ai/onnx/operators/onnx__GRU.html

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, onnxruntime, gru_jax
      >>> from gru_jax import export
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> model = export.to_onnx(params)
      >>> session = onnxruntime.InferenceSession(model.SerializeToString())
      >>> x, h0 = np.ones((3, 50, 12), np.float32), np.zeros((3, 100), np.float32)
      >>> y, hidden = session.run(None, {"x": x, "h0": h0})
      >>> bool(jnp.allclose(y, gru_jax.gru(params, x, h0)[0], atol=1e-6))
      True
    """
    directions = directions_of(params)
    pair = len(directions) == 2
    final = f"{name}.Y_h" if lengths or not pair else "hidden"
    node, weights = gru_node(
        directions, reverse=reverse, name=name, x=f"{name}.X", y=f"{name}.Y", hidden=final,
        h0="h0" if pair else f"{name}.initial_h", lengths="lengths" if lengths else "",
    )  # fmt: skip
    D, rows, channels = weights[0].dims
    width = D * rows // 3
    graph = Graph(name, constants=weights)
    graph.add("Transpose", "x", to=f"{name}.X", perm=[1, 0, 2])
    if not pair:
        graph.add("Unsqueeze", "h0", graph.integers("direction", [0]), to=f"{name}.initial_h")
    graph.nodes.append(node)
    graph.add("Transpose", f"{name}.Y", to=f"{name}.directions", perm=[2, 0, 1, 3])
    shape = graph.integers("shape", [0, 0, width])  # 0 keeps an axis
    graph.add("Reshape", f"{name}.directions", shape, to="y")
    if not pair:
        squeezed = f"{name}.last" if lengths else "hidden"
        final = graph.add("Squeeze", final, f"{name}.direction", to=squeezed)
    if lengths:
        _keep_initial_state(graph, final)
    state = (2, "batch", width // 2) if pair else ("batch", width)
    inputs = {"x": ("batch", "time", channels), "h0": state}
    inputs |= {"lengths": ("batch",)} if lengths else {}
    outputs = {"y": ("batch", "time", width), "hidden": state}
    return model_of(graph, inputs, outputs, directions)


def _keep_initial_state(graph: Graph, final: str) -> None:
    """Adds "hidden": h0 where the length is 0, where ONNX Runtime has zeros, else the state."""
    name = graph.name
    some = graph.add("Greater", "lengths", graph.integers("zero", 0, np.int32), to=f"{name}.some")
    some = graph.add("Unsqueeze", some, graph.integers("units", [-1]), to=f"{name}.some_units")
    graph.add("Where", some, final, "h0", to="hidden")
