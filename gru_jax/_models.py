"""Finds the GRU layers of a whole model, and which of its parameters each of them owns.

Layers are known as instances of `CellOptions`, parameters of the functional core as `GRUParams`;
no leaf is recognised by its name alone.
"""

import itertools
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import DenyList

from gru_jax._options import CellOptions
from gru_jax._params import LEAF_NAMES, LEAVES, GRUParams, Leaf

Path = tuple[str, ...]
LEAF = {leaf.name: leaf for leaf in LEAVES}
PER_GATE = tuple(leaf.name for leaf in LEAVES if leaf.per_gate)


class Layer(NamedTuple):
    """A GRU in a model. Stacks of layers share leaves, which then have further axes."""

    options: CellOptions
    row_axes: tuple[int, int]  # the axis of the gates' rows, in its vectors and in its matrices

    def row_axis(self, leaf: Leaf) -> int:
        """Returns the axis of a leaf on which the rows of its gates lie."""
        return self.row_axes[leaf.name != "bias"]


def inner_shape(options: CellOptions, leaf: Leaf) -> tuple[int, ...]:
    """Returns the shape of a leaf in one layer; of an unknown number of inputs, as for one."""
    size = 1 if options.input_size == "auto" else options.input_size
    return leaf.shape(options.sizes(size)) or ()


class Found(NamedTuple):
    """The parameters of a model, its layers by path, and the ranks of leaves that are known."""

    params: Any
    layers: dict[Path, Layer]
    ranks: dict[Path, int]  # without the axes of stacks


def path_of(keys: tuple[Any, ...]) -> Path:
    """Returns a path in a tree as strings, without the boxes of Flax variables on the way."""
    box = jax.tree_util.GetAttrKey("value")
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys if key != box)


def leaf_shapes(params: Any) -> dict[Path, tuple[int, ...]]:
    """Returns the shapes of all leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_of(keys): tuple(jnp.shape(leaf)) for keys, leaf in leaves}


def find_layers(model: Any, params: Any, inputs: tuple[Any, ...]) -> Found:
    """Finds all GRU layers of a model.

    Args:
      model: a linen or nnx module, or None for a tree of parameters that holds `GRUParams`.
      params: its parameters; None in nnx stands for `nnx.state(model, nnx.Param)`.
      inputs: those of linen's `model.init`; arrays, shapes or anything else that it takes.

    Returns:
      What was found.

    Raises:
      TypeError: `model` is no model.
      ValueError: `inputs` are missing, or `params` are not of this model.
    """
    if isinstance(model, nnx.Module):
        params = nnx.state(model, nnx.Param) if params is None else params
        layers, ranks = _find_in_nnx(model), {}
        given, known = leaf_shapes(params).keys(), leaf_shapes(nnx.state(model)).keys()
        _check_same(given, given & known)
    elif isinstance(model, nn.Module):
        layers, ranks, expected = _find_in_linen(model, inputs)
        _check_paths(leaf_shapes(params), expected, layers)
    elif model is None:
        layers, ranks = {}, {}
    else:
        raise TypeError(
            "model must be a linen or nnx module, or None for a tree that holds GRUParams, got "
            f"{type(model).__name__}."
        )
    layers |= _find_in_params(params)
    _check_owned(leaf_shapes(params), layers)
    return Found(params, layers, ranks)


def _find_in_params(params: Any) -> dict[Path, Layer]:
    """Every `GRUParams` in a tree; stacks have their axes in front, as from `jax.vmap`."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda n: isinstance(n, GRUParams))
    layers = {}
    for keys, node in nodes:
        if isinstance(node, GRUParams):
            shape = jnp.shape(node.recurrent_weights) if node.recurrent_weights is not None else ()
            if len(shape) < 2:
                raise ValueError(
                    "recurrent_weights of GRUParams must be a matrix of 3H rows, or a stack of "
                    f"such, got shape {shape}."
                )
            units = shape[-2] // 3
            options = CellOptions(units, reset_gate_mode=node.reset_gate_mode)
            layers[path_of(keys)] = Layer(options, (-1, -2))
    return layers


def _find_in_nnx(model: nnx.Module) -> dict[Path, Layer]:
    layers = {}
    for keys, module in nnx.iter_modules(model):
        weights = getattr(module, "recurrent_weights", None)
        if isinstance(module, CellOptions) and isinstance(weights, nnx.Variable):
            shapes = {name: getattr(module, name).shape for name in PER_GATE}
            layers[tuple(map(str, keys))] = Layer(module, _row_axes(module, shapes))
    return layers


