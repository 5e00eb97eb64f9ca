"""The initialisers of the pages, by name. All act on the whole stacked array, not gate by gate."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from gru_jax import _checks
from gru_jax._params import (
    AFTER,
    LEAVES,
    OPTION_CHECKS,
    GRUParams,
    Leaf,
    Sizes,
    check_initializer,
    wrong_shape,
)  # fmt: skip


def initialize(
    initializer: str | Callable,
    key: jax.Array | None,
    shape: tuple,
    dtype: Any,
    fans: tuple[int, int],
) -> Any:
    """Draws one learnable.

    Args:
      initializer: a name of the pages, or `f(key, shape, dtype)` as in `jax.nn.initializers`.
      key: a JAX random key; unused by "zeros", "ones" and given arrays.
      shape: the size of the whole stacked array.
      dtype: the dtype of the result. Draws are made in float32 at least and then cast.
      fans: the axes (fan-in, fan-out) of a matrix: (-1, -2) for weights, (-2, -1) for projectors.

    Returns:
      What the initialiser returns: an array, or an array in a Flax box.
    """
    if not isinstance(initializer, str):
        return _checked(initializer(key, shape, dtype), initializer, shape, dtype)
    if initializer in ("zeros", "ones"):
        return getattr(jnp, initializer)(shape, dtype)
    wide = _checks.promote(dtype, jnp.float32)
    return _draw(initializer, *fans)(key, shape, wide).astype(dtype)


def _checked(value: Any, initializer: Callable, shape: tuple, dtype: Any) -> Any:
    """The array of a function's result in `dtype`; it may lie in a box of linen or of nnx."""
    boxed = hasattr(value, "raw_value")  # of nnx.with_partitioning, no pytree
    arrays = [value.raw_value] if boxed else jax.tree.leaves(value)
    if len(arrays) != 1 or not hasattr(arrays[0], "dtype") or arrays[0].shape != tuple(shape):
        got = [getattr(a, "shape", type(a).__name__) for a in arrays]
        raise ValueError(
            f"initializer {initializer!r} must return an array of shape {tuple(shape)}, got "
            f"{got[0] if len(got) == 1 else f'{len(got)} values'}."
        )
    return value if boxed else jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), value)


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
        array = array if isinstance(array, jax.Array) else np.array(array)  # a copy
        _checks.real_dtype(name, array.dtype)
        self.name, self.array, self.shape = name, array, tuple(array.shape)
        if len(self.shape) != (1 if name == "bias" else 2):
            raise ValueError(
                f"{name} must be a {'vector' if name == 'bias' else 'matrix'}, "
                f"got an array of shape {self.shape}."
            )

    def __call__(self, key: Any, shape: tuple, dtype: Any) -> jax.Array:
        self.check(shape)
        return jnp.array(self.array, dtype, copy=True)  # donation must not take the caller's

    def check(self, shape: tuple | None) -> None:
        """Raises ValueError unless the array has this shape; None in it stands for any size."""
        expected = shape or ()
        if len(expected) == len(self.shape):
            pairs = zip(self.shape, expected, strict=True)
            if all(n == m or m is None for n, m in pairs):
                return
        raise ValueError(wrong_shape(self.name, shape, self.shape))

    @functools.cached_property
    def _content(self) -> tuple:
        shape, dtype = self.shape, str(self.array.dtype)
        if isinstance(self.array, jax.core.Tracer):
            return (shape, dtype, id(self.array))
        return (shape, dtype, hashlib.sha256(np.asarray(self.array).tobytes()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        return f"<given {self.name} {self.shape}>"


def init_params(
    key: jax.Array,
    num_hidden_units: int,
    input_size: int,
    *,
    input_projector_size: int | None = None,
    output_projector_size: int | None = None,
    reset_gate_mode: str = AFTER,
    state_activation_function: str | Callable = "tanh",
    gate_activation_function: str | Callable = "sigmoid",
    input_weights_initializer: str | Callable = "glorot",
    recurrent_weights_initializer: str | Callable = "orthogonal",
    bias_initializer: str | Callable = "zeros",
    input_projector_initializer: str | Callable = "orthogonal",
    output_projector_initializer: str | Callable = "orthogonal",
    dtype: Any = jnp.float32,
) -> GRUParams:
    """Draws the learnables of a GRU.

    Each initialiser is a name, or `f(key, shape, dtype)` as in `jax.nn.initializers`, called with
    the size of the whole stacked array. With n_in and n_out the columns and rows of a weight
    matrix (of a projector: its rows and columns):

    - "glorot": uniform, mean 0, variance 2/(n_in + n_out);
    - "he": normal, variance 2/n_in;
    - "orthogonal": Q of the QR decomposition of a unit-normal matrix of the array's size; where
      there are more columns than rows, the rows are orthonormal;
    - "narrow-normal": normal, standard deviation 0.01; "zeros"; "ones".

    The bias takes only "zeros", "narrow-normal", "ones" or a function.

    Args:
      key: a JAX random key.
      num_hidden_units: H, the width of state and output.
      input_size: I, the number of input channels.
      input_projector_size: P_i, or None for no input projector.
      output_projector_size: P_o, or None for no output projector.
      reset_gate_mode: see `GRUParams`; so are the two activation functions.
      state_activation_function: σ_s.
      gate_activation_function: σ_g.
      input_weights_initializer: for W of shape (3H, I or P_i).
      recurrent_weights_initializer: for R of shape (3H, H or P_o).
      bias_initializer: for b of shape (3H,) or (6H,).
      input_projector_initializer: for Q_i of shape (I, P_i).
      output_projector_initializer: for Q_o of shape (H, P_o).
      dtype: floating-point type of all leaves.

    Returns:
      The parameters.

    Raises:
      ValueError: a size is not positive, or a name is unknown.
      TypeError: a size is no integer, or `dtype` is no floating-point type.

    References:
      Glorot and Bengio 2010; He et al. 2015, arXiv:1502.01852; Saxe et al. 2014, arXiv:1312.6120.

    Example:
      >>> import jax, gru_jax
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12, output_projector_size=25)
      >>> params.recurrent_weights.shape, params.output_projector.shape
      ((300, 25), (100, 25))
    """
    options: dict[str, Any] = {
        "reset_gate_mode": reset_gate_mode,
        "state_activation_function": state_activation_function,
        "gate_activation_function": gate_activation_function,
    }
    options = {name: check(name, options[name]) for name, check in OPTION_CHECKS.items()}
    chosen = {
        "input_weights": input_weights_initializer,
        "recurrent_weights": recurrent_weights_initializer,
        "bias": bias_initializer,
        "input_projector": input_projector_initializer,
        "output_projector": output_projector_initializer,
    }
    sizes = Sizes(
        _checks.positive_int("num_hidden_units", num_hidden_units),
        _checks.positive_int("input_size", input_size),
        _checks.size("input_projector_size", input_projector_size, default=None),
        _checks.size("output_projector_size", output_projector_size, default=None),
        options["reset_gate_mode"],
    )
    dtype = _checks.real_dtype("dtype", dtype)
    keys = jax.random.split(key, len(LEAVES))
    arrays = {
        leaf.name: init_leaf(leaf, chosen[leaf.name], k, sizes, dtype)
        for leaf, k in zip(LEAVES, keys, strict=True)
    }
    return GRUParams(**arrays, **options)


def init_leaf(leaf: Leaf, initializer: Any, key: Any, sizes: Sizes, dtype: Any) -> Any:
    """Draws one leaf of the table, or returns None where these sizes have none."""
    shape = leaf.shape(sizes)
    if shape is None:
        return None
    initializer = check_initializer(leaf, f"{leaf.name}_initializer", initializer)
    return initialize(initializer, key, shape, dtype, leaf.fans)
