"""Flax: `GRUCell` of linen and of nnx."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gru_jax import _activations, _checks
from gru_jax._params import AFTER, RECURRENT_BIAS, GRUParams
from gru_jax.convert._arrays import Dense, array, build, check_shape, pick
from gru_jax.convert._choices import activations, reset_mode, stated_activations

GATES = "rzn"  # in linen's names: "ir" is the dense layer from the input to the reset gate
PARTS = ("dense_i", "dense_h", "gate_fn", "activation_fn")  # what an nnx.GRUCell has


def from_flax(
    cell: Any,
    *,
    reset_gate_mode: str | None = None,
    state_activation_function: str | Callable | None = None,
    gate_activation_function: str | Callable | None = None,
) -> GRUParams:
    """Reads Flax's `GRUCell`, of linen or of nnx.

    Both have the gates in the order r, z, n and transposed matrices; z keeps the old state. They
    are two functions, for nnx has no bias beside the candidate's recurrent product::

        linen   six dense layers; biases in ir, iz, in and hn
                recurrent-bias-after-multiplication, b_Rr = b_Rz = 0;
                after-multiplication if the bias of hn is 0
        nnx     dense_i, dense_h, three gates in each; a bias in dense_i
                after-multiplication

    Args:
      cell: of linen the cell's `params`, {"ir": {"kernel": (I, H), "bias": (H,)}, ...}; of nnx the
        cell, its `nnx.state` or the pure dict of it, {"dense_i": {"kernel": (I, 3H), "bias":
        (3H,)}, "dense_h": {"kernel": (H, 3H)}}.
      reset_gate_mode: None (default) for the recurrent-bias mode of linen and for
        "after-multiplication" of nnx; or the other one of these two.
      state_activation_function: the cell's `activation_fn`; "tanh" if None. An nnx cell, unlike its
        arrays, states it itself.
      gate_activation_function: the cell's `gate_fn`; "sigmoid" if None. As above.

    Returns:
      The parameters, NumPy arrays of the cell's own type.

    Raises:
      TypeError: `cell` is neither an nnx.GRUCell nor a mapping to floating-point arrays.
      ValueError: an array is missing, too many or of a wrong shape, the mode is another function,
        or an nnx cell has an activation function that is not known here.

    Example:
      >>> import gru_jax
      >>> from flax import nnx
      >>> from gru_jax import convert
      >>> params = convert.from_flax(nnx.GRUCell(3, 5, rngs=nnx.Rngs(0)))
      >>> params.input_weights.shape, params.reset_gate_mode
      ((15, 3), 'after-multiplication')
    """
    asked = {
        "state_activation_function": state_activation_function,
        "gate_activation_function": gate_activation_function,
    }
    if isinstance(cell, Mapping):
        options = activations(**asked)
    else:
        cell, options = _read_module(cell, asked)
    cell = cell.get("params", cell)
    if "dense_i" in cell:
        W, R, b, b_R = _read_nnx(cell)
        known = (AFTER, RECURRENT_BIAS)
    else:
        W, R, b, b_R = _read_linen(cell)
        known = (RECURRENT_BIAS, AFTER)
    return build(W, R, b, b_R, reset_mode("Flax", reset_gate_mode, known), **options)


def to_flax(
    params: GRUParams, *, api: str = "linen", fold_biases: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays of Flax's `GRUCell`, of linen or of nnx.

    The inverse of `from_flax`, for cells with the same functions::

        tanh       activation_fn=jnp.tanh             (Flax's default)
        softsign   activation_fn=jax.nn.soft_sign
        sigmoid    gate_fn=jax.nn.sigmoid             (Flax's default)
        hard-sigmoid   gate_fn=lambda x: jnp.clip(0.2 * x + 0.5, 0, 1); jax.nn.hard_sigmoid is
                       another function

    Args:
      params: the parameters; projected ones go out as the equal dense ones.
      api: "linen" (default) or "nnx".
      fold_biases: whether recurrent biases of the reset and update gates, which neither cell has,
        may be added to the input biases: the same function, but for one rounding.

    Returns:
      NumPy arrays in a nested dict, as `from_flax` takes it.

    Raises:
      ValueError: the parameters are of the mode "before-multiplication", have a recurrent bias that
        the cell cannot hold, or an activation function without a name.

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> from flax import linen, nnx
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> h, x = jnp.zeros((2, 5)), jnp.ones((2, 3))
      >>> cell = nnx.GRUCell(3, 5, rngs=nnx.Rngs(0))
      >>> arrays = convert.to_flax(params, api="nnx")
      >>> nnx.update(cell, jax.tree.map(jnp.asarray, arrays))
      >>> bool(jnp.allclose(cell(h, x)[0], gru_jax.gru_cell(params, h, x), atol=1e-6))
      True
      >>> linen.GRUCell(5).apply({"params": convert.to_flax(params)}, h, x)[0].shape
      (2, 5)
    """
    api = _checks.choice("api", api, ("linen", "nnx"))
    dense = Dense(f"Flax's {api}.GRUCell", params)
    dense.need_mode(AFTER, RECURRENT_BIAS)
    dense.need_activations(tuple(_activations.STATE), tuple(_activations.GATE))
    if api == "nnx" and dense.b_R is not None and np.any(dense.b_R[2 * dense.H :]):
        raise dense.refuse(
            "it has no bias beside the candidate's recurrent product, and the recurrent bias "
            "of the candidate is not zero. The cell of linen has one: api='linen'."
        )
    b, b_n = dense.folded_bias(fold_biases=fold_biases)
    if api == "nnx":
        return {"dense_i": {"kernel": dense.W.T, "bias": b}, "dense_h": {"kernel": dense.R.T}}
    cell = {}
    for n, gate in enumerate(GATES):
        rows = slice(n * dense.H, (n + 1) * dense.H)
        cell[f"i{gate}"] = {"kernel": dense.W[rows].T, "bias": b[rows]}
        cell[f"h{gate}"] = {"kernel": dense.R[rows].T}
    cell["hn"]["bias"] = b_n
    return cell


