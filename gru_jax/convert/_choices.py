"""What a source can mean: the reset modes it computes, the activation functions it states."""

import contextlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

from gru_jax._params import BEFORE, OPTION_CHECKS

DEFAULTS = {"state_activation_function": "tanh", "gate_activation_function": "sigmoid"}


def index(expected: str, value: Any) -> int:
    """Returns an integer of any type as an int; `expected` begins the message where it is none."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{expected}, got {value!r}.")


def reset_mode(source: str, asked: str | None, known: tuple[str, ...]) -> str:
    """Returns the mode asked for if the source computes it; the first known one if None."""
    if asked is None:
        return known[0]
    mode = OPTION_CHECKS["reset_gate_mode"]("reset_gate_mode", asked)
    if mode not in known:
        raise ValueError(
            f"reset_gate_mode must be {' or '.join(map(repr, known))} here, got {mode!r}: in "
            f"{source} the reset gate acts {'before' if BEFORE in known else 'after'} the product "
            "with the recurrent weights, and the other order is another function."
        )
    return mode


def activations(**asked: str | Callable | None) -> dict[str, Any]:
    """Returns both activation options of a source that states none; None is the usual one."""
    return {option: DEFAULTS[option] if a is None else a for option, a in asked.items()}


def stated_activations(
    source: str, found: Mapping[str, tuple[Any, str | None]], **asked: str | Callable | None
) -> dict[str, Any]:
    """Returns the activation options that an object states, where nobody asks for others.

    Args:
      source: says in messages what to pass where a function is not known here.
      found: for each option the object's function and its name here, None if it has none.
      **asked: the options as the caller gave them.

    Raises:
      ValueError: a function is not known here, or the caller asked for another one.
    """
    for option, (function, name) in found.items():
        if name is None:
            shown = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
            raise ValueError(
                f"{option} must be one of the functions that are known here, and {shown} is none "
                f"of them. If you know it, pass {source} and the function as {option}."
            )
        wanted = asked[option]
        if wanted is not None and OPTION_CHECKS[option](option, wanted) != name:
            raise ValueError(f"{option} must be {name!r}, as the layer has it, got {wanted!r}.")
    return {option: name for option, (_, name) in found.items()}
