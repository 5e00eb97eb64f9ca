"""Checks of option values. Every message says what was expected, what came and what to do."""

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = tuple(map(jnp.dtype, ("float64", "float32", "float16", "bfloat16")))


def choice(option: str, value: Any, names: Collection[str], *, or_callable: bool = False) -> Any:
    """Returns the name in `names` that `value` means, hyphens optional; or the callable itself."""
    if or_callable and callable(value):
        return value
    if isinstance(value, str):
        for name in names:
            if value in (name, name.replace("-", "")):
                return name
    listed = ", ".join(repr(name) for name in names)
    raise ValueError(
        f"{option} must be one of {listed}{' or a function' if or_callable else ''}, got {value!r}."
    )


def output_mode(option: str, value: Any) -> str:
    """Returns "sequence" or "last"."""
    return choice(option, value, ("sequence", "last"))


def implementation(option: str, value: Any) -> str | None:
    """Returns None or the name of an implementation."""
    return None if value is None else choice(option, value, ("scan", "pallas", "parallel"))


def checkpoint(option: str, value: Any) -> int | str | None:
    """Returns None, a positive integer or "sqrt"."""
    if isinstance(value, str):
        return choice(f"{option}, if no positive integer or None,", value, ("sqrt",))
    return None if value is None else positive_int(option, value)


def parallel(unroll: int | None, checkpoint: int | str | None, T: Any) -> None:
    """Refuses what goes with a loop over time, where there is none."""
    for option, value, fine in (("unroll", unroll, (None, 1)), ("checkpoint", checkpoint, (None,))):
        if value not in fine:
            raise ValueError(
                f"{option} must be None for implementation='parallel', which has no loop over "
                f"time, got {value!r}. It belongs to implementation='scan'."
            )
    if not isinstance(T, int):
        raise ValueError(
            "implementation='parallel' needs a fixed number of steps, but the time axis is "
            f"symbolic ({T}): pass implementation='scan'."
        )


@functools.lru_cache(maxsize=64)
def _try_precision(value: Any) -> None:
    matrix = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(functools.partial(jax.lax.dot, precision=value), matrix, matrix)


def precision(option: str, value: Any) -> Any:
    """Returns a precision of matrix products that JAX knows."""
    try:
        _try_precision(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{option} must be None, 'default', 'high', 'highest' or what else "
            f"jax.lax.dot_general takes, got {value!r}."
        ) from None
    return value


def positive_int(option: str, value: Any) -> int:
    """Returns `value` as an int if it is an integer-valued number of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        whole = isinstance(value, float | np.floating) and float(value).is_integer()
        number = int(value) if whole else None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{option} must be a positive integer, got {value!r}.")
    if number < 1:
        raise ValueError(f"{option} must be a positive integer, got {value!r}.")
    return number


def size(option: str, value: Any, default: Any) -> Any:
    """Returns a positive int, or `default` for None and for `default` itself."""
    if value is None or (isinstance(value, str) and value == default):
        return default
    return positive_int(option, value)


def flag(option: str, value: Any) -> bool:
    """Returns `value` as a bool if it is True, False, 1 or 0."""
    if isinstance(value, bool | int | np.bool_ | np.integer) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{option} must be True or False, got {value!r}.")


def factor(option: str, value: Any, *, per_gate: bool) -> float | tuple[float, ...]:
    """Returns a learn-rate or L2 factor as a float or, where allowed, as a triple of floats."""
    allowed = "a nonnegative number" + (
        " or three of them (reset, update, candidate)"
        if per_gate
        else "; a projector serves all three gates, so it takes no triple"
    )
    try:
        numbers = _real(value)
    except (TypeError, ValueError):
        raise TypeError(f"{option} must be {allowed}, got {value!r}.") from None
    shapes = ((), (3,), (1, 3), (3, 1)) if per_gate else ((),)
    if numbers.shape not in shapes or not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise ValueError(f"{option} must be {allowed}, got {value!r}.")
    return tuple(numbers.ravel().tolist()) if numbers.ndim else float(numbers)


def _real(value: Any) -> np.ndarray:
    """The value as an array of float64; texts, booleans and complex numbers are none."""
    array = np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError
    return array.astype(np.float64)


def number(
    option: str, value: Any, *, positive: bool = False, most: float = sys.float_info.max
) -> Any:
    """Returns a number from 0 to `most` as a float, or unseen if a transformation traces it."""
    if isinstance(value, jax.core.Tracer):
        return value
    bound = f" of at most {most:g}" if most < sys.float_info.max else ""
    expected = f"{option} must be a {'positive' if positive else 'nonnegative'} number{bound}"
    try:
        array = _real(value)
        if array.ndim:
            raise TypeError
        result = float(array)
    except (TypeError, ValueError):
        raise TypeError(f"{expected}, got {value!r}.") from None
    if not 0 <= result <= most or (positive and result == 0):
        raise ValueError(f"{expected}, got {value!r}.")
    return result


def static_number(option: str, value: Any) -> float:
    """Returns a positive number that a compiled program is made for."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{option} must be a number that is known when tracing, got {value}.")
    return number(option, value, positive=True)


