"""An ONNX graph while it is built: tensors by name, constants once, symbolic sizes as tensors."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gru_jax.convert._onnx_tensors import load_onnx

ARITHMETIC: Mapping[type[ast.AST], str] = {
    ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Pow: "Pow",
}  # fmt: skip
FUNCTIONS = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}  # sizes: no negative ones


class Value(NamedTuple):
    """A tensor of the graph that stands for an array of JAX.

    Its axes may be 1 where the array's are larger, or all missing: ONNX broadcasts by itself.
    """

    name: str
    shape: tuple[Any, ...]


Operand = Value | np.ndarray  # arrays are known while the graph is built


class Graph:
    """Nodes and initialisers; the same node on the same inputs is made only once."""

    def __init__(self, sizes: Mapping[str, tuple[str, int]]) -> None:
        self.sizes = sizes  # symbolic size → input and axis that have it
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.made: dict[Any, str] = {}
        self.turned: dict[str, tuple[str, tuple[int, ...]]] = {}

    def fresh(self, kind: str) -> str:
        """Returns a name that no input has, and no tensor so far."""
        return f"{kind}.{len(self.nodes) + len(self.tensors)}"

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of one output and returns the output's name."""
        key = (op, inputs, repr(attributes))
        if key not in self.made:
            name = self.made[key] = self.fresh(op.lower())
            make = load_onnx().helper.make_node
            self.nodes.append(make(op, inputs, [name], name=name, **attributes))
        return self.made[key]

    def add(self, node: Any, tensors: Sequence[Any]) -> None:
        """Adds a node made elsewhere; weights that are there already are taken from there."""
        first = {}
        for tensor in tensors:
            key = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
            first[tensor.name] = self.made.setdefault(key, tensor.name)
            if first[tensor.name] == tensor.name:
                self.tensors[tensor.name] = tensor
        node.input[:] = [first.get(name, name) for name in node.input]
        self.nodes.append(node)

    def constant(self, a: Any) -> str:
        """Returns the name of an initialiser."""
        a = np.asarray(a)
        key = (a.dtype, a.shape, a.tobytes())
        if key not in self.made:
            name = self.made[key] = self.fresh("constant")
            self.tensors[name] = load_onnx().numpy_helper.from_array(a, name)
        return self.made[key]

    def integers(self, *values: int) -> str:
        """Returns the name of a vector of int64, as axes and sizes are given."""
        return self.constant(np.array(values, np.int64))

    def transpose(self, name: str, axes: Sequence[int]) -> str:
        """Turns the axes of a tensor; two turns in a row become one, or none."""
        name, first = self.turned.get(name, (name, tuple(range(len(axes)))))
        axes = tuple(first[axis] for axis in axes)
        if axes == tuple(range(len(axes))):
            return name
        turned = self.node("Transpose", name, perm=axes)
        self.turned[turned] = (name, axes)
        return turned

    def vector(self, sizes: Sequence[Any]) -> str:
        """Returns the name of a vector of sizes, some of them symbolic."""
        if all(isinstance(size, int) for size in sizes):
            return self.integers(*sizes)
        parts = [self._size(size) for size in sizes]
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=0)

    def _size(self, size: Any) -> str:
        """A size as a vector of one number; JAX writes symbolic ones as sums of products."""
        if isinstance(size, int):
            return self.integers(size)
        return self._expression(ast.parse(str(size).replace("^", "**"), mode="eval").body)

    def _expression(self, tree: ast.expr) -> str:
        """The size that an expression of Python stands for."""
        match tree:
            case ast.Constant(value=int(value)):
                return self.integers(value)
            case ast.Name(id=name):
                source, axis = self.sizes[name]
                return self.node("Shape", source, start=axis, end=axis + 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                return self.node(
                    ARITHMETIC[type(op)], self._expression(left), self._expression(right)
                )
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.node("Neg", self._expression(operand))
            case ast.Call(func=ast.Name(id=name), args=args) if name in FUNCTIONS:
                return self.node(FUNCTIONS[name], *map(self._expression, args))
        raise ValueError(f"the size {ast.unparse(tree)} of an array cannot be written in ONNX.")

    def name(self, operand: Operand) -> str:
        """Returns the name of a value or constant as it is, for nodes that broadcast."""
        return operand.name if isinstance(operand, Value) else self.constant(operand)

    def full(self, operand: Operand, shape: tuple[Any, ...]) -> str:
        """Returns the name of a value or constant with all its axes as large as the array's."""
        if tuple(operand.shape) == tuple(shape):
            return self.name(operand)
        kept = operand.shape or (1,) * len(shape)
        sizes = [1 if old == new else new for old, new in zip(kept, shape, strict=True)]
        return self.node("Expand", self.name(operand), self.vector(sizes))

    def cast(self, name: str, dtype: Any) -> str:
        """Returns the name of a tensor as another type; of a constant, a constant."""
        if name in self.tensors:
            a = load_onnx().numpy_helper.to_array(self.tensors[name])
            return self.constant(a.astype(dtype))
        return self.node("Cast", name, to=element_type(dtype))

    def reduce(self, op: str, name: str, axes: Sequence[int]) -> str:
        """Returns the name of a tensor without some axes; only ReduceSum takes them as an input."""
        if op == "ReduceSum":
            return self.node(op, name, self.integers(*axes), keepdims=0)
        return self.node(op, name, axes=list(axes), keepdims=0)

    def finish(self, outputs: Mapping[str, str], inputs: Sequence[str]) -> None:
        """Gives outputs their names, and drops what none of them needs."""
        self._rename(outputs, inputs)
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if not needed & set(node.output):
                continue
            for n, name in enumerate(node.output):
                node.output[n] = name if name in needed else ""
            while not node.output[-1]:
                node.output.pop()
            needed |= set(node.input)
            kept.append(node)
        self.nodes = kept[::-1]
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in needed}

    def _rename(self, outputs: Mapping[str, str], inputs: Sequence[str]) -> None:
        """Calls results by the names of outputs; copies what must keep its own name."""
        renamed: dict[str, str] = {}
        for name, source in outputs.items():
            if source in renamed or source in self.tensors or source in inputs:
                self.nodes.append(load_onnx().helper.make_node("Identity", [source], [name]))
            else:
                renamed[source] = name
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]


def element_type(dtype: Any) -> int:
    """Returns the number of a type in ONNX."""
    try:
        return load_onnx().helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"arrays of {dtype} cannot be in an ONNX model.") from None
