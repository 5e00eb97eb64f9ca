"""Finds the GRU layers of a whole model, and which of its parameters each of them owns.

Layers are known as instances of `CellOptions`, parameters of the functional core as `GRUParams`;
no leaf is recognised by its name alone.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

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
    """Returns the path of a leaf as strings, without the box of a Flax variable around it."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


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
            units = jnp.shape(node.recurrent_weights)[-2] // 3
            options = CellOptions(units, reset_gate_mode=node.reset_gate_mode)
            layers[path_of(keys)] = Layer(options, (-1, -2))
    return layers


def _find_in_nnx(model: nnx.Module) -> dict[Path, Layer]:
    layers = {}
    for keys, module in nnx.iter_modules(model):
        weights = getattr(module, "recurrent_weights", None)
        if isinstance(module, CellOptions) and isinstance(weights, nnx.Variable):
            bias = _row_axis(module, LEAF["bias"], module.bias.shape)
            matrix = _row_axis(module, LEAF["recurrent_weights"], weights.shape)
            layers[tuple(map(str, keys))] = Layer(module, (bias, matrix))
    return layers


def _row_axis(options: CellOptions, leaf: Leaf, shape: tuple[int, ...]) -> int:
    """The axis of the rows in a stack of leaves, its own axes in front where both could be."""
    inner = inner_shape(options, leaf)
    if len(shape) == len(inner):
        return 0
    for axes in reversed(list(itertools.combinations(range(len(shape)), len(inner)))):
        if tuple(shape[axis] for axis in axes) == inner:
            return axes[0]
    raise ValueError(
        f"{leaf.name} of this {type(options).__name__} must have shape {inner}, or be a stack of "
        f"such arrays, got shape {shape}."
    )


# A linen model makes its layers only when it is called. Beside the leaves of each layer a vector
# and a matrix are put, whose rows have a size that nothing else has: where an `nn.scan` or an
# `nn.vmap` stacks the leaves, it stacks the marks alike, and the rows can be told from the stack.
MARKED = 1_000_003
MARKS = ("_rows_of_vectors", "_rows_of_matrices")


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

    def look(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        result = method(*args, **kwargs)
        leaves = module.variables.get("params", {})
        for path, shape in leaf_shapes(leaves).items():
            ranks.setdefault((*module.path, *path), len(shape))
        if isinstance(context.module, CellOptions) and leaves.keys() & set(LEAF_NAMES):
            options[module.path] = module
            module.put_variable("params", MARKS[0], jnp.zeros(MARKED))
            module.put_variable("params", MARKS[1], jnp.zeros((MARKED, 1)))
        return result

    leaves, structure = jax.tree.flatten(inputs)
    arrays = {n: leaf for n, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def init(key: jax.Array, arrays: Mapping[int, Any]) -> Any:
        filled = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
        with nn.intercept_methods(look):
            return model.init(key, *jax.tree.unflatten(structure, filled)).get("params", {})

    shapes = leaf_shapes(jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), arrays))
    axes = {path: shape.index(MARKED) for path, shape in shapes.items() if path[-1] in MARKS}
    layers = {
        path: Layer(layer, (axes[*path, MARKS[0]], axes[*path, MARKS[1]]))
        for path, layer in options.items()
    }
    return layers, ranks, {path: shape for path, shape in shapes.items() if path not in axes}


def _check_paths(
    given: dict[Path, tuple[int, ...]],
    expected: dict[Path, tuple[int, ...]],
    layers: dict[Path, Layer],
) -> None:
    """Raises unless the parameters of a linen model have its leaves; projectors may differ."""
    missing, foreign = (
        sorted(
            "/".join(path)
            for path in one.keys() - two.keys()
            if path[:-1] not in layers or path[-1] in PER_GATE or path[-1] not in LEAF_NAMES
        )
        for one, two in ((expected, given), (given, expected))
    )
    if missing or foreign:
        told = [f"lack {missing[:3]}"] * bool(missing) + [f"have {foreign[:3]}"] * bool(foreign)
        raise ValueError(
            f"params do not belong to this model: they {' and '.join(told)}. Pass "
            "variables['params'] of a model made with the same options."
        )


def _check_owned(shapes: dict[Path, tuple[int, ...]], layers: dict[Path, Layer]) -> None:
    """Raises where a sub-tree looks like a GRU and no layer owns it, or where rows are missing."""
    for path in {path[:-1] for path in shapes}:
        if path not in layers and all((*path, name) in shapes for name in PER_GATE):
            raise ValueError(
                f"the parameters at {'/'.join(path)!r} look like those of a GRU, but no layer of "
                "this model owns them. Without a model, give GRUParams, not a dict; in linen, the "
                "layer must be called by model.init (what nn.jit has traced before is not called "
                "again: jax.clear_caches() makes it forget)."
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
