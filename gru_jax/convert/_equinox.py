"""Equinox: `eqx.nn.GRUCell`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gru_jax._params import AFTER, RECURRENT_BIAS, GRUParams
from gru_jax.convert._arrays import Dense, array, build, check_shape, pick
from gru_jax.convert._choices import reset_mode

WEIGHTS = ("weight_ih", "weight_hh")
BIASES = ("bias", "bias_n")


def from_equinox(cell: Any, *, reset_gate_mode: str | None = None) -> GRUParams:
    """Reads Equinox's `eqx.nn.GRUCell`.

    The rows are in the same order, and z keeps the old state. It computes the mode
    "recurrent-bias-after-multiplication" with b_Rr = b_Rz = 0, tanh and sigmoid, and
    "after-multiplication" where bias_n is zero::

        weight_ih (3H, I)         input_weights
        weight_hh (3H, H)         recurrent_weights
        bias (3H,), bias_n (H,)   bias (6H,) = [bias; 0; 0; bias_n]

    Args:
      cell: the cell, or a mapping with its four arrays. Both biases are absent, or None, with
        `use_bias=False`; then they are zero.
      reset_gate_mode: None (default) for the recurrent-bias mode, or "after-multiplication", where
        bias_n must be zero.

    Returns:
      The parameters, NumPy arrays of the cell's own type.

    Raises:
      TypeError: `cell` has not these attributes, or they are no floating-point arrays.
      ValueError: an array is missing or of a wrong shape, or the mode is another function.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> convert.from_equinox(convert.to_equinox(params)).bias.shape
      (30,)
    """
    if not isinstance(cell, Mapping):
        if not all(hasattr(cell, name) for name in WEIGHTS + BIASES):
            raise TypeError(
                "cell must be an eqx.nn.GRUCell or a mapping with its arrays, got "
                f"{type(cell).__name__}."
            )
        cell = {name: getattr(cell, name) for name in WEIGHTS + BIASES}
    present = {name: value for name, value in cell.items() if value is not None}
    W, R = (array(n, a, ndim=2) for n, a in pick("cell", present, WEIGHTS).items())
    H = R.shape[1]
    check_shape("weight_hh", R, (3 * H, H))
    check_shape("weight_ih", W, (3 * H, W.shape[1]))
    zeros = np.zeros(3 * H, W.dtype)
    if not any(name in present for name in BIASES):
        present |= {"bias": zeros, "bias_n": zeros[:H]}
    b, b_n = (array(name, value) for name, value in pick("cell", present, BIASES).items())
    check_shape("bias", b, (3 * H,))
    check_shape("bias_n", b_n, (H,))
    b_R = np.concatenate((zeros[: 2 * H], b_n))
    return build(W, R, b, b_R, reset_mode("Equinox", reset_gate_mode, (RECURRENT_BIAS, AFTER)))


def to_equinox(params: GRUParams, *, fold_biases: bool = False) -> dict[str, np.ndarray]:
    """Returns the arrays of Equinox's `eqx.nn.GRUCell`.

    The inverse of `from_equinox`. They replace those of a cell by::

        cell = eqx.nn.GRUCell(I, H, key=jax.random.key(0))
        arrays = {name: jnp.asarray(a) for name, a in convert.to_equinox(params).items()}
        cell = eqx.tree_at(lambda c: [getattr(c, name) for name in arrays], cell,
                           list(arrays.values()))

    Args:
      params: the parameters; projected ones go out as the equal dense ones.
      fold_biases: whether recurrent biases of the reset and update gates, which the cell has not,
        may be added to the input biases: the same function, but for one rounding.

    Returns:
      NumPy arrays weight_ih (3H, I), weight_hh (3H, H), bias (3H,) and bias_n (H,).

    Raises:
      ValueError: the parameters are of the mode "before-multiplication", have recurrent biases of
        the reset and update gates, or activation functions other than tanh and sigmoid.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> {name: array.shape for name, array in convert.to_equinox(params).items()}
      {'weight_ih': (15, 3), 'weight_hh': (15, 5), 'bias': (15,), 'bias_n': (5,)}
    """
    dense = Dense("Equinox", params)
    dense.need_mode(RECURRENT_BIAS, AFTER)
    dense.need_activations(("tanh",), ("sigmoid",))
    b, b_n = dense.folded_bias(fold_biases=fold_biases)
    return {"weight_ih": dense.W, "weight_hh": dense.R, "bias": b, "bias_n": b_n}
