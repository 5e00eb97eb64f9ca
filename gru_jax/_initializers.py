"""The initialisers of the pages, by name. All act on the whole stacked array, not gate by gate."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from gru_jax import _checks

NAMES = ("glorot", "he", "orthogonal", "narrow-normal", "zeros", "ones")
BIAS_NAMES = ("zeros", "narrow-normal", "ones")


def initialize(
    initializer: str | Callable, key: jax.Array | None, shape: tuple, dtype: Any, fans: tuple[int, int]
) -> Any:
    """Draws one learnable.

    Args:
      initializer: one of `NAMES`, or `f(key, shape, dtype)` as in `jax.nn.initializers`.
      key: a JAX random key; unused by "zeros", "ones" and given arrays.
      shape: the size of the whole stacked array.
      dtype: the dtype of the result. Draws are made in float32 at least and then cast.
      fans: the axes (fan-in, fan-out) of a matrix: (-1, -2) for weights, (-2, -1) for projectors.

    Returns:
      What the initialiser returns: an array, or an array in a Flax box.
    """
    if not isinstance(initializer, str):
        return _checked(initializer(key, shape, dtype), initializer, shape)
    if initializer in ("zeros", "ones"):
        return getattr(jnp, initializer)(shape, dtype)
    wide = _checks.promote(dtype, jnp.float32)
    return _draw(initializer, *fans)(key, shape, wide).astype(dtype)


def _checked(value: Any, initializer: Callable, shape: tuple) -> Any:
    for array in jax.tree.leaves(value):  # looks into the boxes of flax.linen.with_partitioning
        if tuple(np.shape(array)) != tuple(shape):
            raise ValueError(
                f"initializer {initializer!r} must return an array of shape {tuple(shape)}, "
                f"got {tuple(np.shape(array))}."
            )
    return value


def _draw(name: str, fan_in: int, fan_out: int) -> Callable:
    if name == "glorot":
        return initializers.variance_scaling(
            1.0, "fan_avg", "uniform", in_axis=fan_in, out_axis=fan_out
        )
    if name == "he":
        return initializers.variance_scaling(
            2.0, "fan_in", "normal", in_axis=fan_in, out_axis=fan_out
        )
    if name == "orthogonal":
        return initializers.orthogonal()
    return initializers.normal(stddev=0.01)


class Given:
    """An initialiser that returns a given array: how `input_weights=...` and its like are kept.

    It can be hashed and compared by content, so that a layer which holds it stays a valid static
    argument. An array made under a JAX transformation is known by its identity.
    """

    def __init__(self, name: str, array: Any):
        self.name = name
        self.array = array
        self._content = _content(array)

    def __call__(self, key: Any, shape: tuple, dtype: Any) -> jax.Array:
        if tuple(np.shape(self.array)) != tuple(shape):
            raise ValueError(
                f"{self.name} must have shape {tuple(shape)}, got {tuple(np.shape(self.array))}."
            )
        return jnp.asarray(self.array).astype(dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        return f"<given {self.name} {tuple(np.shape(self.array))}>"


def _content(array: Any) -> tuple:
    shape, dtype = tuple(np.shape(array)), str(array.dtype)
    if isinstance(array, jax.core.Tracer):
        return (shape, dtype, id(array))
    return (shape, dtype, hashlib.sha256(np.asarray(array).tobytes()).hexdigest())
