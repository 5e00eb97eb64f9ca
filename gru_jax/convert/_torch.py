"""PyTorch: `nn.GRU` and `nn.GRUCell`."""

import os
from typing import Any

import numpy as np

from gru_jax import _checks
from gru_jax._params import AFTER, RECURRENT_BIAS, GRUParams
from gru_jax.convert._arrays import Dense, array, build, check_shape, pick
from gru_jax.convert._choices import index, reset_mode


def from_torch(
    state_dict: Any,
    *,
    layer: int | None = 0,
    reverse: bool = False,
    prefix: str = "",
    reset_gate_mode: str | None = None,
) -> GRUParams:
    """Reads one layer and direction of PyTorch's `nn.GRU`, or an `nn.GRUCell`.

    The rows are in the same order, and z keeps the old state::

        weight_ih (3H, I)         input_weights
        weight_hh (3H, H)         recurrent_weights
        bias_ih, bias_hh (3H,)    bias (6H,) = [bias_ih; bias_hh]

    PyTorch computes the mode "recurrent-bias-after-multiplication", with tanh and sigmoid, and
    "after-multiplication" where bias_hh is zero. Without biases (`bias=False`) they are zero.

    Args:
      state_dict: of a module, or the module. Files are loaded by
        `torch.load(path, weights_only=True)`.
      layer: the number of the layer, 0 (default) for the first; None for an `nn.GRUCell`.
      reverse: whether to read the backward direction; the parameters go to
        `gru_jax.gru(..., reverse=True)`.
      prefix: what the names begin with, for example "encoder.gru.".
      reset_gate_mode: None (default) for the recurrent-bias mode, or "after-multiplication", where
        bias_hh must be zero.

    Returns:
      The parameters, NumPy arrays of the tensors' own type.

    Raises:
      TypeError: `state_dict` is no mapping from names to floating-point arrays.
      ValueError: an array is missing or of a wrong shape, or the mode is another function.

    Example:
      A stack of layers, layer by layer. Here NumPy arrays play the part of the tensors.

      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> first = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> second = gru_jax.init_params(jax.random.key(1), 5, 5)
      >>> state_dict = convert.to_torch(first) | convert.to_torch(second, layer=1)
      >>> layers = [convert.from_torch(state_dict, layer=n) for n in range(2)]
      >>> layers[1].bias.shape, layers[1].reset_gate_mode
      ((30,), 'recurrent-bias-after-multiplication')
    """
    if hasattr(state_dict, "state_dict"):
        state_dict = state_dict.state_dict()
    if isinstance(state_dict, str | bytes | bytearray | os.PathLike) or hasattr(state_dict, "read"):
        raise TypeError(
            f"state_dict must be a state dict, got {type(state_dict).__name__}: files are not "
            "opened here, because unpickling can run code. Pass torch.load(path, weights_only=True)"
        )
    W_name, R_name, *bias_names = _names(layer, reverse, prefix)
    W, R = pick("state_dict", state_dict, (W_name, R_name)).values()
    if (projection := R_name.replace("weight_hh", "weight_hr")) in state_dict:
        raise ValueError(f"state_dict must be a GRU's, got {projection}, which only an LSTM has.")

    W, R = array(W_name, W, ndim=2), array(R_name, R, ndim=2)
    H = R.shape[1]
    check_shape(R_name, R, (3 * H, H))
    check_shape(W_name, W, (3 * H, W.shape[1]))
    b = b_R = np.zeros(3 * H, W.dtype)
    if any(name in state_dict for name in bias_names):
        biases = pick("state_dict", state_dict, tuple(bias_names))
        b, b_R = (check_shape(n, array(n, bias), (3 * H,)) for n, bias in biases.items())
    mode = reset_mode("PyTorch", reset_gate_mode, (RECURRENT_BIAS, AFTER))
    return build(W, R, b, b_R, mode)


def to_torch(
    params: GRUParams, *, layer: int | None = 0, reverse: bool = False, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Returns the entries of a PyTorch state dict for one layer and direction.

    The inverse of `from_torch`; bias_hh is zero in mode "after-multiplication". The entries of
    several layers and directions are merged into one state dict by `|`. They are loaded by::

        gru = torch.nn.GRU(I, H, num_layers, bidirectional=..., batch_first=True)
        gru.load_state_dict({name: torch.tensor(a) for name, a in entries.items()})

    (of bfloat16 arrays `torch.tensor(a.astype("float32"))`; the module has its own type).

    Args:
      params: the parameters; projected ones go out as the equal dense ones.
      layer: the number of the layer, 0 (default) for the first; None for an `nn.GRUCell`.
      reverse: whether it is the backward direction.
      prefix: what the names begin with, for example "encoder.gru.".

    Returns:
      NumPy arrays weight_ih (3H, I), weight_hh (3H, H), bias_ih and bias_hh (3H,), under the names
      of that layer and direction.

    Raises:
      ValueError: the parameters are of the mode "before-multiplication", or have activation
        functions other than tanh and sigmoid.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> forward, backward = (
      ...     gru_jax.init_params(jax.random.key(n), 5, 3) for n in range(2))
      >>> entries = convert.to_torch(forward) | convert.to_torch(backward, reverse=True)
      >>> entries["weight_ih_l0_reverse"].shape
      (15, 3)
    """
    dense = Dense("PyTorch", params)
    dense.need_mode(RECURRENT_BIAS, AFTER)
    dense.need_activations(("tanh",), ("sigmoid",))
    b_R = np.zeros_like(dense.b) if dense.b_R is None else dense.b_R
    arrays = (dense.W, dense.R, dense.b, b_R)
    return dict(zip(_names(layer, reverse, prefix), arrays, strict=True))


def _names(layer: int | None, reverse: bool, prefix: str) -> tuple[str, ...]:
    """The names of W, R, b and b_R."""
    if layer is not None:
        layer = index("layer must be an integer, or None for an nn.GRUCell", layer)
    reverse = _checks.flag("reverse", reverse)
    if layer is None and reverse:
        raise ValueError("reverse must be False with layer=None: an nn.GRUCell has no direction.")
    if layer is not None and layer < 0:
        raise ValueError(f"layer must be 0 for the first layer, 1 for the next, got {layer}.")
    end = "" if layer is None else f"_l{layer}{'_reverse' if reverse else ''}"
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(f"{prefix}{kind}{end}" for kind in kinds)