def _read_module(cell: Any, asked: dict[str, Any]) -> tuple[Mapping, dict[str, Any]]:
    """The arrays of an nnx.GRUCell, and the activation options."""
    if not all(hasattr(cell, part) for part in PARTS):
        raise TypeError(
            "cell must be the params of a linen.GRUCell, an nnx.GRUCell or its state, got "
            f"{type(cell).__name__}. Of an nnx.RNN pass its cell."
        )
    found = {
        option: (function, next((name for name, ours in names.items() if ours is function), None))
        for option, function, names in (
            ("state_activation_function", cell.activation_fn, _activations.STATE),
            ("gate_activation_function", cell.gate_fn, _activations.GATE),
        )
    }
    options = stated_activations("nnx.state(cell)", found, **asked)
    arrays = {
        name: {"kernel": dense.kernel} | ({} if dense.bias is None else {"bias": dense.bias})
        for name, dense in (("dense_i", cell.dense_i), ("dense_h", cell.dense_h))
    }
    return arrays, options


def _read_nnx(cell: Mapping) -> tuple[np.ndarray, ...]:
    """W, R, b and a recurrent bias of zeros."""
    kernel, b = _read_dense(cell, "dense_i", "kernel", "bias")
    (recurrent_kernel,) = _read_dense(cell, "dense_h", "kernel")
    H = recurrent_kernel.shape[0]
    check_shape("the kernel of dense_h", recurrent_kernel, (H, 3 * H))
    check_shape("the kernel of dense_i", kernel, (kernel.shape[0], 3 * H))
    check_shape("the bias of dense_i", b, (3 * H,))
    return kernel.T, recurrent_kernel.T, b, np.zeros_like(b)


def _read_linen(cell: Mapping) -> tuple[np.ndarray, ...]:
    """W, R, b and the recurrent bias, which is that of the candidate alone."""
    pick("cell", cell, tuple(f"{side}{gate}" for side in "ih" for gate in GATES))
    inputs = [_read_dense(cell, f"i{gate}", "kernel", "bias") for gate in GATES]
    (R_r,), (R_z,) = (_read_dense(cell, f"h{gate}", "kernel") for gate in GATES[:2])
    R_n, b_n = _read_dense(cell, "hn", "kernel", "bias")
    H, input_size = R_n.shape[0], inputs[0][0].shape[0]
    for gate, (kernel, bias), recurrent in zip(GATES, inputs, (R_r, R_z, R_n), strict=True):
        check_shape(f"the kernel of i{gate}", kernel, (input_size, H))
        check_shape(f"the bias of i{gate}", bias, (H,))
        check_shape(f"the kernel of h{gate}", recurrent, (H, H))
    check_shape("the bias of hn", b_n, (H,))
    W, b = (np.concatenate([part.T for part in parts]) for parts in zip(*inputs, strict=True))
    R = np.concatenate((R_r.T, R_z.T, R_n.T))
    return W, R, b, np.concatenate((np.zeros_like(b[: 2 * H]), b_n))


def _read_dense(cell: Mapping, name: str, *names: str) -> list[np.ndarray]:
    """The named arrays of a dense layer, which must have no others."""
    layer = pick("cell", cell, (name,))[name]
    arrays = pick(name, layer, names)
    if others := sorted(set(layer) - set(names)):
        raise ValueError(
            f"{name} must have only {' and '.join(names)} in a GRUCell, got {', '.join(others)}."
        )
    axes = {"kernel": 2, "bias": 1}
    return [array(f"the {n} of {name}", a, ndim=axes[n]) for n, a in arrays.items()]
