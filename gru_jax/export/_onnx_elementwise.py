"""The elementwise primitives of JAX as ONNX nodes.

Each entry of the table gets the graph, the equation and the names of its operands, and returns the
name of its result. Operands may still have to be broadcast: ONNX does that in every node here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.lax import RoundingMethod

from gru_jax.export._graph import Graph, Operand, Value


def _same(*ops: str) -> Callable:
    """Elementwise: the operands through one node, its result through the next."""

    def emit(g: Graph, eqn: Any, *names: str) -> str:
        for op in ops:
            names = (g.node(op, *names),)
        return names[0]

    return emit


def _like(g: Graph, eqn: Any, number: float) -> str:
    """A number in the type of the first operand."""
    return g.constant(np.asarray(number, eqn.invars[0].aval.dtype))


def _logical(op: str) -> Callable:
    """Elementwise on booleans; on integers ONNX has it from a later opset on."""

    def emit(g: Graph, eqn: Any, *names: str) -> str:
        if eqn.invars[0].aval.dtype != bool:
            raise ValueError("it is exported for booleans only.")
        return g.node(op, *names)

    return emit


def _convert(g: Graph, eqn: Any, x: str) -> str:
    """Another type, or the same, where only the weakness of the type changes."""
    dtype = eqn.params["new_dtype"]
    return x if dtype == eqn.invars[0].aval.dtype else g.cast(x, dtype)


def _select(g: Graph, eqn: Any, which: str, *cases: str) -> str:
    if len(cases) != 2 or eqn.invars[0].aval.dtype != bool:
        raise ValueError("it is exported for booleans and two cases only.")
    return g.node("Where", which, cases[1], cases[0])


def _power(g: Graph, eqn: Any, x: str) -> str:
    """A whole power."""
    y = eqn.params["y"]
    return g.node("Mul", x, x) if y == 2 else g.node("Pow", x, _like(g, eqn, y))


def _is_finite(g: Graph, eqn: Any, x: str) -> str:
    """Infinities and NaN are what minus itself is not 0."""
    return g.node("Equal", g.node("Sub", x, x), _like(g, eqn, 0))


def _round(g: Graph, eqn: Any, x: str) -> str:
    if eqn.params["rounding_method"] != RoundingMethod.TO_NEAREST_EVEN:
        raise ValueError("it is exported for rounding to the nearest even number only.")
    return g.node("Round", x)


ELEMENTWISE: dict[str, Callable[..., str]] = {
    "abs": _same("Abs"),
    "add": _same("Add"),
    "add_any": _same("Add"),
    "and": _logical("And"),
    "ceil": _same("Ceil"),
    "clamp": lambda g, _, low, x, high: g.node("Min", g.node("Max", x, low), high),
    "convert_element_type": _convert,
    "cos": _same("Cos"),
    "div": _same("Div"),
    "eq": _same("Equal"),
    "erf": _same("Erf"),
    "erfc": lambda g, eqn, x: g.node("Sub", _like(g, eqn, 1), g.node("Erf", x)),
    "exp": _same("Exp"),
    "expm1": lambda g, eqn, x: g.node("Sub", g.node("Exp", x), _like(g, eqn, 1)),
    "floor": _same("Floor"),
    "ge": _same("GreaterOrEqual"),
    "gt": _same("Greater"),
    "integer_pow": _power,
    "is_finite": _is_finite,
    "le": _same("LessOrEqual"),
    "log": _same("Log"),
    "log1p": lambda g, eqn, x: g.node("Log", g.node("Add", x, _like(g, eqn, 1))),
    "logistic": _same("Sigmoid"),
    "lt": _same("Less"),
    "max": _same("Max"),
    "min": _same("Min"),
    "mul": _same("Mul"),
    "ne": _same("Equal", "Not"),
    "neg": _same("Neg"),
    "not": _logical("Not"),
    "or": _logical("Or"),
    "pow": _same("Pow"),
    "rem": lambda g, _, x, y: g.node("Mod", x, y, fmod=1),
    "round": _round,
    "rsqrt": _same("Sqrt", "Reciprocal"),
    "select_n": _select,
    "sign": _same("Sign"),
    "sin": _same("Sin"),
    "sqrt": _same("Sqrt"),
    "square": lambda g, _, x: g.node("Mul", x, x),
    "sub": _same("Sub"),
    "tan": _same("Tan"),
    "tanh": _same("Tanh"),
    "xor": _logical("Xor"),
}


def elementwise(g: Graph, eqn: Any, operands: Sequence[Operand]) -> Value:
    """Emits an elementwise equation; axes that are 1 in every operand stay so in the result."""
    name = ELEMENTWISE[eqn.primitive.name](g, eqn, *map(g.name, operands))
    shapes = [tuple(operand.shape) for operand in operands if len(operand.shape)]
    columns = zip(eqn.outvars[0].aval.shape, *shapes, strict=True) if shapes else ()
    return Value(name, tuple(size if size in sizes else 1 for size, *sizes in columns))
