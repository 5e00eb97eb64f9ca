"""The primitives of JAX that change shapes or sum over axes, as ONNX nodes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gru_jax.export import _onnx_indexing
from gru_jax.export._graph import Graph, Operand, Value
from gru_jax.export._onnx_elementwise import ELEMENTWISE, elementwise

NOTHING = ("copy", "copy_p", "sharding_constraint", "stop_gradient")  # change no number


# Functions of the graph, the equation and the operands; they return the name of the result.


def _broadcast(g: Graph, eqn: Any, x: Operand) -> Value:
    """New axes only: ONNX broadcasts by itself, and `Graph.full` where it does not."""
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = [axis for axis in range(len(shape)) if axis not in axes]
    if not x.shape or not new:
        return Value(g.name(x), tuple(x.shape))
    sizes = iter(x.shape)
    small = tuple(1 if axis in new else next(sizes) for axis in range(len(shape)))
    return Value(g.node("Unsqueeze", g.name(x), g.integers(*new)), small)


def _reshape(g: Graph, eqn: Any, x: Operand) -> str:
    """Open sizes are 0, as it was, or −1, what is left; two that are neither are computed."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    name = g.full(x, old)
    if old == new:
        return name
    if math.prod(old) != math.prod(new):  # JAX defers this check to the sizes of a call
        raise ValueError(
            f"it makes {new} of {old}, for one size of batch and time only: call the axes that are "
            "to stay fixed otherwise than B and T, such as axes={'x': 'BFC'}."
        )
    codes = [
        size if isinstance(size, int) else 0 if old[n : n + 1] == (size,) else -1
        for n, size in enumerate(new)
    ]
    return g.node("Reshape", name, g.vector(new) if codes.count(-1) > 1 else g.integers(*codes))


def _reduce(op: str) -> Callable:
    def emit(g: Graph, eqn: Any, x: Operand) -> str:
        name, axes = g.full(x, eqn.invars[0].aval.shape), eqn.params["axes"]
        if eqn.invars[0].aval.dtype == bool:
            return g.cast(g.reduce(op, g.cast(name, np.int32), axes), bool)
        return g.reduce(op, name, axes)

    return emit


def _arg(op: str) -> Callable:
    def emit(g: Graph, eqn: Any, x: Operand) -> str:
        (axis,) = eqn.params["axes"]
        name = g.node(op, g.full(x, eqn.invars[0].aval.shape), axis=axis, keepdims=0)
        return g.cast(name, eqn.params["index_dtype"])

    return emit


def _dot(g: Graph, eqn: Any, *operands: Operand) -> str:
    """Any product of two arrays; one with a matrix by MatMul."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    avals = [v.aval for v in eqn.invars]
    names = [g.full(x, aval.shape) for x, aval in zip(operands, avals, strict=True)]
    dtype = eqn.outvars[0].aval.dtype
    names = [
        name if aval.dtype == dtype else g.cast(name, dtype)
        for name, aval in zip(names, avals, strict=True)
    ]
    m, n = (len(aval.shape) for aval in avals)
    if not left_batch and tuple(left) == (m - 1,) and tuple(right) == (0,) and n == 2:
        return g.node("MatMul", *names)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first, second = [next(letters) for _ in range(m)], [next(letters) for _ in range(n)]
    for a, b in zip((*left_batch, *left), (*right_batch, *right), strict=True):
        second[b] = first[a]
    batch = [first[axis] for axis in left_batch]
    free = [letter for letter in first if letter not in second]
    free += [letter for letter in second if letter not in first]
    equation = f"{''.join(first)},{''.join(second)}->{''.join(batch + free)}"
    return g.node("Einsum", *names, equation=equation)


def _concatenate(g: Graph, eqn: Any, *operands: Operand) -> str:
    pairs = zip(operands, eqn.invars, strict=True)
    names = [g.full(x, v.aval.shape) for x, v in pairs]
    return g.node("Concat", *names, axis=eqn.params["dimension"])


def _tile(g: Graph, eqn: Any, x: Operand) -> str:
    return g.node("Tile", g.full(x, eqn.invars[0].aval.shape), g.vector(eqn.params["reps"]))


def _stack(g: Graph, eqn: Any, *operands: Operand) -> str:
    axis, shape = eqn.params["axis"], eqn.invars[0].aval.shape
    parts = [g.node("Unsqueeze", g.full(x, shape), g.integers(axis)) for x in operands]
    return g.node("Concat", *parts, axis=axis)


def _transpose(g: Graph, eqn: Any, x: Operand) -> str:
    return g.transpose(g.full(x, eqn.invars[0].aval.shape), eqn.params["permutation"])


def _squeeze(g: Graph, eqn: Any, x: Operand) -> str:
    name, axes = g.full(x, eqn.invars[0].aval.shape), eqn.params["dimensions"]
    return g.node("Squeeze", name, g.integers(*axes)) if axes else name


def _cumsum(g: Graph, eqn: Any, x: Operand) -> str:
    axis = g.constant(np.int64(eqn.params["axis"]))
    name, backwards = g.full(x, eqn.invars[0].aval.shape), int(eqn.params["reverse"])
    return g.node("CumSum", name, axis, reverse=backwards)


def _pad(g: Graph, eqn: Any, x: Operand, value: Operand) -> str:
    low, high, between = zip(*eqn.params["padding_config"], strict=True)
    if any(between) or any(isinstance(n, int) and n < 0 for n in low + high):
        raise ValueError("it is exported for padding at the ends only.")
    name = g.full(x, eqn.invars[0].aval.shape)
    return g.node("Pad", name, g.vector(low + high), g.name(value))


def _iota(g: Graph, eqn: Any) -> Value:
    """0, 1, 2, … along one axis, as long as a symbolic size says."""
    shape, axis = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    end = g.node("Squeeze", g.vector([shape[axis]]))
    numbers = g.node("Range", g.constant(np.int64(0)), end, g.constant(np.int64(1)))
    numbers = g.cast(numbers, eqn.params["dtype"])
    others = [n for n in range(len(shape)) if n != axis]
    numbers = g.node("Unsqueeze", numbers, g.integers(*others)) if others else numbers
    return Value(numbers, tuple(size if n == axis else 1 for n, size in enumerate(shape)))


def _size(g: Graph, eqn: Any) -> str:
    """An open size as a number."""
    size = g.node("Squeeze", g.vector([eqn.params["dim"]]))
    return g.cast(size, eqn.outvars[0].aval.dtype)


STRUCTURAL: dict[str, Callable[..., Value | str | list[str]]] = {
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "cumsum": _cumsum,
    "dim_as_value": _size,
    "dot_general": _dot,
    "iota": _iota,
    "pad": _pad,
    "reduce_and": _reduce("ReduceMin"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": _reshape,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    **_onnx_indexing.TABLE,
}


def emit(g: Graph, eqn: Any, operands: Sequence[Operand]) -> list[Operand]:
    """Adds the nodes of an equation, and returns its values; ValueError where it has none."""
    kind = eqn.primitive.name
    if kind in NOTHING:
        return list(operands)
    if kind in ELEMENTWISE:
        return [elementwise(g, eqn, operands)]
    if kind not in STRUCTURAL:
        raise ValueError("no ONNX operator is known for it.")
    made = STRUCTURAL[kind](g, eqn, *operands)
    made = made if isinstance(made, list) else [made]
    shapes = [v.aval.shape for v in eqn.outvars]
    pairs = zip(made, shapes, strict=True)
    return [value if isinstance(value, Value) else Value(value, shape) for value, shape in pairs]
