"""Projection of whole models: layers are watched while the model runs, and then exchanged."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from gru_jax._activity import NeuronPCA, analyse, check_enough, fold
from gru_jax._arguments import sizes_of
from gru_jax._models import LEAF, LOOKS, PER_GATE, Path, path_of
from gru_jax._options import CellOptions, LayerOptions
from gru_jax._params import AFTER, LEAF_NAMES, RECURRENT_BIAS, GRUParams, num_learnables
from gru_jax._plan import Plan, ProjectionInfo
from gru_jax._subspaces import expand
from gru_jax._watch import Call, watch


def neuron_pca_of(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    key: Any = None,
    call: Callable | None = None,
) -> dict[Path, NeuronPCA]:
    """Analyses every GRU layer of a model, at any depth, by running the model.

    Args:
      model: a linen or nnx module.
      params: its parameters, of linen `variables["params"]`; None in nnx.
      batches: the inputs of the model: x, or tuples of its positional arguments.
      key: see `neuron_pca`.
      call: `call(model, params, *inputs)`, which runs the model; by default
        `model.apply({"params": params}, *inputs)` in linen and `model(*inputs)` in nnx. To be given
        for other collections, keywords or methods. It must not be compiled.

    Returns:
      The analyses by path, a tuple of strings. Cells, which others loop over, are left out.

    Raises:
      ValueError: the model has no GRU layer, a layer is called inside a loop or a compiled part
        (nn.scan, nn.jit, nn.remat), or as in `neuron_pca`.
      TypeError: `model` is no module.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import gru_jax.nnx
      >>> from gru_jax import projection
      >>> model = nnx.Sequential(
      ...     gru_jax.nnx.GRULayer(50, input_size=12, rngs=nnx.Rngs(0)),
      ...     nnx.Linear(50, 9, rngs=nnx.Rngs(1)))
      >>> x = jax.random.normal(jax.random.key(1), (32, 50, 12))
      >>> pca = projection.neuron_pca_of(model, None, [x])
      >>> model, _, info = projection.project_model(model, None, pca, explained_variance_goal=0.9)
      >>> info.layer_names, info.learnables_reduction > 0.1
      (('layers/0',), True)
    """
    found: dict[Path, NeuronPCA] = {}
    for n, batch in enumerate(batches):
        inputs = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        for path, part in gather(model, params, inputs, call, fold(key, n)):
            found[path] = found[path] + part if path in found else part
    if not found:
        raise ValueError("no GRU layer was called: batches must not be empty, nor without layers.")
    return {path: check_enough("/".join(path) or "the model", pca) for path, pca in found.items()}


def project_model(
    model: Any,
    params: Any,
    pca: Mapping[Path, NeuronPCA],
    explained_variance_goal: float | None = None,
    learnables_reduction_goal: float | None = None,
    *,
    input_projector_size: int | str | None = "auto",
    output_projector_size: int | str | None = "auto",
    method: str = "pca",
) -> tuple[Any, Any, ProjectionInfo]:
    """Projects the GRU layers of a model, as `compressNetworkUsingProjection` of MATLAB does.

    Args:
      model: a linen or nnx module.
      params: its parameters, of linen `variables["params"]`; None in nnx.
      pca: of `neuron_pca_of`; layers that are left out of it stay as they are.
      explained_variance_goal: see `project`; one goal for all layers.
      learnables_reduction_goal: see `project`; of all learnables of the model.
      input_projector_size: see `project`; of every layer.
      output_projector_size: see `project`; of every layer.
      method: see `project`.

    Returns:
      (model, params, record). In linen the model is the one given, because its layers compute with
      the leaves that they find, and the parameters are new; in nnx the model is a copy with other
      layers, and the second is None.

    Raises:
      ValueError: as in `project`, or a path is not in the model.
      TypeError: `model` is no module.

    Example:
      >>> import jax
      >>> from gru_jax import linen, projection
      >>> layer, x = linen.GRULayer(100), jax.random.normal(jax.random.key(1), (32, 50, 12))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> pca = projection.neuron_pca_of(layer, params, [x])
      >>> _, small, info = projection.project_model(
      ...     layer, params, pca, learnables_reduction_goal=0.6)
      >>> layer.apply({"params": small}, x).shape, info.learnables[0]
      ((32, 50, 100), 33900)
    """
    modes = {path: part.reset_gate_mode for path, part in pca.items()}
    known = learnables_of(model, params, modes)
    missing = ["/".join(path) for path in pca if path not in known]
    if missing:
        raise ValueError(f"pca must be of this model, which has no GRU layer at {missing}.")
    plan = Plan(
        {path: (known[path], part) for path, part in pca.items()}, _count(model, params), method
    )
    fixed = {"input_projector": input_projector_size, "output_projector": output_projector_size}
    sizes = plan.sizes(explained_variance_goal, learnables_reduction_goal, fixed, None)
    projected, info = plan.carry_out(sizes)
    return *set_learnables(model, params, projected), info


def unproject_model(model: Any, params: Any) -> tuple[Any, Any]:
    """Makes all projected GRU layers of a model dense, as `unpackProjectedLayers` of MATLAB does.

    Args:
      model: a linen or nnx module.
      params: its parameters, of linen `variables["params"]`; None in nnx.

    Returns:
      (model, params), as of `project_model`.

    Raises:
      TypeError: `model` is no module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gru_jax import linen, projection
      >>> layer = linen.GRUProjectedLayer(100, 25, 9)
      >>> params = layer.init(jax.random.key(0), jnp.ones((2, 7, 12)))["params"]
      >>> sorted(projection.unproject_model(layer, params)[1])
      ['bias', 'input_weights', 'recurrent_weights']
    """
    known = learnables_of(model, params, {})
    projected = {p: one for p, one in known.items() if len(one.arrays()) > 3}
    for one in projected.values():
        sizes_of(one)
    return set_learnables(model, params, {p: expand(one) for p, one in projected.items()})


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
                object.__setattr__(module, "_look", next(LOOKS))  # what nnx.jit knows is not it
        call = call or (lambda model, _, *inputs: model(*inputs))
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


def _apply(model: Any, params: Any, *inputs: Any) -> Any:
    """Runs a linen model; with a collection of its own, so that nn.jit traces it anew."""
    return model.apply({"params": params}, *inputs, mutable=[f"_look_{next(LOOKS)}"])


def learnables_of(model: Any, params: Any, modes: Mapping[Path, str]) -> dict[Path, GRUParams]:
    """Returns the parameters of all GRUs of a model, by path; linen does not know their modes."""
    if isinstance(model, nnx.Module):
        return {
            path: GRUParams(**layer.known_leaves(), reset_gate_mode=layer.reset_gate_mode)
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


def _count(model: Any, params: Any) -> int:
    return num_learnables(nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else params)


def _no_module(model: Any) -> TypeError:
    return TypeError(f"model must be a linen or nnx module, got {type(model).__name__}.")
