"""Learn-rate and L2 factors as arrays: for one GRU, and for all parameters of a model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gru_jax import _checks
from gru_jax._models import LEAF, Found, Layer, Path, find_layers, inner_shape, path_of
from gru_jax._params import LEAVES, GRUParams, Leaf

Factor = float | tuple[float, ...]  # one, or three for (reset, update, candidate)

LEARN_RATE, L2 = "learn_rate_factor", "l2_factor"  # ends of the options' names


def gate_factors(
    params: GRUParams,
    *,
    input_weights: Factor = 1.0,
    recurrent_weights: Factor = 1.0,
    bias: Factor = 1.0,
    input_projector: float = 1.0,
    output_projector: float = 1.0,
) -> GRUParams:
    """Returns factors as arrays that broadcast against the parameters of one GRU.

    Args:
      params: the parameters, or a stack of them with its axes in front, as from `jax.vmap`.
      input_weights: a nonnegative number, or three for the rows of (reset, update, candidate).
      recurrent_weights: likewise.
      bias: likewise; three serve both halves of a (6H,) bias.
      input_projector: a nonnegative number.
      output_projector: a nonnegative number.

    Returns:
      `GRUParams` of NumPy float64 arrays: a number becomes an array without axes, three become
      (3H, 1) for a matrix and (3H,) or (6H,) for the bias.

    Raises:
      TypeError: `params` are no `GRUParams`, or a factor is no number.
      ValueError: a factor is negative, not finite, of a wrong length, or of a projector that the
        parameters do not have.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import optim
      >>> params = gru_jax.init_params(jax.random.key(0), 2, 3)
      >>> optim.gate_factors(params, bias=(1, 0.5, 2)).bias
      array([1. , 1. , 0.5, 0.5, 2. , 2. ])
    """
    if not isinstance(params, GRUParams):
        raise TypeError(f"params must be a gru_jax.GRUParams, got {type(params).__name__}.")
    given = {
        "input_weights": input_weights,
        "recurrent_weights": recurrent_weights,
        "bias": bias,
        "input_projector": input_projector,
        "output_projector": output_projector,
    }
    found = find_layers(None, params, ())
    arrays: dict[str, Any] = {}
    for leaf in LEAVES:
        value = _checks.factor(leaf.name, given[leaf.name], per_gate=leaf.per_gate)
        array = getattr(params, leaf.name)
        if array is not None:
            layer = found.layers[()]
            arrays[leaf.name] = _row_blocks(value, layer, leaf, jnp.ndim(array))
        elif value != 1.0:
            raise ValueError(f"{leaf.name} is absent in params, so it takes no factor: {value}.")
    return params.replace(**arrays)


def learn_rate_factors(
    model: Any, params: Any, *inputs: Any, others: Callable[[Path, Any], float] | None = None
) -> Any:
    """Returns the learn-rate factors of all parameters of a model.

    Leaves of GRU layers, at any depth, have the factors of their layer's options, one block of
    rows for each gate; leaves of other layers have 1.

    Args:
      model: a linen or nnx module; or None where `params` holds `GRUParams`, whose factors are 1.
      params: the parameters, of linen `variables["params"]`; None in nnx stands for
        `nnx.state(model, nnx.Param)`. Shapes do as well as arrays.
      *inputs: what linen's `model.init` takes after the key, arrays or `jax.ShapeDtypeStruct`s,
        because linen makes its layers only when called; nnx needs none.
      others: the factors of leaves that belong to no GRU, as `others(path, leaf)`; the path is a
        tuple of strings.

    Returns:
      A tree like `params` of NumPy float64 arrays that broadcast against the leaves. In a stack,
      as of `nn.scan` or `nn.vmap`, the blocks lie on the axis of the rows. (In nnx, which does not
      know the axis of a stack, it is told from the shapes, and taken for the first one where more
      would fit.)

    Raises:
      TypeError: `model` is no model.
      ValueError: `inputs` are missing, `params` are not of this model, or a part of them looks like
        a GRU that no layer owns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gru_jax import linen, optim
      >>> layer = linen.GRULayer(2, bias_learn_rate_factor=(1, 0.5, 2))
      >>> x = jnp.ones((1, 5, 3))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> optim.learn_rate_factors(layer, params, x)["bias"]
      array([1. , 1. , 0.5, 0.5, 2. , 2. ])
    """
    others = _function(others)
    return factors_of(LEARN_RATE, find_layers(model, params, inputs), others)


def l2_factors(
    model: Any, params: Any, *inputs: Any, others: Callable[[Path, Any], float] | None = None
) -> Any:
    """Returns the L2 factors of all parameters of a model.

    Leaves of GRU layers, at any depth, have the factors of their layer's options; leaves of other
    layers have 1 where they have two or more axes, and 0 where they are vectors or numbers. (The
    axes of linen's stacks do not count; in nnx, which does not know them, they do.)

    Args:
      model: see `learn_rate_factors`; of bare `GRUParams` the bias has 0 and all else 1.
      params: see `learn_rate_factors`.
      *inputs: see `learn_rate_factors`.
      others: see `learn_rate_factors`.

    Returns:
      A tree like `params`, as of `learn_rate_factors`.

    Raises:
      TypeError: `model` is no model.
      ValueError: as in `learn_rate_factors`.

    Example:
      >>> from flax import nnx
      >>> import gru_jax.nnx
      >>> from gru_jax import optim
      >>> layer = gru_jax.nnx.GRULayer(2, input_size=3, rngs=nnx.Rngs(0))
      >>> factors = optim.l2_factors(layer, nnx.state(layer, nnx.Param))
      >>> float(factors["bias"][...]), float(factors["input_weights"][...])
      (0.0, 1.0)
    """
    others = _function(others)
    return factors_of(L2, find_layers(model, params, inputs), others)


def _function(others: Any) -> Any:
    if others is not None and not callable(others):
        raise TypeError(f"others must be a function of (path, leaf), got {others!r}.")
    return others


def factors_of(kind: str, found: Found, others: Callable[[Path, Any], float] | None = None) -> Any:
    """Returns the factors of one kind for all parameters of a model that has been looked at."""

    def factor(keys: tuple, leaf: Any) -> np.ndarray:
        path = path_of(keys)
        layer = found.layers.get(path[:-1])
        if path and layer and path[-1] in LEAF:
            value = getattr(layer.options, f"{path[-1]}_{kind}")
            return _row_blocks(value, layer, LEAF[path[-1]], jnp.ndim(leaf))
        if others is None:
            matrix = found.ranks.get(path, jnp.ndim(leaf)) >= 2
            return np.asarray(1.0 if kind == LEARN_RATE or matrix else 0.0)
        option = f"others({path}, ...)"
        return np.asarray(_checks.number(option, others(path, leaf)), np.float64)

    return jax.tree_util.tree_map_with_path(factor, found.params)


def _row_blocks(value: Factor, layer: Layer, leaf: Leaf, ndim: int) -> np.ndarray:
    """One factor, or three as blocks of rows, for a leaf of so many axes."""
    if not isinstance(value, tuple):
        return np.asarray(value, np.float64)
    blocks = np.repeat(value, layer.options.num_hidden_units)
    rows = np.resize(blocks, inner_shape(layer.options, leaf)[0])  # (6H,): the blocks twice
    axis = layer.row_axis(leaf) % ndim
    return rows.reshape([-1 if n == axis else 1 for n in range(ndim)])
