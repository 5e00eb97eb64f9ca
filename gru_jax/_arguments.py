"""Checks of the arrays that a GRU is called with, on static shapes, before anything is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gru_jax import _checks
from gru_jax._params import LEAVES, GRUParams, Sizes, wrong_shape


def sizes_of(params: GRUParams) -> Sizes:
    """Returns the sizes of parameters, after checking that all leaves agree with them."""
    if not isinstance(params, GRUParams):
        raise TypeError(
            f"params must be a gru_jax.GRUParams, got {type(params).__name__}. A dict of leaves "
            "becomes one with GRUParams(**leaves, reset_gate_mode=...), a layer with "
            "gru_jax.params_of(layer, leaves), which knows its mode and activation functions."
        )
    for name, value in params.arrays().items():
        _check_array(name, value, 1 if name == "bias" else 2)
    if any(
        value is None for value in (params.input_weights, params.recurrent_weights, params.bias)
    ):
        raise ValueError("params must have input_weights, recurrent_weights and bias.")
    rows = params.recurrent_weights.shape[0]
    if rows % 3 or not rows:
        raise ValueError(
            "recurrent_weights must have 3H rows (reset, update, candidate), got shape "
            f"{params.recurrent_weights.shape}."
        )
    W, Q_i = params.input_weights, params.input_projector
    sizes = Sizes(
        rows // 3,
        W.shape[1] if Q_i is None else Q_i.shape[0],
        None if Q_i is None else Q_i.shape[1],
        None if params.output_projector is None else params.output_projector.shape[1],
        params.reset_gate_mode,
    )
    for leaf in LEAVES:
        expected, value = leaf.shape(sizes), getattr(params, leaf.name)
        if expected is not None and value.shape != expected:
            raise ValueError(wrong_shape(leaf.name, expected, value.shape))
    return sizes


def _check_array(name: str, value: Any, ndim: int) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}.")
    _checks.unmasked(name, value)
    _checks.real_dtype(name, value.dtype)
    if len(value.shape) != ndim:
        raise ValueError(
            f"{name} must have {ndim} {'axis' if ndim == 1 else 'axes'}, got shape {value.shape}. "
            "Stacks of parameters are mapped with jax.vmap."
        )


def check_x(x: Any, sizes: Sizes, *, ndim: int) -> jax.Array:
    """Returns x as an array of at least `ndim` axes whose last one holds the input channels."""
    x = as_floating("x", x)
    if x.ndim < ndim:
        axes = "(*batch, time, channels)" if ndim == 2 else "(*batch, channels)"
        raise ValueError(f"x must have at least {ndim} axes, {axes}, got shape {x.shape}.")
    if x.shape[-1] != sizes.input_size:
        raise ValueError(
            f"x must end in input_size = {sizes.input_size} channels, got shape {x.shape}."
            + _layout_hint(x.shape, sizes.input_size)
        )
    return x


def _layout_hint(shape: tuple, input_size: int) -> str:
    if len(shape) == 3 and shape[1] == input_size:
        return ' Is it channels-first? Pass data_format="BCT" to a layer, or jnp.swapaxes(x, 1, 2).'
    if len(shape) == 3 and shape[0] == input_size:
        return (
            ' Is it MATLAB\'s layout? Pass data_format="CBT" to a layer, or jnp.moveaxis(x, 0, -1).'
        )
    if len(shape) == 2 and shape[0] == input_size:
        return ' Is it channels-first? Pass data_format="CT" to a layer, or x.T.'
    return " The parameters belong to data of another width."


def as_floating(name: str, value: Any) -> jax.Array:
    """Returns `value` as a JAX array of a floating-point type."""
    _checks.unmasked(name, value)
    if hasattr(value, "dtype"):
        _checks.real_dtype(name, value.dtype)
    try:
        array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be an array of a floating-point type, got {type(value).__name__}."
        ) from None
    _checks.real_dtype(name, array.dtype)
    return array


def check_state(name: str, h: Any, batch: tuple, num_hidden_units: int) -> jax.Array:
    """Returns a state as an array of shape (*batch, H); (H,) serves every sequence."""
    h = as_floating(name, h)
    full = (*batch, num_hidden_units)
    if h.shape not in (full, (num_hidden_units,)):
        raise ValueError(
            f"{name} must have shape {full}, one state for each sequence, or "
            f"({num_hidden_units},), one for all; got {h.shape}."
        )
    return jnp.broadcast_to(h, full)


def check_flags(name: str, flags: Any, shape: tuple) -> jax.Array | None:
    """Returns booleans of shape (*batch, time), or None."""
    if flags is None:
        return None
    try:
        flags = jnp.asarray(flags)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of booleans, got {flags!r}.") from None
    if flags.dtype != jnp.bool_:
        raise TypeError(f"{name} must be booleans, got {flags.dtype}; write {name} != 0.")
    if flags.shape != shape:
        raise ValueError(f"{name} must have shape (*batch, time) = {shape}, got {flags.shape}.")
    return flags


def check_lengths(lengths: Any, mask: Any, shape: tuple) -> jax.Array | None:
    """Returns integers of shape (*batch,), or None; their values are checked where concrete."""
    if lengths is None:
        return None
    if mask is not None:
        raise ValueError("lengths and mask exclude each other; got both. Fold one into the other.")
    _checks.unmasked("lengths", lengths)
    if not isinstance(lengths, jax.Array):
        try:
            lengths = np.asarray(lengths)
        except ValueError:
            raise TypeError(f"lengths must be integers, got {lengths!r}.") from None
        lengths = lengths if lengths.size else lengths.astype(np.int32)  # [] is float64
        lengths = lengths.astype(lengths.dtype.newbyteorder("="))
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}.")
    if lengths.shape != shape[:-1]:
        raise ValueError(
            f"lengths must have shape (*batch,) = {shape[:-1]}, got {tuple(lengths.shape)}."
        )
    if _is_concrete(lengths) and isinstance(shape[-1], int):
        values = np.asarray(lengths)
        if values.size and (values.min() < 0 or values.max() > shape[-1]):
            raise ValueError(
                f"lengths must lie in 0..{shape[-1]} (the time axis of x), got {values.min()}.."
                f"{values.max()}."
            )
    return jnp.asarray(lengths)


def _is_concrete(array: Any) -> bool:
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def result_dtypes(*arrays: Any) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the promoted dtype of the arrays, and the state's: the same, at least float32."""
    result = _checks.promote(*(array.dtype for array in arrays))
    return result, _checks.promote(result, jnp.float32)
