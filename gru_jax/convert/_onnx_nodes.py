"""What an ONNX file says of its `GRU` nodes, checked piece by piece; nothing in it is executed."""

import contextlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gru_jax.convert import _files
from gru_jax.convert._arrays import FLOATS
from gru_jax.convert._onnx_tensors import from_tensor, load_onnx

if TYPE_CHECKING:
    import onnx

INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h")
OUTPUTS = ("Y", "Y_h")
ATTRIBUTES = {  # number of onnx.AttributeProto.AttributeType, field
    "activation_alpha": (6, "floats"),
    "activation_beta": (6, "floats"),
    "activations": (8, "strings"),
    "direction": (3, "s"),
    "hidden_size": (2, "i"),
    "layout": (2, "i"),
    "linear_before_reset": (2, "i"),
}
_TENSOR = 4  # another AttributeType
_STANDARD = ("", "ai.onnx")  # names of the domain of ONNX's own operators


def reading(model: Any) -> contextlib.AbstractContextManager[None]:
    """Returns a context that names the file in every refusal, if the model is in one."""
    is_path = isinstance(model, str | os.PathLike)
    return _files.reading(str(model)) if is_path else contextlib.nullcontext()


class Model:
    """The constants of a model's main graph, and its `GRU` nodes."""

    def __init__(self, model: Any) -> None:
        proto, self.folder = _load(model)
        graph = proto.graph
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.grus = [n for n in graph.node if n.op_type == "GRU" and n.domain in _STANDARD]
        if not self.grus:
            found = ", ".join(sorted({str(node.op_type) for node in graph.node})[:12]) or "none"
            raise ValueError(
                f"model must have a GRU node in its main graph, got no such node; others: {found}."
            )

    def nodes(self) -> "list[Node]":
        """Returns the GRU nodes in the graph's order."""
        return [Node(self, proto) for proto in self.grus]

    def choose(self, node: str | int | None) -> "Node":
        """Returns the GRU node of this name or number; the only one if None."""
        if node is None:
            found = self.grus
        elif isinstance(node, str):
            found = [proto for proto in self.grus if proto.name == node]
        else:
            found = self.grus[node : node + 1] if node >= 0 else []
        if len(found) != 1:
            listed = ", ".join(f"{n} {proto.name!r}" for n, proto in enumerate(self.grus[:12]))
            raise ValueError(f"node must be one of the model's GRU nodes {listed}, got {node!r}.")
        return Node(self, found[0])

    def find(self, name: str) -> "onnx.TensorProto | None":
        """Returns the constant of this name, or None if it is no constant."""
        seen = set()
        while name not in self.tensors:
            maker = self.makers.get(name)
            if maker is None or name in seen or maker.domain not in _STANDARD:
                return None
            seen.add(name)
            if maker.op_type == "Constant":
                return _constant(maker)
            if maker.op_type != "Identity" or len(maker.input) != 1:
                return None
            name = maker.input[0]
        return self.tensors[name]

    def array(self, what: str, name: str, ndim: int, kinds: Iterable[type]) -> np.ndarray:
        """Returns the constant of this name as an array of `ndim` axes."""
        tensor = self.find(name)
        if tensor is None:
            maker = self.makers.get(name)
            origin = "an input of the graph" if maker is None else f"computed by {maker.op_type}"
            raise ValueError(
                f"{what} must be a constant in the model, but {name!r} is {origin}. Export the "
                "weights as initialisers, and with constant folding."
            )
        found = from_tensor(what, tensor, self.folder, kinds)
        if found.ndim != ndim:
            raise ValueError(f"{what} must have {ndim} axes, got shape {found.shape}.")
        return found