def _row_axes(options: CellOptions, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """The axes of the rows in a stack of layers; its own axes stand in front if they can."""
    inner = {name: inner_shape(options, LEAF[name]) for name in PER_GATE}
    depth = len(shapes["bias"]) - 1
    for stack in itertools.product((0, 1, 2, -1), repeat=depth):  # where each further axis stands
        axes = {name: list(range(len(shape))) for name, shape in shapes.items()}
        for position in stack:
            for left in axes.values():
                left.pop(position if position < len(left) else -1)
        found = {name: tuple(shapes[name][axis] for axis in left) for name, left in axes.items()}
        if found == inner or not depth:
            return axes["bias"][0], axes["recurrent_weights"][0]
    raise ValueError(
        f"the learnables of this {type(options).__name__} must have the shapes {inner}, or be "
        f"stacks of such arrays, got {shapes}."
    )


# A linen model makes its layers only when it is called. Beside the leaves of each layer a vector
# and a matrix are put, whose rows have a size that nothing else has: where an `nn.scan` or an
# `nn.vmap` stacks the leaves, it stacks the marks alike, and the rows can be told from the stack.
MARKED = 1_000_003
MARKS = ("_rows_of_vectors", "_rows_of_matrices")
LOOKS = itertools.count()


def new_look() -> str:
    """Returns a name that no collection and no variable of a model has, and no look before."""
    return f"_look_{next(LOOKS)}"


def _find_in_linen(
    model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[dict[Path, Layer], dict[Path, int], dict[Path, tuple[int, ...]]]:
    """Layers, ranks of all leaves and shapes of all leaves, from an abstract `model.init`."""
    if not inputs:
        raise ValueError(
            "inputs are missing: a linen model makes its layers when it is called, so pass what "
            "model.init takes after the key, arrays or jax.ShapeDtypeStructs."
        )
    options: dict[Path, Any] = {}
    ranks: dict[Path, int] = {}
    # A collection that no model has tells the modules of this call from those that a model runs on
    # its own, and keeps what nn.jit traces here, marks included, from being used again.
    name = new_look()

    def look(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        result = method(*args, **kwargs)
        ours = module.scope is not None and module.is_mutable_collection("params")
        if not ours or module.is_mutable_collection(name):
            return result
        leaves = module.variables.get("params", {})
        for path, shape in leaf_shapes(leaves).items():
            ranks.setdefault((*module.path, *path), len(shape))
        if isinstance(context.module, CellOptions) and leaves.keys() & set(LEAF_NAMES):
            options[module.path] = module.clone(parent=None)
            module.put_variable("params", MARKS[0], jnp.zeros(MARKED))
            module.put_variable("params", MARKS[1], jnp.zeros((MARKED, 1)))
        return result

    leaves, structure = jax.tree.flatten(inputs)
    kinds = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    arrays = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, kinds)}

    def init(key: jax.Array, arrays: Mapping[int, Any]) -> Any:
        filled = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
        with nn.intercept_methods(look):
            inputs = jax.tree.unflatten(structure, filled)
            mutable = DenyList(("intermediates", name))
            return model.init(key, *inputs, mutable=mutable).get("params", {})

    shapes = leaf_shapes(jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), arrays))
    axes = {path: shape.index(MARKED) for path, shape in shapes.items() if path[-1] in MARKS}
    shapes = {p: shape for p, shape in shapes.items() if not any(m in "/".join(p) for m in MARKS)}
    layers = {
        path: Layer(layer, (axes[*path, MARKS[0]], axes[*path, MARKS[1]]))
        for path, layer in options.items()
    }
    return layers, ranks, shapes


def _check_paths(
    given: dict[Path, tuple[int, ...]],
    expected: dict[Path, tuple[int, ...]],
    layers: dict[Path, Layer],
) -> None:
    """Raises unless the parameters of a linen model have its leaves; projectors may differ."""
    projectors = {(*path, name) for path in layers for name in LEAF_NAMES if name not in PER_GATE}
    _check_same(given.keys() - projectors, expected.keys() - projectors)
    projected = {path[:-1] for path in (given.keys() | expected.keys()) & projectors}
    for path in sorted(given.keys() & expected.keys()):
        got, wanted = given[path], expected[path]
        free = path[:-1] in projected and path[-1] in LEAF  # its columns follow its projectors
        if len(got) != len(wanted) or (got != wanted and not free):
            raise ValueError(
                f"params do not belong to this model: {'/'.join(path)!r} must have shape {wanted} "
                f"for these inputs, got {got}. Map stacks with jax.vmap."
            )


def _check_same(given: Set[Path], expected: Set[Path]) -> None:
    lists = {"lack": expected - given, "have": given - expected}
    told = [f"{verb} {sorted(map('/'.join, paths))[:3]}" for verb, paths in lists.items() if paths]
    if told:
        raise ValueError(
            f"params do not belong to this model: they {' and '.join(told)}. Pass "
            "variables['params'] in linen, or nnx.state(model, nnx.Param), of the same model."
        )


def _check_owned(shapes: dict[Path, tuple[int, ...]], layers: dict[Path, Layer]) -> None:
    """Raises where a sub-tree looks like a GRU and no layer owns it, or where rows are missing."""
    for path in {path[:-1] for path in shapes}:
        if path not in layers and all((*path, name) in shapes for name in PER_GATE):
            raise ValueError(
                f"the parameters at {'/'.join(path)!r} look like those of a GRU, but no layer of "
                "this model owns them. Without a model, give GRUParams, not a dict; in linen, the "
                "layer must be called by model.init; behind flax.nnx.bridge it is not seen."
            )
    for path, layer in layers.items():
        for name in PER_GATE:
            shape = shapes.get((*path, name))
            if shape is not None:
                _check_rows("/".join((*path, name)), shape, layer, LEAF[name])


def _check_rows(name: str, shape: tuple[int, ...], layer: Layer, leaf: Leaf) -> None:
    inner, axis = inner_shape(layer.options, leaf), layer.row_axis(leaf)
    if len(shape) < len(inner) or shape[axis] != inner[0]:
        raise ValueError(
            f"{name} must have {inner[0]} rows on axis {axis} for num_hidden_units = "
            f"{layer.options.num_hidden_units}, got shape {shape}."
        )
