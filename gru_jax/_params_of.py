"""From the layers of either face to the functional core."""

from collections.abc import Mapping
from typing import Any

import jax

from gru_jax import _layer
from gru_jax._options import CellOptions
from gru_jax._params import LEAF_NAMES, GRUParams


def params_of(layer: CellOptions, learnables: Mapping[str, Any] | None = None) -> Any:
    """Returns the `GRUParams` of a layer: its learnables, reset mode and activation functions.

    The functions of `gru_jax`, `projection`, `convert` and `export` take them. A layer's `dtype`
    plays no part: the arrays are those that are stored.

    Args:
      layer: a layer or cell of `gru_jax.linen` or `gru_jax.nnx`.
      learnables: its arrays by name, for linen those of this layer in `variables["params"]`. None
        where the layer holds them: in nnx, and in linen while it is bound.

    Returns:
      The parameters; of a bidirectional layer a pair, forward and backward.

    Raises:
      TypeError: `layer` is no layer of this library.
      ValueError: the learnables are missing, are not those of one layer, or do not fit it.

    Example:
      >>> import jax.numpy as jnp, gru_jax
      >>> from flax import nnx
      >>> from gru_jax.nnx import GRULayer
      >>> layer = GRULayer(
      ...     100, input_size=12, state_activation_function="softsign", rngs=nnx.Rngs(0))
      >>> params = gru_jax.params_of(layer)
      >>> x = jnp.ones((2, 7, 12))
      >>> bool((gru_jax.gru(params, x)[0] == layer(x)).all())
      True
    """
    if not isinstance(layer, CellOptions):
        raise TypeError(
            "layer must be a GRU layer or cell of gru_jax.linen or gru_jax.nnx, got "
            f"{type(layer).__name__}."
        )
    learnables = layer.known_leaves() if learnables is None else learnables
    if not isinstance(layer, _layer.BidirectionalOptions):
        return _assembled(layer, learnables)
    forward, backward = (learnables.get(name, {}) for name in ("forward", "backward"))
    return _assembled(layer, forward), _assembled(layer, backward)


def _assembled(layer: CellOptions, learnables: Mapping[str, Any]) -> GRUParams:
    """The parameters of one direction; learnables may stand in boxes or variables of Flax."""
    if not {"input_weights", "recurrent_weights", "bias"} <= set(learnables) <= set(LEAF_NAMES):
        raise ValueError(
            "learnables must be those of this layer alone, by name (in linen a sub-tree of "
            f"variables['params']), got {sorted(learnables)}."
        )
    leaves = {name: jax.tree.leaves(value) for name, value in learnables.items()}
    return _layer.assembled(layer, {name: leaf[0] for name, leaf in leaves.items() if leaf})