class Node:
    """One `GRU` node; `str(node)` is what messages call it."""

    def __init__(self, model: Model, proto: "onnx.NodeProto") -> None:
        self.model, self.name = model, proto.name
        texts = [proto.name, *proto.input, *proto.output]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{self} must have names in UTF-8, got {texts}."
            )  # else they are bytes
        self.inputs = {n: name for n, name in zip(INPUTS, proto.input, strict=False) if name}
        self.outputs = dict(zip(OUTPUTS, proto.output, strict=False))
        many = len(proto.input) > len(INPUTS) or len(proto.output) > len(OUTPUTS)
        if many or not {"X", "W", "R"} <= self.inputs.keys():
            raise ValueError(
                f"{self} must have the inputs X, W and R, and of B, sequence_lens, initial_h and "
                f"the outputs Y, Y_h those it needs, got {list(proto.input)} and "
                f"{list(proto.output)}."
            )
        self.attributes = {a.name: self._value(a) for a in proto.attribute}
        if len(self.attributes) < len(proto.attribute):
            raise ValueError(f"{self} must have each attribute once, got one twice.")

    def __str__(self) -> str:
        return f"GRU node {self.name!r}"

    def _value(self, a: "onnx.AttributeProto") -> Any:
        if a.name == "clip":
            raise ValueError(
                f"{self} must not have the attribute clip, which bounds what enters the "
                f"activation functions, got {a.f}: no GRUParams stands for that."
            )
        if a.name not in ATTRIBUTES:
            listed = ", ".join(ATTRIBUTES)
            raise ValueError(f"{self} must have attributes among {listed}, got {a.name!r}.")
        number, field = ATTRIBUTES[a.name]
        if a.type != number or a.ref_attr_name:
            raise ValueError(f"{self} must have a value of type {number} for {a.name}, got {a}.")
        return getattr(a, field)

    def choice(self, name: str, default: Any, values: Collection[Any]) -> Any:
        """Returns an attribute that must be one of several values."""
        value = self.attributes.get(name, default)
        value = _text(value) if isinstance(value, bytes) else value
        if value not in values:
            listed = " or ".join(map(repr, values))
            raise ValueError(f"{name} of {self} must be {listed}, got {value!r}.")
        return value

    def strings(self, name: str, default: list[str]) -> list[str]:
        """Returns an attribute that is a list of strings."""
        found = self.attributes.get(name)
        return default if found is None else [_text(value) for value in found]

    def constant(self, name: str, ndim: int) -> np.ndarray:
        """Returns an input, which must be a constant, as an array."""
        return self.model.array(f"{name} of {self}", self.inputs[name], ndim, FLOATS)

    def constant_or_name(
        self, name: str, ndim: int, kinds: Iterable[type]
    ) -> np.ndarray | str | None:
        """Returns an input as an array, its name if it is no constant, None if it is absent."""
        given = self.inputs.get(name)
        if given is None or self.model.find(given) is None:
            return given
        return self.model.array(f"{name} of {self}", given, ndim, kinds)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _constant(node: "onnx.NodeProto") -> "onnx.TensorProto | None":
    """The tensor of a Constant node; None if it is stated in another way."""
    values = [a.t for a in node.attribute if a.name == "value" and a.type == _TENSOR]
    return values[0] if len(values) == len(node.attribute) == 1 else None


def _load(model: Any) -> "tuple[onnx.ModelProto, Path | None]":
    """The model, and the folder of a path, where it may keep its data in other files."""
    onnx = load_onnx()
    if isinstance(model, onnx.ModelProto):
        return model, None
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        return _parse(path.read_bytes()), path.parent
    if isinstance(model, bytes | bytearray | memoryview):
        return _parse(bytes(model)), None
    raise TypeError(
        f"model must be an onnx.ModelProto, its bytes or a path, got {type(model).__name__}."
    )


def _parse(data: bytes) -> "onnx.ModelProto":
    proto = load_onnx().ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's own DecodeError
        raise ValueError(
            f"model must be a whole ONNX file, and these {len(data)} bytes are none: {error}."
        ) from error
    return proto
