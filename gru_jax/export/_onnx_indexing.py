"""Parts of arrays as ONNX nodes: slices, windows at computed places, and rows of tables."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from gru_jax.export._graph import Graph, Operand


def _slice(g: Graph, eqn: Any, x: Operand) -> str:
    shape = eqn.invars[0].aval.shape
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(shape)
    cut = [n for n, size in enumerate(shape) if (starts[n], ends[n], steps[n]) != (0, size, 1)]
    if not cut:
        return g.full(x, shape)
    starts, ends = ([sizes[n] for n in cut] for sizes in (starts, ends))
    steps = g.integers(*(steps[n] for n in cut))
    return g.node(
        "Slice", g.full(x, shape), g.vector(starts), g.vector(ends), g.integers(*cut), steps
    )


def _split(g: Graph, eqn: Any, x: Operand) -> list[str]:
    name, axis, start, parts = g.full(x, eqn.invars[0].aval.shape), eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        ends = g.vector([start]), g.vector([start + size])
        parts.append(g.node("Slice", name, *ends, g.integers(axis)))
        start += size
    return parts


def _window(g: Graph, name: str, starts: str, sizes: Sequence, axes: Sequence[int]) -> str:
    """A part of given sizes from computed starts."""
    ends = g.node("Add", starts, g.vector([sizes[axis] for axis in axes]))
    return g.node("Slice", name, starts, ends, g.integers(*axes))


def _inside(g: Graph, index: str, shape: Sequence, sizes: Sequence, axes: Sequence[int]) -> str:
    """Places of parts of given sizes, moved inside the array as JAX does."""
    last = g.vector([shape[axis] - sizes[axis] for axis in axes])
    return g.node("Max", g.node("Min", index, last), g.integers(0))


def _dynamic_slice(g: Graph, eqn: Any, x: Operand, *starts: Operand) -> str:
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    axes = [n for n, size in enumerate(shape) if size != sizes[n]]
    if not axes:
        return g.full(x, shape)
    parts = [g.node("Reshape", g.name(starts[n]), g.integers(1)) for n in axes]
    parts = [g.cast(part, np.int64) for part in parts]
    start = parts[0] if len(parts) == 1 else g.node("Concat", *parts, axis=0)
    start = _inside(g, start, shape, sizes, axes)
    return _window(g, g.full(x, shape), start, sizes, axes)


def _reverse(g: Graph, eqn: Any, x: Operand) -> str:
    axes = eqn.params["dimensions"]
    first, before, back = (g.integers(*[n] * len(axes)) for n in (-1, np.iinfo(np.int64).min, -1))
    name = g.full(x, eqn.invars[0].aval.shape)
    return g.node("Slice", name, first, before, g.integers(*axes), back)


def _gather(g: Graph, eqn: Any, x: Operand, indices: Operand) -> str:
    how, sizes, mode = (eqn.params[n] for n in ("dimension_numbers", "slice_sizes", "mode"))
    shape, at = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    name, given = g.full(x, shape), g.cast(g.full(indices, at), np.int64)
    axes, index = how.start_index_map, given
    if mode != GatherScatterMode.PROMISE_IN_BOUNDS:
        index = _inside(g, given, shape, sizes, axes)
    filled = mode == GatherScatterMode.FILL_OR_DROP
    if len(at) == 1 and not filled:
        part, gone = _window(g, name, index, sizes, axes), how.collapsed_slice_dims
        return g.node("Squeeze", part, g.integers(*gone)) if gone else part
    batch = len(how.operand_batching_dims)
    row = _row(eqn, len(at) - 1, batch)
    if row is not None:
        found = g.node("Gather", name, g.node("Squeeze", index, g.integers(-1)), axis=row)
    else:
        found = g.node("GatherND", name, index, batch_dims=batch)
    return _filled(g, eqn, found, g.node("Equal", given, index)) if filled else found


def _row(eqn: Any, points: int, batch: int) -> int | None:
    """The one axis along which rows are taken, or None for the first axes behind those of a batch.

    Raises ValueError where anything but whole rows is taken, or their axes do not stay in place.
    """
    how, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axes, shape = how.start_index_map, eqn.invars[0].aval.shape
    single = (*how.operand_batching_dims, *axes)
    whole = all(sizes[n] == (1 if n in single else size) for n, size in enumerate(shape))
    others = [n for n in range(len(eqn.outvars[0].aval.shape)) if n not in how.offset_dims]
    if whole and axes and how.collapsed_slice_dims == axes:
        if not batch and len(axes) == 1 and others == list(range(axes[0], axes[0] + points)):
            return axes[0]
        ahead = how.operand_batching_dims == how.start_indices_batching_dims
        if ahead and single == tuple(range(len(single))) and others == list(range(points)):
            return None
    raise ValueError("it is exported for jnp.take and for plain indexing only.")


def _filled(g: Graph, eqn: Any, found: str, good: str) -> str:
    """What was found, but the fill value where an index is not good."""
    good = g.cast(g.reduce("ReduceMin", g.cast(good, np.int32), (-1,)), bool)
    rows = eqn.params["dimension_numbers"].offset_dims
    good = g.node("Unsqueeze", good, g.integers(*rows)) if rows else good
    dtype, fill = np.dtype(eqn.outvars[0].aval.dtype), eqn.params["fill_value"]
    if fill is None:
        fill = np.iinfo(dtype).min if dtype.kind in "iu" else dtype.kind == "b" or np.nan
    return g.node("Where", good, found, g.constant(np.asarray(fill, dtype)))


TABLE: dict[str, Callable] = {
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
}
