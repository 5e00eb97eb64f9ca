"""Inputs and outputs of an exported model: their names, and which of their sizes stay open."""

import itertools
from collections.abc import Container, Mapping
from typing import Any

import jax
import numpy as np
from jax import export

from gru_jax import formats
from gru_jax._models import Path, path_of

Ports = dict[str, jax.ShapeDtypeStruct]
Leaves = list[tuple[Path, Any]]  # arrays with the parts of their names
OPEN = {"B": "batch", "T": "time"}


def inputs(arguments: Mapping[str, Any], data_format: str, axes: Mapping[str, str]) -> Ports:
    """Returns the arrays among the arguments of a call, by name, with symbolic batch and time.

    Args:
      arguments: what the model is called with.
      data_format: that of the model, "BTC" where it has none.
      axes: letters of the axes of inputs, by name, where the rules of `_letters` do not hold.
    """
    leaves = _taken(arguments)
    arrays = _by_name(leaves)
    unknown = sorted(axes.keys() - arrays.keys())
    if unknown:
        raise ValueError(f"axes must name inputs, {', '.join(arrays)}; got {', '.join(unknown)}.")
    first = _main(leaves)
    main, sizes, found = None, _Sizes(), {}
    for n, (name, leaf) in sorted(enumerate(arrays.items()), key=lambda item: item[0] != first):
        letters = axes.get(name) or _letters(leaf, main, data_format)
        if len(letters) != len(leaf.shape):
            raise ValueError(
                f"axes of {name} must have one letter for each axis of shape {leaf.shape}, got "
                f"{letters!r}."
            )
        if n == first:
            main = letters + "C" if letters == "BT" and _is_whole(leaf) else letters
        pairs = zip(letters, leaf.shape, strict=True)
        shape = tuple(sizes.of(letter, size, broadcast=name not in axes) for letter, size in pairs)
        found[name] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return {name: found[name] for name in arrays}


def outputs(result: Any, taken: Ports) -> Ports:
    """Returns what a model returns by name: "y", "hidden", or the keys of a dictionary.

    An output that is called like an input has "_out" behind its name.
    """
    parts = result if isinstance(result, tuple) else (result,)
    names = ["y", "hidden", *(f"y{n}" for n in range(2, len(parts)))]
    trees = result if isinstance(result, Mapping) else dict(zip(names, parts, strict=False))
    leaves = [pair for name, tree in trees.items() for pair in _leaves(str(name), tree)]
    leaves = [((*p, "out") if "_".join(p) in taken else p, leaf) for p, leaf in leaves]
    return _by_name(leaves, taken)


class _Sizes:
    """Open sizes: one for each letter and number of an example; "time2" is another than "time"."""

    def __init__(self) -> None:
        self.scope = export.SymbolicScope()
        self.known: dict[tuple[str, int], Any] = {}

    def of(self, letter: str, size: int, *, broadcast: bool) -> Any:
        """Returns a size, open for B and T; with `broadcast` a 1 beside a larger one stays 1."""
        if letter not in OPEN:
            return size
        others = sum(known == letter for known, _ in self.known)
        if (letter, size) not in self.known:
            if others and size == 1 and broadcast:
                return 1
            name = OPEN[letter] + (str(others + 1) if others else "")
            self.known[letter, size] = export.symbolic_shape(name, scope=self.scope)[0]
        return self.known[letter, size]


def _taken(arguments: Mapping[str, Any]) -> Leaves:
    """The arrays among the arguments: the first is "x", `hidden` "h0", if no other is called so."""
    names: dict[str, str] = {}
    for argument, new in ((next(iter(arguments), ""), "x"), ("hidden", "h0")):
        if new not in arguments:
            names.setdefault(argument, new)
    named = [(names.get(argument, argument), tree) for argument, tree in arguments.items()]
    leaves = [pair for name, tree in named for pair in _leaves(name, tree)]
    return [(path, leaf) for path, leaf in leaves if is_array(leaf)]


def _main(leaves: Leaves) -> int | None:
    """Which leaf the others fit: in x the one with most axes, where integers lack the channels."""

    def rank(n: int) -> tuple[bool, int, bool]:
        (argument, *_), leaf = leaves[n]
        whole = _is_whole(leaf)
        return argument == "x" and len(leaf.shape) > 0, len(leaf.shape) + whole, not whole

    return max(range(len(leaves)), key=rank, default=None)


def _letters(leaf: Any, main: str | None, data_format: str) -> str:
    """What the axes of an input are, read from its rank and the letters of the main one."""
    n, whole = len(leaf.shape), _is_whole(leaf)
    if not main:
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


def _leaves(name: str, tree: Any) -> Leaves:
    """The leaves of a tree with the parts of their names: `name`, then the path if it is a tree.

    No part has a dot: names with dots are those of tensors inside the graph.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if len(leaves) == 1:
        leaves = [((), leaves[0][1])]
    return [(tuple(".".join((name, *path_of(path))).split(".")), leaf) for path, leaf in leaves]


def _by_name(leaves: Leaves, taken: Container[str] = ()) -> dict[str, Any]:
    """The leaves by name, in order; a longer path gives way to a shorter one of the same name."""
    names: dict[int, str] = {}
    for n in sorted(range(len(leaves)), key=lambda n: len(leaves[n][0])):
        name = "_".join(leaves[n][0])
        choices = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))
        names[n] = next(c for c in choices if c not in taken and c not in names.values())
    return {names[n]: leaf for n, (_, leaf) in enumerate(leaves)}
