"""GRUs out of ONNX models: any `GRU` node whose weights are constants."""

import dataclasses
from typing import Any

import numpy as np

from gru_jax._params import AFTER, BEFORE, RECURRENT_BIAS, GRUParams
from gru_jax.convert._arrays import FLOATS, add, build, check_shape, swap
from gru_jax.convert._choices import index, reset_mode
from gru_jax.convert._onnx import ALPHA, BETA, GATE_ACTIVATIONS, STATE_ACTIVATIONS
from gru_jax.convert._onnx_nodes import Model, Node, reading

GATES = {name.lower(): option for option, name in GATE_ACTIVATIONS.items()}
STATES = {name.lower(): option for option, name in STATE_ACTIVATIONS.items()}
DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxGRU:
    """One `GRU` node of an ONNX model, with D directions.

    Args:
      name: the node's, which may be empty.
      direction: "forward", "reverse" or "bidirectional".
      layout: 0 if x is (time, batch, channels), 1 if it is (batch, time, channels).
      hidden_size: H.
      input_size: I.
      params: the parameters of each direction, forward first.
      initial_h: the initial states (D, batch, H), with layout 1 (batch, D, H), if they are a
        constant; else the name of the tensor that holds them; None for zeros.
      sequence_lens: the sequences' lengths (batch,) likewise; None if all are full.
      x: name of the input.
      y: name of the output of all steps, "" if there is none.
      y_h: name of the output of the final states, "" if there is none.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> pair = [gru_jax.init_params(jax.random.key(n), 100, 12) for n in range(2)]
      >>> (gru,) = convert.read_onnx(convert.to_onnx(pair, initial_h=True))
      >>> gru.direction, gru.hidden_size, len(gru.params), gru.initial_h, gru.sequence_lens
      ('bidirectional', 100, 2, 'initial_h', None)
    """

    name: str
    direction: str
    layout: int
    hidden_size: int
    input_size: int
    params: tuple[GRUParams, ...]
    initial_h: np.ndarray | str | None
    sequence_lens: np.ndarray | str | None
    x: str
    y: str
    y_h: str


def from_onnx(
    model: Any,
    *,
    node: str | int | None = None,
    reverse: bool = False,
    reset_gate_mode: str | None = None,
    fold_biases: bool = False,
) -> GRUParams:
    """Reads one direction of a `GRU` node of an ONNX model.

        linear_before_reset   reset_gate_mode
        1                     "recurrent-bias-after-multiplication"; "after-multiplication" if
                              asked for, where the recurrent bias is zero
        0                     "before-multiplication"

    Nothing in the file is executed. The initial state and lengths are no parameters: `read_onnx`
    has them.

    Args:
      model: an `onnx.ModelProto`, its bytes, or a path; weights in files beside the model are read
        only from a path.
      node: name of the node, or its number among the model's GRU nodes, if there are several.
      reverse: False (default) for the forward direction, True for the backward one. A node that
        only runs backwards needs True, and its parameters `gru(..., reverse=True)`.
      reset_gate_mode: None (default) for the table's first.
      fold_biases: with linear_before_reset = 0 there are two biases, which are only ever added. If
        the second is not zero, True adds it to the first: the same function, but for one rounding.

    Returns:
      The parameters as NumPy arrays in the file's type; ONNX rows z, r, h become r, z, h.

    Raises:
      ValueError: this is no ONNX model, or no GRU that is known here: other activations, `clip`,
        weights that are no constants, tensors whose shapes, types or data do not agree. Or an
        option does not fit the node.
      TypeError: `model` or `node` is of a wrong type.
      ModuleNotFoundError: the package onnx is missing.

    References:
      ONNX operators, GRU: https://onnx.ai/onnx/operators/onnx__GRU.html

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> file = convert.to_onnx(params, reverse=True).SerializeToString()
      >>> convert.from_onnx(file, reverse=True).reset_gate_mode
      'recurrent-bias-after-multiplication'
    """
    if not isinstance(node, str | None):
        node = index("node must be a name or a number", node)
    with reading(model):
        gru = _read(Model(model).choose(node), reset_gate_mode, fold_biases)
    directions = DIRECTIONS[gru.direction]
    if reverse not in directions:
        raise ValueError(
            f"reverse must be {directions[0]}, because {gru.name!r} is a node of direction "
            f"{gru.direction!r}, got {reverse}."
        )
    return gru.params[directions.index(reverse)]


def read_onnx(model: Any, *, fold_biases: bool = False) -> tuple[OnnxGRU, ...]:
    """Reads every `GRU` node of an ONNX model, with all that the nodes say.

    Args:
      model: an `onnx.ModelProto`, its bytes, or a path.
      fold_biases: as in `from_onnx`.

    Returns:
      One record for each node of the main graph, in the graph's order.

    Raises:
      ValueError: as in `from_onnx`, for any of the nodes.
      TypeError: `model` is of a wrong type.
      ModuleNotFoundError: the package onnx is missing.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> (gru,) = convert.read_onnx(convert.to_onnx(params, layout=1, lengths=True))
      >>> gru.name, gru.layout, gru.input_size, gru.sequence_lens
      ('gru', 1, 12, 'sequence_lens')
    """
    with reading(model):
        return tuple(_read(node, None, fold_biases) for node in Model(model).nodes())


