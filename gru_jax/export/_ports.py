"""Inputs and outputs of an exported model: their names, and which of their sizes stay open."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import export

from gru_jax import formats
from gru_jax._models import path_of

Ports = dict[str, jax.ShapeDtypeStruct]


def inputs(arguments: Mapping[str, Any], data_format: str, axes: Mapping[str, str]) -> Ports:
    """Returns the arrays among the arguments of a call, by name, with symbolic batch and time.

    Args:
      arguments: what the model is called with; the first is the input "x", `hidden` is "h0".
      data_format: that of the model, "BTC" where it has none.
      axes: letters of the axes of inputs, by name, where the rules of `_letters` do not hold.
    """
    names = {argument: "h0" if argument == "hidden" else argument for argument in arguments}
    names |= {argument: "x" for argument in list(names)[:1]}
    arrays = {
        name: leaf
        for argument, tree in arguments.items()
        for name, leaf in _named(names[argument], tree)
        if is_array(leaf)
    }
    unknown = sorted(axes.keys() - arrays.keys())
    if unknown:
        raise ValueError(f"axes must name inputs, {', '.join(arrays)}; got {', '.join(unknown)}.")
    sizes: dict[str, Any] = dict(zip("BT", export.symbolic_shape("batch, time"), strict=True))
    main, found = None, {}
    for name, leaf in arrays.items():
        letters = axes.get(name) or _letters(leaf, main, data_format)
        if len(letters) != len(leaf.shape):
            raise ValueError(
                f"axes of {name} must have one letter for each axis of shape {leaf.shape}, got "
                f"{letters!r}."
            )
        main = main or (letters + "C" if letters == "BT" and _is_whole(leaf) else letters)
        pairs = zip(letters, leaf.shape, strict=True)
        shape = tuple(sizes.get(letter, size) for letter, size in pairs)
        found[name] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return found


def outputs(result: Any, taken: Ports) -> Ports:
    """Returns what a model returns by name: "y", "hidden", or the keys of a dictionary."""
    parts = result if isinstance(result, tuple) else (result,)
    names = ["y", "hidden", *(f"y{n}" for n in range(2, len(parts)))]
    trees = result if isinstance(result, Mapping) else dict(zip(names, parts, strict=False))
    leaves = [leaf for name, tree in trees.items() for leaf in _named(str(name), tree)]
    return {f"{name}_out" if name in taken else name: leaf for name, leaf in leaves}


def _letters(leaf: Any, main: str | None, data_format: str) -> str:
    """What the axes of an input are, read from its rank and the letters of the first input."""
    n, whole = len(leaf.shape), _is_whole(leaf)
    if main is None:
        if data_format != "BTC":
            return data_format if len(data_format) == n else "-" * n
        if whole:
            return "BT"[:n] + "-" * (n - 2)
        return ("B" + "-" * (n - 3) + "TC" if n > 2 else "TC"[-n:]) if n else ""
    last = formats.output_format(main, "last") if set(main) <= set("SCBTU") else "-"
    flags = "".join(letter for letter in "BT" if letter in main)
    choices = (flags, flags[:1]) if whole else (main, last)
    return next((letters for letters in choices if len(letters) == n), "-" * n)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one, and so an input."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_whole(leaf: Any) -> bool:
    """Whether the numbers are integers or booleans."""
    return np.dtype(leaf.dtype).kind in "biu"


def _named(name: str, tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with names: `name` for a single one, else with its path behind it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if len(leaves) == 1:
        return [(name, leaves[0][1])]
    return [("_".join((name, *path_of(path))), leaf) for path, leaf in leaves]
