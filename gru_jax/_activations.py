"""The activation functions of the pages, by name, and what any other callable must satisfy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gru_jax import _checks


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """0 if x < −2.5, 1 if x > 2.5, else 0.2·x + 0.5; `jax.nn.hard_sigmoid` is another one."""
    return jnp.clip(0.2 * x + 0.5, 0.0, 1.0)


STATE: dict[str, Callable] = {"tanh": jnp.tanh, "softsign": jax.nn.soft_sign}
GATE: dict[str, Callable] = {"sigmoid": jax.nn.sigmoid, "hard-sigmoid": hard_sigmoid}


def state_function(value: str | Callable) -> Callable:
    """σ_s of a stored `state_activation_function`."""
    return STATE[value] if isinstance(value, str) else value


def gate_function(value: str | Callable) -> Callable:
    """σ_g of a stored `gate_activation_function`."""
    return GATE[value] if isinstance(value, str) else value


def check(option: str, value: str | Callable, names: dict[str, Callable]) -> str | Callable:
    """Returns the stored form of an activation function: a name, or an elementwise callable."""
    value = _checks.choice(option, value, names, or_callable=True)
    if not isinstance(value, str):
        _check_elementwise(option, _checks.function(option, value))
    return value


@functools.lru_cache(maxsize=256)
def _check_elementwise(option: str, function: Callable) -> None:
    """Tries two vectors that differ in one element; the derivative rule relies on this."""
    with jax.ensure_compile_time_eval():
        one, other = (function(jnp.asarray(v, jnp.float32)) for v in ([0.3, -1.2], [0.3, 0.7]))
    for out in (one, other):
        if getattr(out, "shape", None) != (2,) or out.dtype != jnp.float32:
            raise ValueError(
                f"{option} must return an array of its argument's shape and dtype, float32 (2,); "
                f"{function!r} returned {getattr(out, 'dtype', type(out).__name__)} "
                f"{getattr(out, 'shape', '')}."
            )
    if not np.array_equal(one[0], other[0], equal_nan=True):
        raise ValueError(
            f"{option} must act on each element by itself; in {function!r} one element of the "
            "result depends on another element of the argument."
        )
