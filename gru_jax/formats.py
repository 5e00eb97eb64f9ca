"""Data formats: which axis of an array is what.

Letters: S spatial, C channel, B batch, T time, U unspecified. The core computes on (*batch, time,
channels); a layer with a `data_format` converts at its two ends:

- all S axes and C become the channels, column-major: the first S fastest, C slowest;
- no C: the S axes are the channels, or one channel where there is no S either; no B: one
  observation, and no B in the output; no T: one time step, and no T in the output;
- output mode "last" removes T; a U axis must have size 1 and is dropped.

"BTC", the default of a layer, also takes any number of leading batch axes, none included.
"""

import math

import jax
import jax.numpy as jnp

from gru_jax import _checks

__all__ = ["channel_axis", "check", "from_core", "output_format", "to_core"]
LETTERS = "SCBTU"


def check(data_format: str) -> str:
    """Returns `data_format` if it is one: the letters S, C, B, T, U, each of C, B, T at most once.

    Args:
      data_format: for example "BTC", "CBT" or "SSCBT", in the order of the axes of an input.

    Returns:
      The same string.

    Raises:
      TypeError: it is no string.
      ValueError: it is empty, holds another letter, or repeats C, B or T.

    Example:
      >>> from gru_jax import formats
      >>> formats.check("SSCBT")
      'SSCBT'
    """
    if not isinstance(data_format, str):
        raise TypeError(f"data_format must be a string such as 'BTC', got {data_format!r}.")
    unknown = set(data_format) - set(LETTERS)
    if unknown or not data_format:
        raise ValueError(
            "data_format must be made of the letters S (spatial), C (channel), B (batch), T (time) "
            f"and U (unspecified), got {data_format!r}."
        )
    repeated = [letter for letter in "CBT" if data_format.count(letter) > 1]
    if repeated:
        raise ValueError(
            f"data_format may hold C, B and T at most once, got {data_format!r}, which repeats "
            f"{', '.join(repeated)}."
        )
    return data_format


def output_format(data_format: str, output_mode: str = "sequence") -> str:
    """Returns the format of a layer's output for an input in `data_format`.

    The letters that survive keep their order; C stands where the first flattened axis stood, or
    first where there was none to flatten.

    Args:
      data_format: format of the input.
      output_mode: "sequence" or "last".

    Returns:
      The letters of the output, in order.

    Raises:
      TypeError: `data_format` is no string.
      ValueError: an argument is none of the valid ones.

    Example:
      >>> from gru_jax import formats
      >>> [formats.output_format(*how) for how in (("SSCBT", "last"), ("BT",), ("BTC",))]
      ['CB', 'CBT', 'BTC']
    """
    check(data_format)
    _checks.output_mode("output_mode", output_mode)
    dropped = "UT" if output_mode == "last" else "U"
    letters = [letter for letter in data_format.replace("S", "C") if letter not in dropped]
    if "C" not in letters:
        letters.insert(0, "C")
    return "".join(dict.fromkeys(letters))


def to_core(x: jax.Array, data_format: str) -> jax.Array:
    """Returns an input as (*batch, time, channels).

    Args:
      x: an array whose axes `data_format` names.
      data_format: the letters of its axes.

    Returns:
      The array, transposed and flattened.

    Raises:
      ValueError: the number of axes differs, or a U axis is larger than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from gru_jax import formats
      >>> formats.to_core(jnp.ones((12, 32, 50)), "CBT").shape
      (32, 50, 12)
    """
    if data_format == "BTC":
        return x
    if x.ndim != len(check(data_format)):
        raise ValueError(
            f"x must have {len(data_format)} axes, one for each letter of data_format "
            f"{data_format!r}, got shape {x.shape}."
        )
    _check_unspecified(x.shape, data_format)
    axes = {letter: _axes(data_format, letter) for letter in LETTERS}
    flattened = axes["C"] + axes["S"][::-1]
    x = jnp.transpose(x, axes["U"] + axes["B"] + axes["T"] + flattened)
    u, b, t = (len(axes[letter]) for letter in "UBT")
    batch, time, rest = x.shape[u : u + b], x.shape[u + b : u + b + t], x.shape[u + b + t :]
    return x.reshape(*batch, *(time or (1,)), math.prod(rest))


def from_core(y: jax.Array, data_format: str, output_mode: str = "sequence") -> jax.Array:
    """Returns an output of the core, (*batch, time, H) or (*batch, H), in the output's format.

    Args:
      y: what the core returned: all steps for "sequence", the final state for "last".
      data_format: format of the input.
      output_mode: "sequence" or "last".

    Returns:
      The array with the axes of `output_format(data_format, output_mode)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from gru_jax import formats
      >>> formats.from_core(jnp.ones((32, 50, 100)), "CBT").shape
      (100, 32, 50)
    """
    target = output_format(data_format, output_mode)
    if data_format == "BTC":
        return y
    if output_mode == "sequence" and "T" not in data_format:
        y = jnp.squeeze(y, axis=-2)
    core = "".join(letter for letter in "BTC" if letter in target)
    return jnp.transpose(y, [core.index(letter) for letter in target])


def channel_axis(data_format: str, output_mode: str = "sequence") -> int:
    """Returns the axis of an output that holds its channels, counted from the end.

    Args:
      data_format: format of the input.
      output_mode: "sequence" or "last".

    Returns:
      A negative axis number.

    Example:
      >>> from gru_jax.formats import channel_axis
      >>> channel_axis("BTC"), channel_axis("CBT"), channel_axis("CBT", "last")
      (-1, -3, -2)
    """
    letters = output_format(data_format, output_mode)
    return letters.index("C") - len(letters)


def _axes(data_format: str, letter: str) -> tuple[int, ...]:
    return tuple(i for i, other in enumerate(data_format) if other == letter)


def _check_unspecified(shape: tuple, data_format: str) -> None:
    for axis in _axes(data_format, "U"):
        if shape[axis] != 1:
            raise ValueError(
                f"a U axis must have size 1, got {shape[axis]} in axis {axis} of shape {shape} "
                f"with data_format {data_format!r}. Name the axis S to make it channels."
            )
