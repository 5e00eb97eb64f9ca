"""The recurrence over all time in one piece, or in segments whose states are computed again."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import _products
from gru_jax._blocks import TIME, block_of
from gru_jax._loop import Flags, Given, Loop, Results
from gru_jax._params import GRUParams
from gru_jax._recurrence import states

KEPT_BYTES = 2**29  # above, the backward pass recomputes unless told otherwise


def segments(
    checkpoint: int | str | None, loop: Loop, params: GRUParams,
    x: jax.Array, h: jax.Array, back: jax.Array, flags: Flags,
) -> Results:  # fmt: skip
    """Runs all time in one piece, or in pieces whose inner states the backward pass recomputes."""
    piece = partial(_piece, loop, params)
    if checkpoint in (None, 1) or 0 in h.shape:
        return piece(x, h, back, flags)

    T, reverse = x.shape[TIME], loop.reverse
    n = math.ceil(math.sqrt(T)) if isinstance(checkpoint, str) else checkpoint
    n = min(n, T)
    border = T % n if reverse else T - T % n
    first = block_of((x, flags), 0, border)
    second = block_of((x, flags), border, T - border)
    whole, rest = (second, first) if reverse else (first, second)
    piece = jax.checkpoint(piece)

    def body(h: jax.Array, now: tuple) -> tuple:
        x, flags = now
        hs, h = piece(x, h, back, flags)
        return h, hs

    h, hs = lax.scan(body, h, jax.tree.map(partial(_pieces, n), whole), reverse=reverse)
    hs = None if hs is None else _joined(hs)
    if T % n:
        tail, h = piece(rest[0], h, back, rest[1])
        if hs is not None:
            hs = lax.concatenate((tail, hs) if reverse else (hs, tail), hs.ndim + TIME)
    return Results(hs, h)


def _pieces(n: int, a: jax.Array) -> jax.Array:
    """(*batch, k n, C) to (k, *batch, n, C)."""
    *batch, T, C = a.shape
    return jnp.moveaxis(a.reshape(*batch, T // n, n, C), -3, 0)


def _joined(a: jax.Array) -> jax.Array:
    """(k, *batch, n, C) to (*batch, k n, C)."""
    k, *batch, n, C = a.shape
    return jnp.moveaxis(a, 0, -3).reshape(*batch, k * n, C)


def _piece(
    loop: Loop, params: GRUParams, x: jax.Array, h: jax.Array, back: jax.Array, flags: Flags
) -> Results:
    """Runs the recurrence over some steps."""
    return states(*given_to(loop, params, x, h, back), flags)


def given_to(
    loop: Loop, params: GRUParams, x: jax.Array, h: jax.Array, back: jax.Array
) -> tuple[Loop, Given]:
    """How to run the recurrence, and what it is given, all varying over the mapped axes of h."""
    loop = loop._replace(keep=loop.keep and _fits(x.shape[:-1], h))
    x = _products.project_inputs(params, x, loop.equations.precision)
    return loop, _alike(Given(_products.learnables(params), x, h, back))


def _fits(shape: tuple, h: jax.Array) -> bool:
    """Whether the coefficients of all steps, five numbers for each of h, are few enough to keep."""
    kept = 5 * math.prod(shape) * h.shape[-1] * h.dtype.itemsize
    return not isinstance(kept, int) or kept <= KEPT_BYTES


def _alike(given: Given) -> Given:
    """The arrays, all varying over the mapped axes of `enter`; costs nothing once compiled."""
    zero = jnp.sum(jnp.zeros_like(given.enter))
    return jax.tree.map(lambda a: a + zero, given)
