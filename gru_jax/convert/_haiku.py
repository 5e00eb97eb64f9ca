"""Haiku: `hk.GRU`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gru_jax._params import BEFORE, GRUParams
from gru_jax.convert._arrays import Dense, array, build, check_shape, negate_update, pick, swap

NAMES = ("w_i", "w_h", "b")


def from_haiku(params: Mapping[str, Any]) -> GRUParams:
    """Reads the parameters of Haiku's `hk.GRU`, which computes "before-multiplication".

    Haiku has the gates in the order z, r, a and transposed matrices, and its z takes the candidate
    where ours keeps the old state: 1 − σ(v) = σ(−v), so the rows of z change their sign::

        w_i (I, 3H)   input_weights
        w_h (H, 3H)   recurrent_weights
        b (3H,)       bias

    Args:
      params: {"w_i": ..., "w_h": ..., "b": ...}, alone or as the only module of a Haiku tree,
        {"gru": {...}}.

    Returns:
      The parameters, NumPy arrays of the same type.

    Raises:
      TypeError: `params` is no mapping to floating-point arrays.
      ValueError: an array is missing or of a wrong shape.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(
      ...     jax.random.key(0), 5, 3, reset_gate_mode="before-multiplication")
      >>> again = convert.from_haiku({"gru": convert.to_haiku(params)})
      >>> again.reset_gate_mode, bool((again.input_weights == params.input_weights).all())
      ('before-multiplication', True)
    """
    if isinstance(params, Mapping) and len(params) == 1:
        (module,) = params.values()
        params = module if isinstance(module, Mapping) else params
    found = pick("params", params, NAMES)
    w_i, w_h = (array(name, found[name], ndim=2) for name in NAMES[:2])
    H = w_h.shape[0]
    check_shape("w_h", w_h, (H, 3 * H))
    check_shape("w_i", w_i, (w_i.shape[0], 3 * H))
    b = check_shape("b", array("b", found["b"]), (3 * H,))
    W, R, b = (negate_update(swap(a)) for a in (w_i.T, w_h.T, b))
    return build(W, R, b, None, BEFORE)


def to_haiku(params: GRUParams) -> dict[str, np.ndarray]:
    """Returns the parameters of Haiku's `hk.GRU`.

    The inverse of `from_haiku`. In a tree they stand under the name of the module::

        gru = hk.without_apply_rng(hk.transform(lambda x, h: hk.GRU(H)(x, h)))
        y, hidden = gru.apply({"gru": convert.to_haiku(params)}, x, h)

    Args:
      params: the parameters; projected ones go out as the equal dense ones.

    Returns:
      NumPy arrays w_i (I, 3H), w_h (H, 3H) and b (3H,); gates in the order z, r, a.

    Raises:
      ValueError: the parameters are not of the mode "before-multiplication", or have activation
        functions other than tanh and sigmoid.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(
      ...     jax.random.key(0), 5, 3, reset_gate_mode="before-multiplication")
      >>> {name: array.shape for name, array in convert.to_haiku(params).items()}
      {'w_i': (3, 15), 'w_h': (5, 15), 'b': (15,)}
    """
    dense = Dense("Haiku", params)
    dense.need_mode(BEFORE)
    dense.need_activations(("tanh",), ("sigmoid",))
    w_i, w_h, b = (swap(negate_update(a)).T for a in (dense.W, dense.R, dense.b))
    return {"w_i": w_i, "w_h": w_h, "b": b}
