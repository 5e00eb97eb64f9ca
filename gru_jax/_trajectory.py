"""The recurrence in parallel over time: a trajectory by Newton's method, and its derivative.

Where the search has not found a trajectory that can be trusted, the time loop runs. The derivative
is the exact one of `_derivative` at the trajectory, whichever way that was found: the same linear
recurrence and its transpose,

    tangents     d_t = J_t d_{t-1} + b_t
    cotangents   λ_t = J_{t+1}ᵀ λ_{t+1} + g_t

with the true J_t, by the same scans. With diagonal Jacobians, which need no memory for matrices,
the rest of J_t is brought in by iteration; where that does not settle, the loop runs as well.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gru_jax import _cell, _derivative, _products
from gru_jax._affine import response
from gru_jax._blocks import TIME, Blocks, at, where
from gru_jax._cell import Coefficients
from gru_jax._derivative import shifted
from gru_jax._linear import Linear, linear_call
from gru_jax._loop import Flags, Given, Known, Loop, Results
from gru_jax._newton import Newton, ParallelInfo, search
from gru_jax._recurrence import STATES, run
from gru_jax._recurrence import states as states_by_loop

Found = tuple[Known, jax.Array]  # and whether all of it came from Newton's method


def states(loop: Loop, newton: Newton, given: Given, flags: Flags) -> tuple[Results, ParallelInfo]:
    """What `_recurrence.states` returns, and how it was found."""
    wanted, loop = loop.sequence, loop._replace(sequence=True)
    fixed = lax.stop_gradient(given)
    hs, info = search(loop, newton, fixed, flags)
    found = jnp.all(info.converged)

    def by_loop(hs: jax.Array) -> jax.Array:
        right = jnp.expand_dims(info.converged, (-2, -1))
        return jnp.where(right, hs, states_by_loop(loop, fixed, flags).hs)

    hs = lax.cond(found, lambda hs: hs, by_loop, hs)
    if flags.skip is not None:
        hs = _held(hs, fixed.enter, flags.skip, loop.reverse)
    hs, last = _attached(loop, newton, given, flags, hs, found)
    return Results(hs if wanted else None, last), info


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attached(
    loop: Loop, newton: Newton, given: Given, flags: Flags, hs: jax.Array, found: jax.Array
) -> Results:
    """The trajectory, as the function of `given` that it is."""
    return Results(hs, at(hs, _end(loop, hs)))


@_attached.defjvp
def _attached_jvp(loop: Loop, newton: Newton, primals: tuple, tangents: tuple) -> tuple:
    given, flags, _, found = primals
    out = _attached(loop, newton, *primals)
    known = Known(given, flags, checkpoint_name(out.hs, STATES), None)
    d_out = linear_call(IN_TIME, (loop, newton), (known, found), tangents[0])
    return Results(known.hs, out.last), d_out


def _tangents(static: tuple[Loop, Newton], found: Found, d: Given) -> Results:
    """`_derivative.tangents`, all steps at once."""
    (loop, newton), known = static, found[0]
    forced, c = _forced(loop, known)
    hs, solved = _solved(loop, newton, found, c, forced(d), False)
    return lax.cond(
        solved,
        lambda hs, known, d: Results(hs, at(hs, _end(loop, hs))),
        lambda hs, known, d: _derivative.tangents(loop, known, d),
        hs, known, d,
    )  # fmt: skip


def _cotangents(static: tuple[Loop, Newton], found: Found, ct: Results) -> Given:
    """`_derivative.cotangents`, all steps at once."""
    (loop, newton), known = static, found[0]
    forced, c = _forced(loop, known)
    g = jnp.zeros_like(known.hs) if ct.hs is None else ct.hs
    g = g.at[..., _end(loop, g), :].add(ct.last)
    total, solved = _solved(loop, newton, found, c, g, True)
    return lax.cond(
        solved,
        lambda total, known, ct: jax.linear_transpose(forced, known.given)(total)[0],
        lambda total, known, ct: _derivative.cotangents(loop, _with_kept(loop, known), ct),
        total, known, ct,
    )  # fmt: skip


def _smooth_tangents(static: tuple[Loop, Newton], found: Found, d: Given) -> Results:
    return _derivative.smooth_tangents(static[0], found[0], d)


IN_TIME = Linear(_tangents, _cotangents, _smooth_tangents, lambda static, found: found[0].given)


def _forced(loop: Loop, known: Known) -> tuple[Any, Coefficients]:
    """Returns d -> b, what d adds to the state after each step, and the coefficients."""
    eq, learn, T = loop.equations, known.given.learn, known.hs.shape[TIME]
    starts, x, c = _derivative.at_block(loop, known, Blocks(T, T, loop.reverse), 0)
    thirds, by = _products.thirds(learn), _products.in_loop(eq, learn)

    def forced(d: Given) -> jax.Array:
        u = _cell.forcing(eq, thirds, c, starts, x, _products.thirds(d.learn), d.x)
        into = shifted(d.enter, jnp.zeros_like(u), loop.reverse)
        into = where(known.flags.reset, jnp.expand_dims(d.back, TIME), into)
        return u + _cell.linear_step(eq, by, c, into)

    return forced, c


def _solved(
    loop: Loop, newton: Newton, found: Found, c: Coefficients, b: jax.Array, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """d_t = J_t d_{t-1} + b_t, or the transpose, where the trajectory is found; and whether."""
    known, in_time = found
    learn, reset = known.given.learn, known.flags.reset
    solve = partial(
        response, loop, learn, c, reset, full=newton.jacobian == "full", transposed=transposed
    )
    return lax.cond(in_time, solve, lambda b: (b, in_time), b)


def _with_kept(loop: Loop, known: Known) -> Known:
    """With the coefficients that the loop would have kept: rounded as they are in `gru`."""
    return known._replace(kept=run(loop, known.given, known.flags)[1])


def _end(loop: Loop, hs: jax.Array) -> int:
    """The time of the last step processed."""
    return 0 if loop.reverse else hs.shape[TIME] - 1


def _held(hs: jax.Array, enter: jax.Array, skip: jax.Array, reverse: bool) -> jax.Array:
    """The states, each skipped step having exactly that of the step before."""
    axis = skip.ndim + TIME
    if reverse:
        hs, skip = lax.rev(hs, (axis,)), lax.rev(skip, (axis,))
    hs = lax.concatenate((jnp.expand_dims(enter, TIME), hs), axis)
    latest = jnp.where(skip, 0, lax.broadcasted_iota(jnp.int32, skip.shape, axis) + 1)
    hs = jnp.take_along_axis(hs, lax.cummax(latest, axis), axis)
    return lax.rev(hs, (axis,)) if reverse else hs
