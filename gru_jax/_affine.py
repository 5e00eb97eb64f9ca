"""Linear recurrences over all time at once, by associative scans.

    d_t = d_{t-1} A_t + b_t        rows: A_t is the transpose of J_t, or its diagonal

Two steps after each other are again one step, with the matrix A_1 A_2 and the addend b_1 A_2 + b_2;
so T steps take 2 ⌈log₂ T⌉ rounds of products and T H³ multiplications, or T H with diagonals.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import _cell, _products
from gru_jax._blocks import where
from gru_jax._cell import Coefficients
from gru_jax._derivative import shifted
from gru_jax._loop import Loop
from gru_jax._products import Learnables

SMALL = 8  # matrices of fewer rows are multiplied as sums of products
MOST = 100  # iterations that bring in what a diagonal leaves out of J_t


def solve(A: jax.Array, b: jax.Array, reverse: bool) -> jax.Array:
    """All d_t: A (*batch, T, H, H), b (*batch, T, rows, H)."""

    def then(first: tuple, second: tuple) -> tuple:
        (A1, b1), (A2, b2) = first, second
        return _times(A1, A2), _times(b1, A2) + b2

    return lax.associative_scan(then, (A, b), reverse=reverse, axis=b.ndim - 3)[1]


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of many pairs of matrices; of tiny ones, fused, without a call for each."""
    if b.shape[-1] < SMALL:
        return jnp.sum(jnp.expand_dims(a, -1) * jnp.expand_dims(b, -3), -2)
    return jnp.matmul(a, b, precision="highest")


def solve_diagonal(A: jax.Array, b: jax.Array, reverse: bool) -> jax.Array:
    """The same with diagonals A_t, both (*batch, T, H)."""

    def then(first: tuple, second: tuple) -> tuple:
        (A1, b1), (A2, b2) = first, second
        return A1 * A2, b1 * A2 + b2

    return lax.associative_scan(then, (A, b), reverse=reverse, axis=b.ndim - 2)[1]


def jacobians(loop: Loop, learn: Learnables, c: Coefficients, reset: jax.Array | None) -> jax.Array:
    """The transposes of all J_t, (*batch, T, H, H); zero where a step starts from elsewhere."""
    A = _cell.jacobian(loop.equations, _products.in_loop(loop.equations, learn), c)
    return A if reset is None else jnp.where(reset[..., None], 0.0, A)


def response(
    loop: Loop, learn: Learnables, c: Coefficients, reset: jax.Array | None, b: jax.Array,
    *, full: bool, transposed: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """d_t = J_t d_{t-1} + b_t for all t, or d_t = J_{t+1}ᵀ d_{t+1} + b_t; and whether it is that.

    With the matrices J_t at once, or with diagonals until nothing changes.
    """
    reverse = loop.reverse != transposed
    before = lambda a: shifted(jnp.zeros_like(a[..., 0, :]), a, reverse)  # noqa: E731
    if full:
        A = jacobians(loop, learn, c, reset)
        if transposed:
            A = jnp.swapaxes(jax.vmap(before, -1, -1)(A), -1, -2)
        d = solve(A, jnp.expand_dims(b, -2), reverse)[..., 0, :]
        return d, jnp.all(jnp.isfinite(d))

    eq = loop.equations
    A = where(reset, 0.0, _cell.diagonal(eq, learn, c))
    A = before(A) if transposed else A
    by, back = _products.in_loop(eq, learn), _cell.adjoint_step(eq, learn)

    def through(d: jax.Array) -> jax.Array:
        if transposed:
            return before(where(reset, 0.0, back(c, d)[0]))
        return _cell.linear_step(eq, by, c, where(reset, 0.0, before(d)))

    def body(now: tuple) -> tuple:
        k, d, _ = now
        change = solve_diagonal(A, b + through(d) - d, reverse)
        d = d + change
        least = 8 * jnp.finfo(d.dtype).eps * largest(d)
        return k + 1, d, jnp.all(largest(change) <= least)

    unsettled = jnp.any(b != b)  # False, typed like the outcome
    init = (jnp.int32(0), jnp.zeros_like(b), unsettled)
    _, d, settled = lax.while_loop(lambda now: (now[0] < MOST) & ~now[2], body, init)
    return d, settled & jnp.all(jnp.isfinite(d))  # ∞ ≤ ∞ is no end


def largest(a: jax.Array) -> jax.Array:
    """Of each sequence, over time and units; infinite where one is no number, unlike `jnp.max`."""
    return jnp.max(jnp.where(jnp.isnan(a), jnp.inf, jnp.abs(a)), (-2, -1))