def rate(option: str, value: Any) -> Any:
    """Returns a nonnegative number, or a schedule of one as it is."""
    return value if callable(value) else number(option, value)


def real_dtype(option: str, dtype: Any) -> jnp.dtype:
    """Returns `dtype` as a NumPy dtype if it is one of `FLOATS`, in the machine's byte order."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{option} must be a floating-point type, got {dtype!r}.") from None
    if dtype not in FLOATS:
        odd = ", in which JAX does not compute" if jnp.issubdtype(dtype, jnp.floating) else ""
        hint = "" if dtype.kind == "c" else "; convert it with .astype('float32')"
        raise TypeError(f"{option} must be of a floating-point type, got {dtype}{odd}{hint}.")
    return dtype


def unmasked(name: str, value: Any) -> None:
    """Refuses a masked array, whose mask nobody would look at."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array, got a masked one: fill it, and pass steps to skip as "
            "mask=."
        )


def initial_state(value: Any, num_hidden_units: int) -> tuple[float, ...] | None:
    """Returns `hidden_state` as a tuple of H floats, or None where it is empty."""
    if value is None:
        return None
    H = num_hidden_units
    expected = f"hidden_state must be {H} finite numbers (num_hidden_units)"
    try:
        numbers = _real(value)
    except (TypeError, ValueError):
        raise TypeError(f"{expected}, got {value!r}.") from None
    if numbers.shape == (0,):
        return None
    if numbers.shape not in ((H,), (H, 1), (1, H)) or not np.isfinite(numbers).all():
        raise ValueError(f"{expected}, got {value!r} of shape {numbers.shape}.")
    return tuple(numbers.ravel().tolist())


def made_by(maker: str, name: str, value: Any, kind: type) -> None:
    """Refuses what is none of the records that a function of this library makes."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must come from {maker}, got {type(value).__name__}.")


def metadata(option: str, value: Any) -> tuple | None:
    """Returns a mapping as a tuple of pairs, which can be hashed."""
    if value is None:
        return None
    try:
        pairs = tuple(sorted(dict(value).items()))
        hash(pairs)
    except (TypeError, ValueError):
        raise TypeError(
            f"{option} must be a mapping from names to hashable values, got {value!r}."
        ) from None
    return pairs


def function(option: str, value: Callable) -> Callable:
    """Returns `value` if it can be a static option: a callable that can be hashed."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{option} must be hashable, because it becomes part of a compiled program's identity; "
            f"got {value!r}. Pass a function defined once."
        ) from None
    return value


def promote(*dtypes: Any) -> jnp.dtype:
    """The common dtype of mixed arguments, also where JAX is set to refuse implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def package(name: str, extra: str, need: str) -> ModuleType:
    """Returns a package or module that `need`, and the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f'{need} the package {package}: pip install "gru_jax[{extra}]".', name=package
        ) from error
