"""GRUs as ONNX nodes: one `GRU` node for every reset mode, activation, direction and projection.

The rows of an ONNX node stand in the order z (update), r (reset), h (candidate):

    W (D, 3H, I)   R (D, 3H, H)   B (D, 6H), the biases of the input, then of the recurrent product

for D directions. `linear_before_reset` is 1 where r multiplies R h and 0 where it multiplies h.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gru_jax._params import RESET_MODES, GRUParams
from gru_jax.convert._arrays import Dense, array, check_shape, swap
from gru_jax.convert._onnx_graph import Graph, model_of
from gru_jax.convert._onnx_tensors import load_onnx, to_tensor

if TYPE_CHECKING:
    import onnx

STATE_ACTIVATIONS: dict[Any, str] = {"tanh": "Tanh", "softsign": "Softsign"}
GATE_ACTIVATIONS: dict[Any, str] = {"sigmoid": "Sigmoid", "hard-sigmoid": "HardSigmoid"}
ALPHA, BETA = 0.2, 0.5  # of HardSigmoid: max(0, min(1, α v + β))


def to_onnx(
    params: GRUParams | Sequence[GRUParams],
    *,
    reverse: bool = False,
    layout: int = 0,
    initial_h: Any = None,
    lengths: bool = False,
    name: str = "gru",
) -> "onnx.ModelProto":
    """Writes a GRU as a bare ONNX `GRU` node, the smallest model that holds it.

    Inputs and outputs are the node's own; `gru_jax.export.to_onnx` makes a model with the axes of
    `gru_jax.gru` instead. Every reset mode and named activation is one node; a projected GRU is one
    by W = W' Q_iᵀ and R = R' Q_oᵀ, rounded once. Rows are z, r, h, and the weights' bits are kept:

        reset_gate_mode                          linear_before_reset   B
        "after-multiplication"                   1                     [b, 0]
        "recurrent-bias-after-multiplication"    1                     [b_W, b_R]
        "before-multiplication"                  0                     [b, 0]

    Args:
      params: the parameters, or a pair (forward, backward) for a bidirectional node.
      reverse: with one GRU, that it runs backwards.
      layout: 0 (default) for time-major arrays, 1 for batch-major ones, which ONNX Runtime's CPU
        kernels refuse.
      initial_h: the initial state: None (default) for zeros, True for an input "initial_h", or an
        array (D, batch, H), with layout 1 (batch, D, H), of the parameters' type. D is 1, or 2 for
        a pair.
      lengths: whether there is an input "sequence_lens" (batch,) of int32.
      name: the node's name.

    Returns:
      A model with the input "X" (time, batch, channels), those asked for, and the outputs "Y"
      (time, D, batch, H) and "Y_h" (D, batch, H), in the parameters' type; with layout 1
      (batch, time, channels), (batch, time, D, H) and (batch, D, H).

    Raises:
      ValueError: an activation is a function of your own, or the two directions differ in sizes,
        type or `linear_before_reset`, or an option is wrong.
      TypeError: an argument is of a wrong type.
      ModuleNotFoundError: the package onnx is missing.

    References:
      ONNX operators, GRU: https://onnx.ai/onnx/operators/onnx__GRU.html

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> model = convert.to_onnx(params)
      >>> [tensor.name for tensor in model.graph.input], model.graph.node[0].op_type
      (['X'], 'GRU')
      >>> same = convert.from_onnx(model, reset_gate_mode="after-multiplication")
      >>> bool((same.input_weights == params.input_weights).all())
      True
    """
    if layout not in (0, 1):
        raise ValueError(f"layout must be 0 or 1, got {layout!r}.")
    directions = directions_of(params)
    constant = None if isinstance(initial_h, bool | None) else array("initial_h", initial_h, ndim=3)
    node, weights = gru_node(
        directions, reverse=reverse, name=name, x="X", y="Y", hidden="Y_h", layout=layout,
        h0="initial_h" if constant is not None or initial_h else "",
        lengths="sequence_lens" if lengths else "",
    )  # fmt: skip
    D, rows, channels = weights[0].dims
    batch: Any = "batch" if constant is None else constant.shape[1 - layout]
    state = (batch, D, rows // 3) if layout else (D, batch, rows // 3)
    inputs = {"X": (batch, "time", channels) if layout else ("time", batch, channels)}
    inputs |= {"sequence_lens": (batch,)} if lengths else {}
    inputs |= {"initial_h": state} if initial_h is True else {}
    outputs = {"Y": (batch, "time", *state[1:]) if layout else ("time", *state), "Y_h": state}
    if constant is not None:
        if constant.dtype != (dtype := directions[0].bias.dtype):
            raise TypeError(f"initial_h must be of the parameters' {dtype}, got {constant.dtype}.")
        weights.append(to_tensor("initial_h", check_shape("initial_h", constant, state)))
    return model_of(Graph(name, [node], weights), inputs, outputs, directions)


def gru_node(
    directions: Sequence[GRUParams],
    *,
    reverse: bool = False,
    name: str,
    x: str,
    y: str = "",
    hidden: str = "",
    h0: str = "",
    lengths: str = "",
    layout: int = 0,
    dtype: Any = None,
) -> "tuple[onnx.NodeProto, list[onnx.TensorProto]]":
    """Returns a `GRU` node and its initialisers W, R and B, called "<name>.W" and so on.

    Args:
      directions: the parameters of one direction, or of two: forward and backward.
      reverse: with one, that it runs backwards.
      name: the node's.
      x: name of the input (time, batch, channels); with layout 1 (batch, time, channels).
      y: name of the output (time, D, batch, H), or (batch, time, D, H); "" where nobody wants it.
      hidden: name of the final states (D, batch, H), or (batch, D, H); "" likewise.
      h0: name of the initial states, of the same shape; "" for zeros.
      lengths: name of the sequences' lengths (batch,) in int32; "" where all are full.
      layout: 0 or 1.
      dtype: the type of the weights; that of the parameters if None.

    Raises:
      ValueError: an ONNX node cannot compute this GRU, or the two directions do not agree.
    """
    if not name or not isinstance(name, str):
        raise ValueError(f"name must be a text that is not empty, got {name!r}.")
    parts = [Dense("An ONNX GRU node", params) for params in directions]
    _check_pair(parts, reverse)
    direction = "bidirectional" if len(parts) == 2 else "reverse" if reverse else "forward"
    options: dict[str, Any] = {
        "direction": direction,
        "hidden_size": parts[0].H,
        "linear_before_reset": int(RESET_MODES[parts[0].mode].reset_after),
        **_activations(parts),
        **({"layout": 1} if layout else {}),
    }
    names = [f"{name}.{letter}" for letter in "WRB"]
    inputs = _trimmed([x, *names, lengths, h0])
    node = load_onnx().helper.make_node("GRU", inputs, _trimmed([y, hidden]), name=name, **options)
    weights = zip(*(_weights(part) for part in parts), strict=True)
    stacks = (np.stack(pair) for pair in weights)
    return node, [
        to_tensor(n, a if dtype is None else a.astype(dtype))
        for n, a in zip(names, stacks, strict=True)
    ]


def directions_of(params: GRUParams | Sequence[GRUParams]) -> tuple[GRUParams, ...]:
    """Returns one GRU, or both of a pair, as a tuple."""
    return tuple(params) if isinstance(params, Sequence) else (params,)


def _check_pair(parts: list[Dense], reverse: bool) -> None:
    if len(parts) not in (1, 2):
        raise ValueError(
            f"params must be one GRU, or a pair (forward, backward), got {len(parts)}."
        )
    if len(parts) == 1:
        return
    if reverse:
        raise ValueError("reverse=True is for one GRU; a pair has both directions, got a pair.")
    facts = [
        {
            "num_hidden_units": part.H,
            "input_size": part.I,
            "dtype": part.W.dtype.name,
            "linear_before_reset": int(RESET_MODES[part.mode].reset_after),
        }
        for part in parts
    ]
    for what, first in facts[0].items():
        if first != facts[1][what]:
            raise parts[0].refuse(
                f"both directions must agree in {what}, got {first} and {facts[1][what]}."
            )


def _activations(parts: list[Dense]) -> dict[str, Any]:
    """The attributes that name f (gates) and g (state) of each direction."""
    names = []
    for part in parts:
        part.need_activations(tuple(STATE_ACTIVATIONS), tuple(GATE_ACTIVATIONS))
        names.append(GATE_ACTIVATIONS[part.params.gate_activation_function])
        names.append(STATE_ACTIVATIONS[part.params.state_activation_function])
    hard = names.count("HardSigmoid")
    numbers = {"activation_alpha": [ALPHA] * hard, "activation_beta": [BETA] * hard}
    return {"activations": names} | (numbers if hard else {})


def _weights(part: Dense) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W, R and B of one direction, rows z, r, h."""
    b_R = np.zeros_like(part.b) if part.b_R is None else part.b_R
    return swap(part.W), swap(part.R), np.concatenate((swap(part.b), swap(b_R)))


def _trimmed(names: list[str]) -> list[str]:
    """Without the empty names at the end."""
    while names and not names[-1]:
        names = names[:-1]
    return names
