"""Whole models in ONNX: every GRU layer one native node, all else from the equations of JAX."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.extend import core

from gru_jax.convert._onnx import gru_node
from gru_jax.convert._onnx_graph import VERSIONS
from gru_jax.convert._onnx_tensors import load_onnx
from gru_jax.export._graph import Graph, Operand, Value, element_type
from gru_jax.export._onnx_ops import emit
from gru_jax.export._trace import GRU, trace

if TYPE_CHECKING:
    import onnx

OPERATORS, FILE_FORMAT = VERSIONS[False]
INLINED = (
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit",
    "remat2",
)  # fmt: skip
LOOPS = ("cond", "scan", "while")


def model_to_onnx(
    model: Any,
    params: Any,
    example: Any,
    *,
    axes: Mapping[str, str] | None = None,
    name: str = "model",
) -> "onnx.ModelProto":
    """Exports a whole Flax model to ONNX, with one native `GRU` node for each GRU layer.

    The model is traced by JAX with open sizes of batch and time, and its equations become ONNX
    operators: dense layers, embeddings, normalisation, activations, softmax, sums, indexing and the
    like. A layer's node is named by its path, and so are its weights; a `BidirectionalGRULayer` is
    two nodes. Projected layers are exported through the equal dense ones. The graph computes what
    the model computes when it is called like this, so dropout must be off and normalisation must
    use its stored statistics: `model.eval()` in nnx.

    Types are those of the example and the parameters; a layer in bfloat16 or float16 is a node in
    float32, as its state is in JAX. ONNX Runtime's CPU kernels run GRUs in float32 only; lengths
    beyond the time axis are an error there, and NaN outside the padding may not spread.

    Args:
      model: a linen or nnx module.
      params: in linen the variables, or only their collection "params"; None in nnx.
      example: what the model is called with: one array or `jax.ShapeDtypeStruct`, a tuple of
        arguments, or a dict of keyword arguments. An argument may be a tree of arrays; what is no
        array (a flag) is passed on as it is.
      axes: for inputs by name, one letter for each axis: B and T stand for batch and time, which
        stay open, and any other letter for a size fixed as in the example. By default x has the
        letters of the model's `data_format`, or (batch, time, channels), (time, channels), or for
        integers (batch, time); of a tree the leaf with the most axes has them. Other inputs are
        read as states or lengths that fit it. Batches or times that differ in the example are
        open each by itself, as "time" and "time2"; but where x has more than 1, an input that is
        not named here keeps a 1, to be broadcast.
      name: the graph's.

    Returns:
      A model of opset 17, checked by `onnx.checker`. Its inputs bear the names of the arguments,
      but "x" is the first and "h0" is `hidden`, where no other argument is called so; the outputs
      are "y" and "hidden", or the keys of a dict, with "_out" behind the name of an input. Where
      one of them is a tree, its leaves have their paths behind the name, such as "h0_0" and
      "h0_1". Dots become "_", and of equal names the later, or the one with a longer path, has a
      number behind it, such as "a_b_2". For a stream feed each "hidden" to its "h0".

    Raises:
      ValueError: a part of the model has no equal in ONNX: a loop or branch (`nn.RNN`, `nn.scan`),
        a `GRUCell`, a stateful layer, `mask` or `resets`, an activation function of your own, an
        unknown primitive; or a size must be known that is left open.
      TypeError: `model` or `params` is of a wrong type.
      ModuleNotFoundError: the package onnx is missing.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from gru_jax import export
      >>> from gru_jax.linen import GRULayer
      >>> model = nn.Sequential([GRULayer(100), GRULayer(50, output_mode="last"), nn.Dense(9)])
      >>> x = jnp.ones((2, 7, 12))
      >>> made = export.model_to_onnx(model, model.init(jax.random.key(0), x), x)
      >>> [node.name for node in made.graph.node if node.op_type == "GRU"]
      ['layers_0', 'layers_1']
    """
    onnx = load_onnx()
    traced = trace(model, params, example, axes or {})
    sizes: dict[str, tuple[str, int]] = {}
    for source, spec in traced.inputs.items():
        for axis, size in enumerate(spec.shape):
            sizes.setdefault(str(size), (source, axis))
    graph = Graph(sizes)
    inputs = [Value(source, spec.shape) for source, spec in traced.inputs.items()]
    values = _run(graph, traced.jaxpr, inputs)
    pairs = zip(traced.outputs.items(), values, strict=True)
    outputs = {output: graph.full(value, spec.shape) for (output, spec), value in pairs}
    graph.finish(outputs, list(traced.inputs))
    ports = [[_port(*pair) for pair in specs.items()] for specs in (traced.inputs, traced.outputs)]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, name, *ports, list(graph.tensors.values())),
        opset_imports=[onnx.helper.make_opsetid("", OPERATORS)],
        ir_version=FILE_FORMAT,
        producer_name="gru_jax",
    )
    onnx.checker.check_model(made, full_check=True)
    return made


def _port(name: str, spec: jax.ShapeDtypeStruct) -> "onnx.ValueInfoProto":
    """An input or output of the model, open sizes by name."""
    shape = [size if isinstance(size, int) else str(size) for size in spec.shape]
    return load_onnx().helper.make_tensor_value_info(name, element_type(spec.dtype), shape)


def _run(graph: Graph, closed: Any, operands: Sequence[Operand]) -> list[Operand]:
    """Adds the nodes of a jaxpr, and returns its results."""
    jaxpr = getattr(closed, "jaxpr", closed)
    constants = map(_constant, getattr(closed, "consts", ()))
    known: dict[Any, Operand] = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Operand:
        literal: Any = atom if isinstance(atom, core.Literal) else None
        return known[atom] if literal is None else np.asarray(literal.val, literal.aval.dtype)

    for eqn in jaxpr.eqns:
        results = _equation(graph, eqn, [read(atom) for atom in eqn.invars])
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(graph: Graph, eqn: Any, operands: list[Operand]) -> list[Operand]:
    """One equation: a GRU, a part to run through, a constant, or nodes of its own."""
    kind = eqn.primitive.name
    if eqn.primitive is GRU:
        return _gru(graph, eqn, operands)
    if kind in INLINED:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        return _run(graph, inner, operands)
    if _is_constant(eqn, operands):
        found = eqn.primitive.bind(*operands, **eqn.params)
        return [_constant(a) for a in (found if eqn.primitive.multiple_results else [found])]
    try:
        return emit(graph, eqn, operands)
    except ValueError as error:
        raise ValueError(
            f"the primitive {kind!r} of JAX{_place(eqn)} cannot be exported to ONNX: {error} "
            + _way_out(kind)
        ) from error


def _constant(value: Any) -> Any:
    """A number or array as one of NumPy; keys of random numbers stay as they are."""
    return value if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended) else np.asarray(value)


def _is_constant(eqn: Any, operands: list[Operand]) -> bool:
    """Whether all numbers are known already, and no size is open."""
    sizes = [size for v in eqn.outvars for size in v.aval.shape]
    fixed = all(isinstance(size, int) for size in (*sizes, eqn.params.get("dim", 0)))
    plain = eqn.primitive.name not in LOOPS
    return fixed and plain and all(isinstance(a, np.ndarray) for a in operands)


def _place(eqn: Any) -> str:
    """Where in the model an equation comes from, if it is known."""
    stack = str(getattr(eqn.source_info, "name_stack", ""))
    return f", at {stack!r}," if stack else ""


def _way_out(kind: str) -> str:
    """What to do about a primitive that cannot be exported."""
    if kind in LOOPS:
        return (
            "Loops and branches have no place in this graph: a GRU that runs in one, by nn.scan, "
            "nn.RNN or another framework's layer, is to be a GRULayer called by itself."
        )
    if kind.startswith(("random", "threefry")):
        return "Random numbers do not belong to inference: switch dropout and noise off."
    return "Export the part of the model without it, or the whole as StableHLO with jax.export."


def _gru(graph: Graph, eqn: Any, operands: list[Operand]) -> list[Operand]:
    """A GRU layer as one node."""
    tree, path = eqn.params["tree"], eqn.params["path"]
    given = jax.tree.unflatten(tree, operands)
    shapes = jax.tree.unflatten(tree, [v.aval.shape for v in eqn.invars])
    x, h0, lengths = (
        "" if given[n] is None else graph.full(given[n], shapes[n]) for n in (0, 2, 3)
    )
    if not all(isinstance(a, np.ndarray) for a in given[1].arrays().values()):
        raise ValueError(
            f"the learnables of the layer at {path!r} are computed from inputs of the model; an "
            "ONNX GRU node needs them as constants."
        )
    called = any(node.name == path for node in graph.nodes)
    name = graph.fresh(path) if called else path
    y, hidden = f"{name}.y", f"{name}.hidden"
    try:
        node, tensors = gru_node(
            [given[1]], reverse=eqn.params["reverse"], name=name, x=x, y=y, hidden=hidden, h0=h0,
            lengths=lengths,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"the layer at {path!r}: {error}") from error
    graph.add(node, tensors)
    pairs = zip((y, hidden), eqn.outvars, strict=True)
    return [Value(result, v.aval.shape) for result, v in pairs]
