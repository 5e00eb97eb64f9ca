"""The recurrence solved over all time at once: Newton's method on the whole trajectory.

    r_t = f(h_{t-1}, x_t) − h_t          the residual, for all t in one call of the cell
    d_t = J_t d_{t-1} + r_t              an associative scan
    h_t ← h_t + d_t                      until d is small

J_t = ∂f/∂h at h_{t-1}, or its diagonal alone. With the diagonal a step costs less and more steps
are needed: the error shrinks by a factor, instead of being squared.

What a step rounds, the steps after it amplify, in a chaotic network without bound: no two programs
agree there, and none of them is right. So beside d run two probes p, the responses of the states to
errors of the size of rounding in every sum of every step,

    p_t = J_t p_{t-1} + e_t              with all of J_t, also where d knows the diagonal alone

one with signs that change all the time, one with lasting signs that draw every state outwards. A
sequence is accepted where d and p are within the tolerance. A diagonal d can be small by
not knowing what the rest of J_t amplifies. There p, times how far the residual exceeds e, is its
judge, and p itself has to settle: where the true recurrence amplifies without bound, it does not.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import _cell, _products
from gru_jax._affine import jacobians, largest, solve, solve_diagonal
from gru_jax._blocks import TIME, space, where
from gru_jax._cell import Coefficients
from gru_jax._derivative import passing, shifted
from gru_jax._loop import Flags, Given, Loop
from gru_jax._products import Learnables, Three

PATIENCE = 4  # steps without progress after which a sequence is given up
PROGRESS = {"full": 0.5, "diagonal": 0.95}  # is a step of less than that many times the least
MOST = {"full": 32, "diagonal": 100}
TOLERANCE = {"float32": 5e-7, "float64": 5e-13}


class Newton(NamedTuple):
    """How the recurrence is solved: static, hashable."""

    jacobian: str = "full"
    tolerance: float | None = None
    max_iterations: int | None = None


class ParallelInfo(NamedTuple):
    """What `gru_parallel` tells about each sequence; every field has shape (*batch,).

    Attributes:
      iterations: integers, the steps of Newton's method taken.
      residual: the largest |f(h_{t-1}, x_t) − h_t| of the states from which the last step set out.
      error: the estimated distance from the states of the time loop, relative to max(1, |h|): the
        largest of all steps and units. What `tolerance` bounds.
      converged: booleans; where False, the outputs are those of the time loop.
    """

    iterations: jax.Array
    residual: jax.Array
    error: jax.Array
    converged: jax.Array


class Problem(NamedTuple):
    """What stays the same while Newton's method runs."""

    loop: Loop
    given: Given
    flags: Flags
    thirds: Learnables
    parts: Three  # of the input
    sizes: Three  # of what is summed up in them, (*batch, T, H)
    norms: Three  # of the rows of R_g Q_oᵀ


class Linearised(NamedTuple):
    """The recurrence at a trajectory, all (*batch, T, H) but `noise`."""

    residual: jax.Array
    noise: jax.Array  # e, for each of the two probes, (*batch, 2, T, H)
    rounding: jax.Array  # of the states themselves
    c: Coefficients


class Outcome(NamedTuple):
    """Of a step of Newton's method."""

    step: jax.Array  # d, (*batch, T, H)
    probes: jax.Array  # p, (*batch, 2, T, H)
    excess: jax.Array | float  # of the residual over e, at least 1
    settled: jax.Array | bool  # whether p is


class Search(NamedTuple):
    """Newton's method under way; all but `k` for each sequence."""

    k: jax.Array
    hs: jax.Array
    probes: jax.Array
    best: jax.Array  # the smallest step so far
    stalled: jax.Array  # steps since then
    active: jax.Array
    info: ParallelInfo


def nothing_to_do(like: jax.Array) -> ParallelInfo:
    """About sequences without steps; `like` is (*batch, H)."""
    zero = jnp.sum(jnp.zeros_like(like), -1)
    return ParallelInfo(zero.astype(jnp.int32), zero, zero, zero == 0)


def search(
    loop: Loop, newton: Newton, given: Given, flags: Flags
) -> tuple[jax.Array, ParallelInfo]:
    """The trajectory (*batch, T, H), and for each sequence whether it is that of the time loop."""
    enter, most = given.enter, newton.max_iterations or MOST[newton.jacobian]
    tolerance = newton.tolerance or TOLERANCE[enter.dtype.name]
    zero, zeros = jnp.sum(jnp.zeros_like(enter), -1), space(enter, given.x.shape[TIME], 0.0)
    infinite, count = zero + jnp.inf, zero.astype(jnp.int32)
    info = ParallelInfo(count, infinite, infinite, zero > 0)
    probes = jnp.stack((zeros, zeros), -3)
    first = Search(jnp.int32(0), zeros, probes, infinite, count, zero == 0, info)
    body = partial(_newton_step, _problem(loop, given, flags), newton.jacobian, tolerance)
    last = lax.while_loop(lambda now: (now.k < most) & jnp.any(now.active), body, first)
    return last.hs, last.info


def _problem(loop: Loop, given: Given, flags: Flags) -> Problem:
    eq, learn, thirds = loop.equations, given.learn, _products.thirds(given.learn)
    norms = lambda matrix: _products.cut(jnp.sqrt(jnp.sum(matrix**2, -1)), 3)  # noqa: E731
    most = jnp.max(jnp.abs(given.x), -1, keepdims=True)
    parts, sizes = [], []
    every = zip(_products.input_parts(eq, thirds)(given.x), norms(learn.W), strict=True)
    for part, norm in every:
        parts.append(where(flags.skip, 0.5, part))
        sizes.append(jnp.abs(part) + _products.row(norm, part) * most)
    return Problem(
        loop, given, flags, thirds, tuple(parts), tuple(sizes), norms(_products.dense(eq, learn))
    )


