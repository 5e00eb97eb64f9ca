"""ONNX models from nodes, constants and the shapes of what goes in and out."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gru_jax._params import GRUParams
from gru_jax.convert._arrays import BFLOAT16
from gru_jax.convert._onnx_tensors import ELEMENT_TYPES, load_onnx, to_tensor

if TYPE_CHECKING:
    import onnx

VERSIONS = {True: (22, 10), False: (17, 8)}  # of operators and format: with bfloat16 and without


@dataclasses.dataclass
class Graph:
    """Nodes and constants in the order in which they are added; `name` begins their names."""

    name: str
    nodes: "list[onnx.NodeProto]" = dataclasses.field(default_factory=list)
    constants: "list[onnx.TensorProto]" = dataclasses.field(default_factory=list)

    def add(self, operator: str, *inputs: str, to: str, **attributes: Any) -> str:
        """Adds a node with one output, and returns the output's name."""
        node = load_onnx().helper.make_node(operator, inputs, [to], name=to, **attributes)
        self.nodes.append(node)
        return to

    def integers(self, name: str, values: Any, dtype: Any = np.int64) -> str:
        """Adds a constant, and returns its name."""
        self.constants.append(to_tensor(f"{self.name}.{name}", np.array(values, dtype)))
        return self.constants[-1].name


def model_of(
    graph: Graph,
    inputs: dict[str, tuple],
    outputs: dict[str, tuple],
    directions: Sequence[GRUParams],
) -> "onnx.ModelProto":
    """Returns a model with ports of these shapes; all are of the weights' type, vectors int32."""
    helper = load_onnx().helper
    dtype = np.dtype(directions[0].bias.dtype)

    def port(name: str, shape: tuple) -> "onnx.ValueInfoProto":
        kind = np.dtype(np.int32) if len(shape) == 1 else dtype
        return helper.make_tensor_value_info(name, ELEMENT_TYPES[kind], shape)

    ports = ([port(*pair) for pair in shapes.items()] for shapes in (inputs, outputs))
    operators, file_format = VERSIONS[dtype == BFLOAT16]
    modes = " and ".join(dict.fromkeys(params.reset_gate_mode for params in directions))
    return helper.make_model(
        helper.make_graph(graph.nodes, graph.name, *ports, graph.constants),
        opset_imports=[helper.make_opsetid("", operators)],
        ir_version=file_format,
        producer_name="gru_jax",
        doc_string=f"A gated recurrent unit, reset_gate_mode {modes}.",
    )
