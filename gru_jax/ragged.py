"""Sequences of different lengths, and long ones: padding, buckets and chunks.

Small pure functions for the host's side of training, on NumPy arrays; `chunks` also on JAX arrays.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gru_jax import _arguments, _checks

__all__ = ["buckets", "chunks", "pad"]
SIDES = ("right", "left")


def pad(
    arrays: Iterable[Any], side: str = "right", *, length: int | None = None, value: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Puts sequences of different lengths into one array.

    Args:
      arrays: sequences of shape (time, *features), with the same features and the same type.
      side: where the padding goes, "right" (default) or "left".
      length: the padded length; that of the longest sequence if None. Every new length compiles
        anew, so a few fixed ones are quicker to train with.
      value: the padding value. With `lengths` or `mask` a GRU never looks at it.

    Returns:
      (x, lengths) with x of shape (batch, time, *features) and lengths (batch,) of int32; with
      side="left" (x, mask) with booleans (batch, time), False in the padding.

    Raises:
      TypeError: `length` is no integer.
      ValueError: no sequence is given, features or types differ, `side` is unknown, or a sequence
        is longer than `length`.

    Example:
      >>> import numpy as np
      >>> from gru_jax import ragged
      >>> x, lengths = ragged.pad([np.ones((4, 12)), np.ones((7, 12))])
      >>> x.shape, lengths.tolist()
      ((2, 7, 12), [4, 7])
    """
    side = _checks.choice("side", side, SIDES)
    sequences = [np.asarray(array) for array in arrays]
    if not sequences:
        raise ValueError("arrays must hold at least one sequence, got none.")
    first = sequences[0]
    for n, sequence in enumerate(sequences):
        if not sequence.ndim or sequence.shape[1:] != first.shape[1:]:
            raise ValueError(
                "arrays must all have shape (time, *features) with the same features, got "
                f"{first.shape} first and {sequence.shape} at index {n}."
            )
        if sequence.dtype != first.dtype:
            raise ValueError(
                f"arrays must all have the same type, got {first.dtype} first and {sequence.dtype} "
                f"at index {n}."
            )
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    steps = int(lengths.max()) if length is None else _checks.positive_int("length", length)
    if lengths.max() > steps:
        raise ValueError(
            f"length must be at least {lengths.max()}, the longest sequence's, got {length}; cut "
            "long sequences with gru_jax.ragged.chunks."
        )
    with np.errstate(invalid="ignore"):
        held = np.asarray(value).astype(first.dtype)
    if first.dtype.kind in "biu" and held != value:
        raise ValueError(f"value must be one that {first.dtype} can hold, got {value!r}.")
    x = np.full((len(sequences), steps, *first.shape[1:]), value, first.dtype)
    starts = steps - lengths if side == "left" else np.zeros_like(lengths)
    for row, start, sequence in zip(x, starts, sequences, strict=True):
        row[start : start + len(sequence)] = sequence
    return (x, np.arange(steps) >= starts[:, None]) if side == "left" else (x, lengths)


def buckets(lengths: Any, batch_size: int, max_waste: float = 0.1) -> list[np.ndarray]:
    """Groups sequences of similar lengths into batches, with little padding in each.

    In the order of their lengths, sequences are cut into the fewest batches that keep to the two
    limits, and of these into those with the least padding.

    Args:
      lengths: integers (sequences,).
      batch_size: the most sequences in a batch.
      max_waste: the largest part of a batch's steps that may be padding, 0 to 1.

    Returns:
      For each batch the indices of its sequences, shortest batches first. Every sequence is in one
      of them. Shuffle the list, not the batches.

    Raises:
      TypeError: `lengths` or `batch_size` are no integers, or `max_waste` is no number.
      ValueError: `lengths` is no vector of nonnegative numbers, or a limit is outside its range.

    Example:
      >>> from gru_jax import ragged
      >>> [batch.tolist() for batch in ragged.buckets([7, 29, 8, 7, 27], batch_size=3)]
      [[0, 3, 2], [4, 1]]
    """
    lengths = np.asarray(lengths)
    if lengths.size and not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}.")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError(f"lengths must be a vector of nonnegative integers, got {lengths}.")
    batch_size = _checks.positive_int("batch_size", batch_size)
    max_waste = _checks.number("max_waste", max_waste, most=1.0)

    order = np.argsort(lengths, kind="stable")
    longest = lengths[order].astype(np.int64)
    total = np.concatenate([[0], np.cumsum(longest)])
    one_batch = len(order) * int(longest.max(initial=0)) + 1  # outweighs all padding
    cost, cut = np.zeros(len(order) + 1, np.int64), np.zeros(len(order) + 1, np.int64)
    for end in range(1, len(order) + 1):  # the best way to batch the first `end` sequences
        starts = np.arange(max(end - batch_size, 0), end)
        steps = (end - starts) * longest[end - 1]
        padding = steps - (total[end] - total[starts])
        allowed = padding <= max_waste * steps + 1e-9
        costs = np.where(allowed, cost[starts] + one_batch + padding, np.iinfo(np.int64).max)
        best = int(costs.argmin())
        cost[end], cut[end] = costs[best], starts[best]
    ends = [len(order)]
    while ends[-1]:
        ends.append(int(cut[ends[-1]]))
    return [order[start:end] for end, start in zip(ends[-2::-1], ends[:0:-1], strict=True)]


def chunks(x: Any, length: int, lengths: Any = None) -> list[Any]:
    """Cuts sequences into pieces of time, for truncated back-propagation and for streams.

    Truncated back-propagation (the pages' `SequenceLength`) hands the state on and cuts the
    gradient at the borders, `jax.lax.stop_gradient(hidden)`; outputs stay those of one long run.

    Args:
      x: shape (*batch, time, channels).
      length: steps in a piece; the last one may be shorter.
      lengths: the true lengths (*batch,) of right-padded sequences, or None.

    Returns:
      The pieces in order, (*batch, length, channels) each; with `lengths` pairs of a piece and the
      true lengths in it: a sequence that ended before has length 0 there, and keeps its state.

    Raises:
      TypeError: `length` or `lengths` are no integers.
      ValueError: `length` is not positive, a shape is wrong, or lengths lie outside 0…time.

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> from gru_jax import ragged
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> x, lengths = jnp.ones((2, 50, 12)), jnp.array([50, 33])
      >>> def loss(params, hidden, x, lengths):
      ...     y, hidden = gru_jax.gru(params, x, hidden, lengths=lengths)
      ...     return jnp.mean(y**2), hidden
      >>> hidden = jnp.zeros((2, 100))
      >>> for piece, steps in ragged.chunks(x, 20, lengths):
      ...     hidden = jax.lax.stop_gradient(hidden)
      ...     gradient, hidden = jax.grad(loss, has_aux=True)(params, hidden, piece, steps)
      ...     # here a solver takes a step
      >>> piece.shape, steps.tolist()
      ((2, 10, 12), [10, 0])
    """
    length = _checks.positive_int("length", length)
    x = x if hasattr(x, "shape") else np.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x must have axes (*batch, time, channels), got shape {x.shape}.")
    if lengths is not None:
        lengths = _arguments.check_lengths(lengths, None, x.shape[:-1])
    pieces = []
    for start in range(0, x.shape[-2], length):
        piece = x[..., start : start + length, :]
        pieces.append(
            piece if lengths is None else (piece, (lengths - start).clip(0, piece.shape[-2]))
        )
    return pieces
