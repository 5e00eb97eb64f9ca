"""The time loop of the GRU and its derivative rule.

Autodiff of a plain scan carries the gradient of the weights through the backward loop, a
read-modify-write of 3H × H numbers at every step. The rule here avoids it, in forward mode:

    primal   h_t = step(h_{t-1}, x_t)
    tangent  dh_t = J_t dh_{t-1} + u_t,   J_t = ∂h_t/∂h_{t-1},   u_t = what dR, db and dx_t add

With all h_t known, J_t and u_t for all t come from a few large products outside the loop; the
tangent loop is linear in (dh_0, u). JAX transposes it by itself: the backward loop carries only
the cotangent of h, and every weight gradient is one large product after it. As the rule is made
of ordinary operations, it can be differentiated again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gru_jax._cell import Equations, Parts, Recurrent, coefficients, linear_step, step

STATES = "gru_states"  # name under which the rule marks h_1 … h_T for jax.checkpoint policies


class Loop(NamedTuple):
    """How the loop runs: static, hashable."""

    equations: Equations
    reverse: bool
    unroll: int


class Steps(NamedTuple):
    """What enters at each step, time first."""

    x: Parts  # three of (T, *batch, H)
    skip: jax.Array | None  # (T, *batch, 1): True leaves the state as it is
    reset: jax.Array | None  # (T, *batch, 1): True starts the step from `back`


class Ends(NamedTuple):
    """The state that enters the loop and the one that resets return to, both (*batch, H)."""

    enter: jax.Array
    back: jax.Array


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def states(loop: Loop, rec: Recurrent, ends: Ends, steps: Steps) -> tuple[jax.Array, jax.Array]:
    """Returns all h_t, (T, *batch, H), aligned with the inputs, and the last one processed."""
    return _run(loop, rec, ends, steps, lambda h: h)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def last_state(loop: Loop, rec: Recurrent, ends: Ends, steps: Steps) -> jax.Array:
    """Returns the last h in processing order, (*batch, H), without keeping the others."""
    return _run(loop, rec, ends, steps, lambda h: None)[1]


@states.defjvp
def _states_jvp(loop: Loop, primals: tuple, tangents: tuple) -> tuple:
    (hs, last), dh_loop = _rule(loop, primals, tangents)
    return (hs, last), dh_loop(lambda dh: dh)


@last_state.defjvp
def _last_state_jvp(loop: Loop, primals: tuple, tangents: tuple) -> tuple:
    (_, last), dh_loop = _rule(loop, primals, tangents)
    return last, dh_loop(lambda dh: None)[1]


def _run(loop: Loop, rec: Recurrent, ends: Ends, steps: Steps, emit: Any) -> tuple:
    def body(h: jax.Array, now: Steps) -> tuple:
        start = _where(now.reset, ends.back, h)
        h = _where(now.skip, h, step(loop.equations, rec, start, now.x))
        return h, emit(h)

    return _scan(loop, body, ends.enter, steps)


def _rule(loop: Loop, primals: tuple, tangents: tuple) -> tuple:
    """Returns the primal result and the loop of the tangents, which takes what to emit."""
    rec, ends, steps = primals
    d_rec, d_ends, d_steps = tangents
    hs, last = states(loop, rec, ends, steps)
    hs = checkpoint_name(hs, STATES)
    starts = _where(steps.reset, _for_all(ends.back, hs), _previous(loop, ends.enter, hs))
    # What a skipped step would compute counts for nothing, so it is computed where it is finite:
    # 0 · NaN in the transposed loop would count.
    starts = _where(steps.skip, 0.0, starts)
    x_r, x_z, x_n = (_where(steps.skip, 0.5, part) for part in steps.x)
    x = (x_r, x_z, x_n)

    at_starts = partial(step, loop.equations)
    _, u = jax.jvp(lambda rec, x: at_starts(rec, starts, x), (rec, x), (d_rec, d_steps.x))
    coef = coefficients(loop.equations, rec, starts, x)

    def body(emit: Any, dh: jax.Array, now: tuple) -> tuple:
        coef, u, skip, reset = now
        start = _where(reset, d_ends.back, dh)
        dh = _where(skip, dh, linear_step(loop.equations, rec, coef, start) + u)
        return dh, emit(dh)

    def dh_loop(emit: Any) -> tuple:
        xs = (coef, u, steps.skip, steps.reset)
        return _scan(loop, partial(body, emit), d_ends.enter + jnp.zeros_like(u[0]), xs)

    return (hs, last), dh_loop


def _scan(loop: Loop, body: Any, init: jax.Array, xs: Any) -> tuple:
    last, out = lax.scan(body, init, xs, reverse=loop.reverse, unroll=loop.unroll)
    return out, last


def _previous(loop: Loop, enter: jax.Array, hs: jax.Array) -> jax.Array:
    """The state before each step, in processing order."""
    pair = (hs[1:], enter[None]) if loop.reverse else (enter[None], hs[:-1])
    return lax.concatenate(pair, 0)


def _where(condition: jax.Array | None, yes: jax.Array | float, no: jax.Array) -> jax.Array:
    """jnp.where; no condition at all means False everywhere."""
    return no if condition is None else jnp.where(condition, yes, no)


def _for_all(h: jax.Array, hs: jax.Array) -> jax.Array:
    return jnp.broadcast_to(h[None], hs.shape)