def _newton_step(problem: Problem, jacobian: str, tolerance: float, now: Search) -> Search:
    """A step for every sequence that is still active."""
    here = _linearised(problem, now.hs)
    solved = _full if jacobian == "full" else _diagonal
    step, probes, excess, settled = solved(problem, here, now.probes)
    bound = 2 * jnp.max(jnp.abs(here.residual + now.hs), (-2, -1), keepdims=True)
    hs = now.hs + jnp.where(jnp.isfinite(step), step, here.residual)
    hs = jnp.clip(hs, -bound, bound)  # no state is far beyond all f(h), and no wild step is lasting
    scale = jnp.maximum(1.0, jnp.abs(hs))
    size, shaken = largest(step / scale), largest(probes / jnp.expand_dims(scale, -3)).max(-1)
    error = jnp.maximum(size, shaken * excess)
    converged = (error <= tolerance) & settled
    better = size < PROGRESS[jacobian] * now.best
    stalled = jnp.where(better, 0, now.stalled + 1)
    hopeless = (stalled >= PATIENCE) | ((size < 1e-3) & (shaken > 4 * tolerance))
    info = ParallelInfo(now.info.iterations + 1, largest(here.residual), error, converged)
    best, going = jnp.minimum(now.best, size), ~(converged | hopeless)

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        more = tuple(range(now.active.ndim, new.ndim))
        return jnp.where(jnp.expand_dims(now.active, more), new, old)

    new, old = (hs, probes, best, stalled, going, info), now[1:]
    return Search(now.k + 1, *jax.tree.map(chosen, new, old))


def _linearised(problem: Problem, hs: jax.Array) -> Linearised:
    loop, given, (skip, reset), thirds, parts, sizes, norms = problem
    eq, unit = loop.equations, jnp.finfo(hs.dtype).eps / 2
    before = shifted(given.enter, hs, loop.reverse)
    starts = where(reset, jnp.expand_dims(given.back, TIME), before)
    starts = where(skip, 0.0, starts)
    by = _products.in_bulk(eq, thirds)
    step = lambda parts: _cell.step(eq, thirds, by, starts, parts)  # noqa: E731
    new, through, c = jax.linearize(step, parts, has_aux=True)

    most = jnp.max(jnp.abs(starts), -1, keepdims=True)
    added = (_products.row(norm, starts) * most for norm in norms)
    errors = [unit * (a + b) for a, b in zip(sizes, added, strict=True)]
    rounding = unit * jnp.maximum(1.0, jnp.abs(new))
    *signs, own = _signs(4, hs)
    pairs = zip(errors, signs, _signs(3, hs[..., :1, :]), strict=True)
    shaken = tuple(jnp.stack((a * error, b * error), -3) for error, a, b in pairs)
    noise = jax.vmap(through, -3, -3)(shaken)
    noise += jnp.stack((own * rounding, jnp.sign(new) * rounding), -3)
    noise = where(None if skip is None else jnp.expand_dims(skip, -3), 0.0, noise)
    return Linearised(where(skip, before, new) - hs, noise, rounding, passing(skip, c))


def _full(problem: Problem, here: Linearised, _: jax.Array) -> Outcome:
    loop, given, flags = problem[:3]
    A = jacobians(loop, given.learn, here.c, flags.reset)
    d = solve(A, jnp.swapaxes(_joined(here.residual, here.noise), -3, -2), loop.reverse)
    return Outcome(d[..., 0, :], jnp.swapaxes(d[..., 1:, :], -3, -2), 1.0, True)


def _diagonal(problem: Problem, here: Linearised, probes: jax.Array) -> Outcome:
    (loop, given, (_, reset), thirds), eq = problem[:4], problem.loop.equations
    by = _products.in_bulk(eq, thirds)

    def missing(e: jax.Array, p: jax.Array) -> jax.Array:
        before = where(reset, 0.0, shifted(jnp.zeros_like(given.enter), p, loop.reverse))
        return _cell.linear_step(eq, by, here.c, before) + e - p

    A = where(reset, 0.0, _cell.diagonal(eq, given.learn, here.c))
    b = _joined(here.residual, jax.vmap(missing, -3, -3)(here.noise, probes))
    d = jax.vmap(partial(solve_diagonal, A, reverse=loop.reverse), -3, -3)(b)
    changes = d[..., 1:, :, :]
    probes = probes + changes
    settled = jnp.all(largest(changes) <= 1e-3 * largest(probes), -1)
    expected = jnp.max(jnp.abs(here.noise), -3) + here.rounding
    excess = jnp.maximum(1.0, largest(here.residual / expected))
    return Outcome(d[..., 0, :, :], probes, excess, settled)


def _joined(one: jax.Array, two: jax.Array) -> jax.Array:
    """(*batch, T, H) and (*batch, 2, T, H) as (*batch, 3, T, H)."""
    return jnp.concatenate((jnp.expand_dims(one, -3), two), -3)


def _signs(number: int, like: jax.Array) -> jax.Array:
    """±1 without pattern, (number, 1 …, T, H): the indices, hashed."""
    shape = (number, *(1,) * (like.ndim - 2), *like.shape[-2:])
    i = lax.iota(jnp.uint32, number * like.shape[-2] * like.shape[-1])
    for _ in range(2):
        i = (i ^ (i >> 16)) * 0x45D9F3B
    return jnp.where(((i >> 16) & 1).reshape(shape) == 1, 1.0, -1.0).astype(like.dtype)