def _read(node: Node, asked: str | None, fold_biases: bool) -> OnnxGRU:
    """One node, every part of it checked."""
    direction = node.choice("direction", "forward", DIRECTIONS)
    layout = node.choice("layout", 0, (0, 1))
    after = node.choice("linear_before_reset", 0, (0, 1)) == 1
    mode = reset_mode(str(node), asked, (RECURRENT_BIAS, AFTER) if after else (BEFORE,))
    W, R, B = _weights(node, len(DIRECTIONS[direction]))
    parts = zip(W, R, B, _activations(node, len(W)), strict=True)
    return OnnxGRU(
        name=node.name,
        direction=direction,
        layout=layout,
        hidden_size=R.shape[2],
        input_size=W.shape[2],
        params=tuple(_params(node, mode, fold_biases, *part) for part in parts),
        initial_h=_initial_state(node, layout, R),
        sequence_lens=node.constant_or_name("sequence_lens", 1, (np.int32,)),
        x=node.inputs["X"],
        y=node.outputs.get("Y", ""),
        y_h=node.outputs.get("Y_h", ""),
    )


def _weights(node: Node, D: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W (D, 3H, I), R (D, 3H, H) and B (D, 6H), which agree with each other."""
    W, R = node.constant("W", 3), node.constant("R", 3)
    H, stated = R.shape[2], node.attributes.get("hidden_size", R.shape[2])
    if stated != H:
        raise ValueError(f"R of {node} must have hidden_size = {stated} columns, got {H}.")
    B = node.constant("B", 2) if "B" in node.inputs else np.zeros((D, 6 * H), R.dtype)
    wanted = {"R": (R, (D, 3 * H, H)), "W": (W, (D, 3 * H, W.shape[2])), "B": (B, (D, 6 * H))}
    for name, (a, shape) in wanted.items():
        check_shape(f"{name} of {node}", a, shape)
        _check_type(f"{name} of {node}", a, R)
    return W, R, B


def _check_type(what: str, a: np.ndarray, R: np.ndarray) -> None:
    if a.dtype != R.dtype:
        raise ValueError(f"{what} must be of R's type {R.dtype}, got {a.dtype}.")


def _activations(node: Node, D: int) -> list[dict[str, str]]:
    """The activation options of each direction; ONNX lists gate and state in turn."""
    names = node.strings("activations", ["Sigmoid", "Tanh"] * D)
    gates = [GATES.get(name.lower(), "") for name in names[::2]]
    states = [STATES.get(name.lower(), "") for name in names[1::2]]
    if len(names) != 2 * D or not all(gates + states):
        raise ValueError(
            f"activations of {node} must be Sigmoid or HardSigmoid, then Tanh or Softsign, for "
            f"each of {D} directions, got {names}."
        )
    hard = gates.count("hard-sigmoid")
    for name, value in (("activation_alpha", ALPHA), ("activation_beta", BETA)):
        found = list(node.attributes.get(name, ()))
        if hard and found and found != [np.float32(value)] * hard:
            raise ValueError(
                f"{name} of {node} must be {value} for each HardSigmoid, got {found}: another "
                "function, which no GRUParams stands for by name."
            )
    return [
        {"gate_activation_function": gate, "state_activation_function": state}
        for gate, state in zip(gates, states, strict=True)
    ]


def _params(
    node: Node, mode: str, fold_biases: bool,
    W: np.ndarray, R: np.ndarray, B: np.ndarray, activations: dict[str, str],
) -> GRUParams:  # fmt: skip
    """The parameters of one direction."""
    b, b_R = (swap(half) for half in np.split(B, 2))
    if mode == BEFORE and np.any(b_R):
        if not fold_biases:
            raise ValueError(
                f"{node} has linear_before_reset = 0 and two biases, of which only the sum counts, "
                f"and {mode!r} has one. Pass fold_biases=True to add them: the same function, but "
                "for one rounding."
            )
        b, b_R = add(b, b_R), None
    return build(swap(W), swap(R), b, b_R, mode, **activations)


def _initial_state(node: Node, layout: int, R: np.ndarray) -> np.ndarray | str | None:
    """A constant (D, batch, H), or (batch, D, H), a name, or None."""
    found = node.constant_or_name("initial_h", 3, FLOATS)
    if isinstance(found, np.ndarray):
        what, (D, _, H), batch = f"initial_h of {node}", R.shape, found.shape[1 - layout]
        check_shape(what, found, (batch, D, H) if layout else (D, batch, H))
        _check_type(what, found, R)
    return found
