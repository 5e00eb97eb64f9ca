"""Keras: `GRU` and `GRUCell`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gru_jax._params import AFTER, BEFORE, RECURRENT_BIAS, GRUParams
from gru_jax.convert._arrays import Dense, array, build, check_shape, swap
from gru_jax.convert._choices import activations, reset_mode, stated_activations

NAMES = ("kernel", "recurrent_kernel", "bias")
KNOWN = {  # by Keras's names; its hard_sigmoid is relu6(x + 3)/6, another function than ours
    "state_activation_function": ("activation", ("tanh", "softsign")),
    "gate_activation_function": ("recurrent_activation", ("sigmoid",)),
}


def from_keras(
    weights: Any,
    *,
    reset_gate_mode: str | None = None,
    state_activation_function: str | Callable | None = None,
    gate_activation_function: str | Callable | None = None,
) -> GRUParams:
    """Reads a Keras `GRU` or `GRUCell`, or what its `get_weights()` returns.

    Keras has the gates in the order z, r, h, and transposed matrices; its z keeps the old state
    too. The bias says which function it is::

        reset_after=True (Keras's default)   bias (2, 3H)   recurrent-bias-after-multiplication;
                                                            after-multiplication if bias[1] is 0
        reset_after=False                    bias (3H,)     before-multiplication

    Of a `Bidirectional` layer pass `forward_layer` and `backward_layer`, one by one. A layer with
    `go_backwards=True` is `gru_jax.gru(..., reverse=True)`, but for the order of the outputs: Keras
    returns them as they were computed, last step of the input first.

    Args:
      weights: the list [kernel (I, 3H), recurrent_kernel (H, 3H), bias], without the bias if
        `use_bias=False`; or the layer.
      reset_gate_mode: None (default) for the mode above; "after-multiplication" drops a bias[1]
        that is zero. Two arrays without a layer do not tell: there it must be given.
      state_activation_function: Keras's `activation`; "tanh" if None. A layer states it itself.
      gate_activation_function: Keras's `recurrent_activation`; "sigmoid" if None. A layer states
        it itself. Keras 3's "hard_sigmoid" is `jax.nn.hard_sigmoid`, Keras 2's "hard-sigmoid".

    Returns:
      The parameters, NumPy arrays of the weights' own type.

    Raises:
      TypeError: `weights` are no list of floating-point arrays, and no layer that has one.
      ValueError: the number or a shape of the arrays is wrong, the mode is another function or must
        be given, or the layer has an activation function that is not known here.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(
      ...     jax.random.key(0), 5, 3, reset_gate_mode="before-multiplication")
      >>> kernel, recurrent_kernel, bias = convert.to_keras(params)
      >>> kernel.shape, bias.shape
      ((3, 15), (15,))
      >>> convert.from_keras([kernel, recurrent_kernel, bias]).reset_gate_mode
      'before-multiplication'
    """
    asked = {
        "state_activation_function": state_activation_function,
        "gate_activation_function": gate_activation_function,
    }
    if hasattr(weights, "get_weights"):
        weights, reset_after, options = _read_layer(weights, asked)
    else:
        reset_after, options = None, activations(**asked)
    kernel, recurrent_kernel, bias = _read_arrays(weights)
    if reset_after is None and bias is not None:
        reset_after = bias.ndim == 2
    if reset_after is None and reset_gate_mode is None:
        raise ValueError(
            "reset_gate_mode must be given for weights without a bias: "
            f"{AFTER!r} for reset_after=True, {BEFORE!r} for reset_after=False."
        )
    known = {None: (AFTER, RECURRENT_BIAS, BEFORE), True: (RECURRENT_BIAS, AFTER), False: (BEFORE,)}
    mode = reset_mode("this layer", reset_gate_mode, known[reset_after])
    if bias is None:
        bias = np.zeros(kernel.shape[1], kernel.dtype)
    b, b_R = swap(bias, -1) if bias.ndim == 2 else (swap(bias), None)
    return build(swap(kernel.T), swap(recurrent_kernel.T), b, b_R, mode, **options)


def to_keras(params: GRUParams) -> list[np.ndarray]:
    """Returns the weights of a Keras `GRU` or `GRUCell`, in the order of `get_weights()`.

    The inverse of `from_keras`. The mode says how the layer is to be made::

        before-multiplication    keras.layers.GRU(H, reset_after=False, ...)
        the other two            keras.layers.GRU(H, reset_after=True, ...)

    with `activation=params.state_activation_function`; in mode "after-multiplication" the recurrent
    half of the bias is zero. Once built, for example by `layer.build((None, None, I))`, the layer
    takes them by `layer.set_weights(...)`. A `Bidirectional` layer takes two such lists, joined:
    `set_weights(to_keras(forward) + to_keras(backward))`.

    Args:
      params: the parameters; projected ones go out as the equal dense ones.

    Returns:
      [kernel (I, 3H), recurrent_kernel (H, 3H), bias (2, 3H)], the bias (3H,) in mode
      "before-multiplication"; gates in the order z, r, h.

    Raises:
      ValueError: an activation function is none that Keras has: tanh or softsign, and sigmoid.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> [array.shape for array in convert.to_keras(params)]
      [(3, 15), (5, 15), (2, 15)]
    """
    dense = Dense("Keras", params)
    if params.gate_activation_function == "hard-sigmoid":
        raise dense.refuse(
            "its hard_sigmoid is relu6(x + 3)/6, and 'hard-sigmoid' is clip(0.2·x + 0.5, 0, 1). "
            "Give the layer recurrent_activation=lambda x: keras.ops.clip(0.2 * x + 0.5, 0, 1) and "
            "the weights of params.replace(gate_activation_function='sigmoid')."
        )
    dense.need_activations(("tanh", "softsign"), ("sigmoid",))
    bias = swap(dense.b)
    if dense.mode != BEFORE:
        bias = np.stack((bias, np.zeros_like(bias) if dense.b_R is None else swap(dense.b_R)))
    return [swap(dense.W).T, swap(dense.R).T, bias]


def _read_layer(layer: Any, asked: dict[str, Any]) -> tuple[list, bool, dict[str, Any]]:
    """The weights of a layer object, its `reset_after`, and the activation options."""
    cell = getattr(layer, "cell", layer)  # of a GRU, or of an RNN around a GRUCell
    if not hasattr(cell, "reset_after"):
        raise TypeError(
            f"weights must be of a Keras GRU or GRUCell, got {type(layer).__name__}. Of a "
            "Bidirectional layer pass forward_layer and backward_layer, one by one."
        )
    found = {}
    for option, (attribute, names) in KNOWN.items():
        function = getattr(cell, attribute)
        name, module = (getattr(function, at, "") for at in ("__name__", "__module__"))
        is_known = name in names and module.split(".")[0] in ("keras", "tf_keras")
        found[option] = (function, name if is_known else None)
    options = stated_activations("layer.get_weights()", found, **asked)
    return layer.get_weights(), bool(cell.reset_after), options


def _read_arrays(weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The kernel, the recurrent kernel and the bias, None if there is none."""
    if not isinstance(weights, list | tuple):
        raise TypeError(
            "weights must be a Keras layer or the list of arrays that its get_weights() returns, "
            f"got {type(weights).__name__}."
        )
    if len(weights) not in (2, 3):
        raise ValueError(
            f"weights must be [{', '.join(NAMES)}], without the bias if use_bias=False; got "
            f"{len(weights)} arrays. A layer has none before it is built."
        )
    kernel, recurrent_kernel = (
        array(name, value, ndim=2) for name, value in zip(NAMES[:2], weights[:2], strict=True)
    )
    bias = array(NAMES[2], weights[2]) if len(weights) == 3 else None
    H = recurrent_kernel.shape[0]
    check_shape(NAMES[0], kernel, (kernel.shape[0], 3 * H))
    check_shape(NAMES[1], recurrent_kernel, (H, 3 * H))
    if bias is not None and bias.shape not in ((2, 3 * H), (3 * H,)):
        raise ValueError(f"bias must have shape {(2, 3 * H)} or {(3 * H,)}, got {bias.shape}.")
    return kernel, recurrent_kernel, bias
