"""Projection of whole models, in both Flax APIs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gru_jax import _checks
from gru_jax._activity import NeuronPCA, check_enough, fold
from gru_jax._arguments import sizes_of
from gru_jax._models import Path
from gru_jax._plan import Plan, ProjectionInfo
from gru_jax._subspaces import expand
from gru_jax._surgery import count_learnables, gather, learnables_of, set_learnables


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
      model: a linen or nnx module. An nnx model runs in the mode it is in: call `model.eval()`
        first where it has dropout.
      params: its parameters, of linen `variables["params"]`; None in nnx.
      batches: the inputs of the model: x, or tuples of its positional arguments. In a pair, integer
        lengths or boolean masks go to the argument `lengths` or `mask` if the model has one.
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
    n = -1
    for n, batch in enumerate(batches):
        inputs = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        for path, part in gather(model, params, inputs, call, fold(key, n)):
            found[path] = found[path] + part if path in found else part
    if n < 0:
        raise ValueError("batches must hold at least one batch, got none.")
    if not found:
        raise ValueError("no GRU layer was called: the model must call a GRULayer on its inputs.")
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
      pca: of `neuron_pca_of`, or such analyses by path, a tuple or "a/b" as a string; layers that
        are left out of it stay as they are.
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
    if not isinstance(pca, Mapping):
        raise TypeError(f"pca must come from neuron_pca_of, got {type(pca).__name__}.")
    pca = {tuple(p.split("/")) if isinstance(p, str) else p: part for p, part in pca.items()}
    for part in pca.values():
        _checks.made_by("neuron_pca_of or neuron_pca", "pca", part, NeuronPCA)
    modes = {path: part.reset_gate_mode for path, part in pca.items()}
    known = learnables_of(model, params, modes)
    missing = ["/".join(path) for path in pca if path not in known]
    if missing:
        hint = "; params must be variables['params']" if "params" in (params or ()) else ""
        raise ValueError(f"pca must be of this model, which has no GRU layer at {missing}{hint}.")
    plan = Plan(
        {path: (known[path], part) for path, part in pca.items()},
        count_learnables(model, params),
        method,
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
