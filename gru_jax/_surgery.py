"""Reading and exchanging the GRUs of whole models: what they see, and their learnables."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from gru_jax._activity import NeuronPCA, analyse
from gru_jax._models import LEAF, PER_GATE, Path, new_look, path_of
from gru_jax._options import CellOptions, LayerOptions
from gru_jax._params import AFTER, LEAF_NAMES, RECURRENT_BIAS, GRUParams, num_learnables
from gru_jax._params_of import params_of
from gru_jax._watch import Call, watch


def gather(
    model: Any, params: Any, inputs: tuple[Any, ...], call: Callable | None, key: Any
) -> list[tuple[Path, NeuronPCA]]:
    """Runs a model and returns the analysis of each call of a GRU layer, with the layer's path."""
    paths: dict[int, Path] = {}
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)  # states, counters and statistics of the given one stay
        paths = {id(module): path for path, module in _modules(model).items()}
        for module in _modules(model).values():
            if isinstance(module, CellOptions):
                object.__setattr__(module, "_look", new_look())  # what nnx.jit knows is not it
        call = call or _call
    elif isinstance(model, nn.Module):
        call = call or _apply
    else:
        raise _no_module(model)
    calls: list[tuple[Path, Call]] = []

    def see(made: Call) -> None:
        layer: Any = made.options
        if not isinstance(made.options, LayerOptions):
            return
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(made[1:])):
            raise ValueError(
                f"a {type(layer).__name__} is called inside a loop or a compiled part of the model "
                "(nn.scan, nn.remat, jit, ...), where its data cannot be seen: run it without."
            )
        path = paths.get(id(layer)) if isinstance(model, nnx.Module) else layer.path
        if path is None:
            raise ValueError(f"a {type(layer).__name__} is called that is not part of the model.")
        calls.append((path, made))

    with watch(see):
        call(model, params, *inputs)
    found = []
    for path, made in calls:
        options: Any = made.options
        how = {"reverse": options.reverse, "last": options.output_mode == "last", "key": key}
        found.append((path, analyse(*made[1:], **how)))
    return found


def _call(model: Any, _: Any, *inputs: Any) -> Any:
    """Runs an nnx model."""
    inputs, flags = _flags(model, inputs)
    return model(*inputs, **flags)


def _apply(model: Any, params: Any, *inputs: Any) -> Any:
    """Runs a linen model; with a collection of its own, so that nn.jit traces it anew."""
    inputs, flags = _flags(model, inputs)
    return model.apply({"params": params}, *inputs, mutable=[new_look()], **flags)


def _flags(model: Any, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(x, lengths) or (x, mask) as x and a keyword, where the model has this keyword."""
    kind = np.asarray(inputs[1]).dtype.kind if len(inputs) == 2 else ""
    name = {"b": "mask", "i": "lengths", "u": "lengths"}.get(kind)
    if name not in inspect.signature(type(model).__call__).parameters:
        return inputs, {}
    return inputs[:1], {name: inputs[1]}


def learnables_of(model: Any, params: Any, modes: Mapping[Path, str]) -> dict[Path, GRUParams]:
    """Returns the parameters of all GRUs of a model, by path; linen does not know their modes."""
    if isinstance(model, nnx.Module):
        return {
            path: params_of(layer)
            for path, layer in _modules(model).items()
            if isinstance(layer, CellOptions) and hasattr(layer, "set_learnables")
        }
    if not isinstance(model, nn.Module):
        raise _no_module(model)
    leaves: dict[Path, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if path and path[-1] in LEAF:
            leaves.setdefault(path[:-1], {})[path[-1]] = leaf
    grus = {path: found for path, found in leaves.items() if found.keys() >= set(PER_GATE)}
    return {path: _as_params(found, modes.get(path)) for path, found in grus.items()}


def set_learnables(model: Any, params: Any, new: Mapping[Path, GRUParams]) -> tuple[Any, Any]:
    """Returns a model and its parameters with other learnables in some GRUs."""
    if isinstance(model, nn.Module):
        for path, learnables in new.items():
            params = _replaced(params, path, learnables.arrays())
        return model, params
    model = nnx.clone(model)
    modules = _modules(model)
    owners: dict[int, Path] = {}
    for path, learnables in new.items():
        for name in learnables.arrays():
            variable = getattr(modules[path], name)
            first = owners.setdefault(id(variable), path)
            if variable is not None and first != path:
                raise ValueError(
                    f"the layers at {'/'.join(first)!r} and {'/'.join(path)!r} share their {name}, "
                    "so they cannot be projected each in its own way: give each its own."
                )
    for path, learnables in new.items():
        modules[path].set_learnables(learnables)
    return model, None


def _modules(model: nnx.Module) -> dict[Path, Any]:
    return {tuple(map(str, keys)): module for keys, module in nnx.iter_modules(model)}


def _as_params(leaves: Mapping[str, Any], mode: str | None) -> GRUParams:
    """Leaves as parameters; of a mode that fits the length of the bias, if it is not known."""
    twice = leaves["bias"].shape[-1] == 2 * leaves["recurrent_weights"].shape[-2]
    return GRUParams(**leaves, reset_gate_mode=mode or (RECURRENT_BIAS if twice else AFTER))


def _replaced(tree: Any, path: Path, leaves: dict[str, Any]) -> Any:
    """A nested mapping with other GRU leaves at a path, in the boxes that they have."""
    kind = type(tree)
    if path:
        return kind({**tree, path[0]: _replaced(tree[path[0]], path[1:], leaves)})
    boxed = {
        name: jax.tree.map(lambda _, new=new: new, tree[name]) if name in tree else new
        for name, new in leaves.items()
    }
    return kind({name: value for name, value in tree.items() if name not in LEAF_NAMES} | boxed)


def count_learnables(model: Any, params: Any) -> int:
    """Counts all learnables of a model."""
    return num_learnables(nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else params)


def _no_module(model: Any) -> TypeError:
    return TypeError(f"model must be a linen or nnx module, got {type(model).__name__}.")
