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
    """Tries vectors that differ in one element; the derivative rule relies on this."""
    if any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(function)):
        raise ValueError(
            f"{option} must be a function without parameters; {function!r} holds arrays, which "
            "would be neither trained nor kept up to date."
        )
    vectors = ([0.3, -1.2], [0.3, 0.7], [-0.4, -1.2])
    try:
        with jax.ensure_compile_time_eval():
            arguments = [jnp.asarray(vector, jnp.float32) for vector in vectors]
            outs = [function(argument) for argument in arguments]
            jax.jvp(lambda v: function(v), arguments[:1], arguments[:1])
        jax.eval_shape(lambda v: function(v), jax.ShapeDtypeStruct((2,), jnp.float32))
    except Exception as error:
        raise ValueError(
            f"{option} must be a function that JAX can trace and differentiate in forward mode "
            f"(made of jax.numpy, or with jax.custom_jvp); {function!r} raised "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    for out in outs:
        if getattr(out, "shape", None) != (2,) or out.dtype != jnp.float32:
            raise ValueError(
                f"{option} must return an array of its argument's shape and dtype, float32 (2,); "
                f"{function!r} returned {getattr(out, 'dtype', type(out).__name__)} "
                f"{getattr(out, 'shape', '')}."
            )
    base, second, first = (np.asarray(out) for out in outs)
    if not np.array_equal([base[0], base[1]], [second[0], first[1]], equal_nan=True):
        raise ValueError(
            f"{option} must act on each element by itself; in {function!r} one element of the "
            "result depends on another element of the argument."
        )
