"""What all converters share: arrays from anywhere, orders of rows, two biases, refusals."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gru_jax import _arguments, _checks
from gru_jax._params import OPTION_CHECKS, RECURRENT_BIAS, GRUParams

BFLOAT16: type = np.dtype(jnp.bfloat16).type
FLOATS: tuple[type, ...] = tuple(dtype.type for dtype in _checks.FLOATS)


def array(name: str, value: Any, *, ndim: int | None = None) -> np.ndarray:
    """Returns an array of any framework as a NumPy array of its own type, a real float.

    It is a copy: who changes the source later does not change the parameters.

    Args:
      name: what messages call it.
      value: a NumPy, JAX, PyTorch, Keras or Flax array or variable.
      ndim: the number of axes that it must have, any if None.

    Raises:
      TypeError: it is no array, or its numbers are no real floating-point numbers.
      ValueError: it has another number of axes.
    """
    _checks.unmasked(name, value)
    found = _as_numpy(name, value)
    if found.dtype.type not in FLOATS:
        listed = "float64, float32, float16 or bfloat16"
        raise TypeError(f"{name} must be an array of {listed}, got {found.dtype}.")
    if ndim is not None and found.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {found.shape}.")
    return found.astype(found.dtype.type, copy=False)  # in the machine's byte order


def _as_numpy(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a PyTorch tensor
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # exact in float32, and back
            return value.float().numpy().astype(BFLOAT16)
        return value.numpy().copy()
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}.")
    return np.array(value, order="C")


def pick(source: str, arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the named entries of a mapping; `source` says in messages where they come from."""
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"{source} must be a mapping from names to arrays, got {type(arrays).__name__}."
        )
    missing = [name for name in names if name not in arrays]
    if missing:
        found = ", ".join(sorted(map(str, arrays))[:12]) or "nothing"
        raise ValueError(f"{source} must have {', '.join(missing)}; it has {found}.")
    return {name: arrays[name] for name in names}


def check_shape(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the array if it has this shape."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}.")
    return value


def swap(a: np.ndarray, axis: int = 0) -> np.ndarray:
    """Exchanges the first two thirds of an axis: reset, update, candidate to z, r, h and back."""
    first, second, third = np.split(a, 3, axis)
    return np.concatenate((second, first, third), axis)


def negate_update(a: np.ndarray) -> np.ndarray:
    """Negates the rows of the update gate: σ(−v) = 1 − σ(v) lets z take the candidate instead."""
    r, z, n = np.split(a, 3)
    return np.concatenate((r, -z, n))


def build(
    input_weights: np.ndarray,
    recurrent_weights: np.ndarray,
    bias: np.ndarray,
    recurrent_bias: np.ndarray | None,
    reset_gate_mode: str,
    **activations: Any,
) -> GRUParams:
    """Returns parameters in a reset mode, from arrays in our order; checks that they agree.

    Raises:
      ValueError: the mode has no recurrent bias and the one given is not zero, or shapes differ.
    """
    mode = OPTION_CHECKS["reset_gate_mode"]("reset_gate_mode", reset_gate_mode)
    if mode == RECURRENT_BIAS:
        zeros = np.zeros_like(bias)
        bias = np.concatenate((bias, zeros if recurrent_bias is None else recurrent_bias))
    elif recurrent_bias is not None and np.any(recurrent_bias):
        raise ValueError(
            f"reset_gate_mode must be {RECURRENT_BIAS!r} here, got {mode!r}: the recurrent bias "
            "is not zero, and no other mode has one."
        )
    params = GRUParams(input_weights, recurrent_weights, bias, reset_gate_mode=mode, **activations)
    _arguments.sizes_of(params)
    return params


def _expand(small: np.ndarray, projector: np.ndarray | None) -> np.ndarray:
    """W = W' Qᵀ, rounded once; W' itself where there is no projector."""
    if projector is None:
        return small
    with np.errstate(over="ignore", invalid="ignore"):
        W = (small.astype(np.float64) @ projector.astype(np.float64).T).astype(small.dtype)
    return _held("the product of a projector and its weights", W, small, projector)


def add(b: np.ndarray, b_R: np.ndarray) -> np.ndarray:
    """The sum of two biases, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        return _held("the sum of two biases", b + b_R, b, b_R)


def _held(what: str, result: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """The result, unless it overflows: not finite, where its parts are."""
    if not np.isfinite(result).all() and all(np.isfinite(part).all() for part in parts):
        raise ValueError(
            f"{what} must be finite, and is too large for {result.dtype}. Convert the weights to a "
            "type of larger range first."
        )
    return result


class Dense:
    """A GRU without projectors, taken apart for a target; leaves are NumPy arrays.

    `W` (3H, I), `R` (3H, H), `b` (3H,) and `b_R` (3H,), which is None where the mode has none.
    """

    def __init__(self, target: str, params: GRUParams) -> None:
        sizes = _arguments.sizes_of(params)
        self.target, self.params = target, params
        self.H, self.I = sizes.num_hidden_units, sizes.input_size
        self.mode = params.reset_gate_mode
        arrays = {name: array(name, value) for name, value in params.arrays().items()}
        kinds = {value.dtype for value in arrays.values()}
        if len(kinds) > 1:
            listed = ", ".join(f"{name} {a.dtype}" for name, a in arrays.items())
            raise TypeError(f"{target} needs arrays of one floating-point type, got {listed}.")
        self.W = _expand(arrays["input_weights"], arrays.get("input_projector"))
        self.R = _expand(arrays["recurrent_weights"], arrays.get("output_projector"))
        halves = np.split(arrays["bias"], 2) if self.mode == RECURRENT_BIAS else ()
        self.b, self.b_R = halves or (arrays["bias"], None)

    def refuse(self, reason: str) -> ValueError:
        """Returns the error that says why the target cannot hold this GRU."""
        return ValueError(f"{self.target} cannot hold this GRU exactly: {reason}")

    def need_mode(self, *modes: str) -> None:
        """Raises unless the reset mode is one that the target can compute."""
        if self.mode not in modes:
            raise self.refuse(
                f"it computes {' or '.join(map(repr, modes))}, got reset_gate_mode = {self.mode!r}."
            )

    def need_activations(self, state: tuple[str, ...], gate: tuple[str, ...]) -> None:
        """Raises unless the target knows both activation functions."""
        for option, known in (
            ("state_activation_function", state),
            ("gate_activation_function", gate),
        ):
            found = getattr(self.params, option)
            if found not in known:
                raise self.refuse(
                    f"{option} must be {' or '.join(map(repr, known))}, got {found!r}."
                )

    def folded_bias(self, *, fold_biases: bool) -> tuple[np.ndarray, np.ndarray]:
        """The bias of the input product, and that of the candidate's recurrent product, (H,).

        For targets whose reset and update gates have one bias: a second one is zero, or is added
        to the first, which changes a number by one rounding at most.
        """
        if self.b_R is None:
            return self.b, np.zeros_like(self.b[: self.H])
        gates, candidate = self.b_R[: 2 * self.H], self.b_R[2 * self.H :]
        if not np.any(gates):
            return self.b, candidate
        if not fold_biases:
            raise self.refuse(
                "its reset and update gates have one bias, and the recurrent biases of these gates "
                "are not zero. Pass fold_biases=True to add them to the input biases: the same "
                "function, but for one rounding."
            )
        added = add(self.b[: 2 * self.H], gates)
        return np.append(added, self.b[2 * self.H :]), candidate
