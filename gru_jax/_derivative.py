"""The derivative of the time loop: a linear recurrence, and its transpose.

    tangents     dh_t = J_t dh_{t-1} + u_t      J_t = ∂h_t/∂h_{t-1}; u_t: what dW, dR, db, dx_t add
    cotangents   δ_{t-1} = J_tᵀ (δ_t + g_t)     g_t: the cotangent of h_t where it leaves the loop

With all h_t known, all coefficients of J_t can be. The loop of the cotangents carries δ alone;
after each of its blocks the transpose of u gives every gradient as one product over the block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import _cell, _products
from gru_jax._blocks import (
    TIME,
    Blocks,
    at,
    block_of,
    put,
    put_block,
    space,
    where,
)
from gru_jax._cell import Coefficients
from gru_jax._linear import Linear
from gru_jax._loop import Given, Known, Loop, Results, pieces, settled

BLOCK_BYTES = 5 * 2**19  # of the three gate arrays of a block


def tangents(loop: Loop, known: Known, d: Given) -> Results:
    """The linear recurrence as a scan."""
    eq, learn, T = loop.equations, known.given.learn, known.hs.shape[TIME]
    starts, x, c = at_block(loop, known, Blocks(T, T, loop.reverse), 0)
    thirds, d_thirds = _products.thirds(learn), _products.thirds(d.learn)
    u = _cell.forcing(eq, thirds, c, starts, x, d_thirds, d.x)
    by = _products.in_loop(eq, learn)

    def body(dh: jax.Array, now: tuple) -> tuple:
        c, u, reset = now
        dh = _cell.linear_step(eq, by, c, where(reset, d.back, dh)) + u
        return dh, dh if loop.sequence else None

    over_time = jax.tree.map(lambda a: jnp.moveaxis(a, TIME, 0), (c, u, known.flags.reset))
    enter = d.enter + jnp.zeros_like(over_time[1][0])
    last, hs = lax.scan(body, enter, over_time, reverse=loop.reverse, unroll=loop.unroll or 1)
    return Results(jnp.moveaxis(hs, 0, TIME) if loop.sequence else None, last)


def smooth_tangents(loop: Loop, known: Known, d: Given) -> Results:
    """`tangents` as a function of the states, learnables and inputs alone."""
    return tangents(loop, known._replace(kept=None), d)


def cotangents(loop: Loop, known: Known, ct: Results) -> Given:
    """The transpose of `tangents`."""
    eq, flags, kept = loop.equations, known.flags, known.kept
    learn, x, enter, back = known.given
    thirds, adjoint_step = _products.thirds(learn), _cell.adjoint_step(eq, learn)
    blocks, unroll = pieces(loop, x.shape[TIME], enter, BLOCK_BYTES)
    in_kernel = _kernel(loop, enter)

    def block(m: Any, carry: tuple) -> tuple:
        k = blocks.number - 1 - m
        begin, processed = blocks.begin(k)
        starts, x_block, c = at_block(loop, known, blocks, k)

        def body(m: Any, carry: tuple) -> tuple:
            dh, d_back, (dhs, ss) = carry
            i = blocks.time(blocks.size - 1 - m)
            dh = dh if ct.hs is None else dh + at(ct.hs, begin + i)
            dhs = put(dhs, dh, i)
            dh, s = adjoint_step(at(c, i) if kept is None else at(kept, begin + i), dh)
            ss = put(ss, s, i)
            reset = at(flags.reset, begin + i)
            d_back = d_back if reset is None else d_back + jnp.where(reset, dh, 0.0)
            return where(reset, 0.0, dh), d_back, (dhs, ss)

        dh, d_back, d_learn, d_x = carry
        # Zeros at the steps of an overlap, which belong to the block before and count there.
        if in_kernel:
            dh, d_back, seen = in_kernel(learn, c, flags.reset, ct)
        else:
            like = adjoint_step(at(c, 0), enter)  # which nobody computes
            seen = jax.tree.map(lambda a: space(a, blocks.size, 0.0), like)
            init = dh, d_back, seen
            dh, d_back, seen = lax.fori_loop(0, blocks.size - processed, body, init, **unroll)
        more, d_x_block = _cell.adjoint_forcing(eq, thirds, c, starts, x_block, *seen)
        d_learn = jax.tree.map(jnp.add, d_learn, _products.wholes(more))
        return dh, d_back, d_learn, put_block(d_x, d_x_block, begin)

    nothing = jax.tree.map(jnp.zeros_like, (back, learn))
    carry = (ct.last, *nothing, jnp.full_like(x, 9.0))  # to be overwritten: see `space`
    dh, d_back, d_learn, d_x = blocks.each(block, carry)
    return Given(d_learn, d_x, dh, d_back)


def _kernel(loop: Loop, enter: jax.Array) -> Callable | None:
    """The backward loop as a GPU kernel, where one is to run and the layer fits into it."""
    if not loop.kernel:
        return None
    from gru_jax import _gpu_backward

    tiles = _gpu_backward.tiles_for(loop.equations.reset_after, enter.shape)
    if tiles is None:
        return None
    return partial(_gpu_backward.cotangents, loop.equations, tiles, loop.reverse)


TANGENTS = Linear(tangents, cotangents, smooth_tangents, lambda loop, known: known.given, settled)


def passing(skip: jax.Array | None, c: Coefficients) -> Coefficients:
    """The coefficients where steps are skipped: there the state passes, and nothing else."""
    return Coefficients(where(skip, 1.0, c.z), *(where(skip, 0.0, a) for a in c[1:]))


def at_block(
    loop: Loop, known: Known, blocks: Blocks, k: Any
) -> tuple[jax.Array, jax.Array, Coefficients]:
    """The states that enter the steps of block k, their inputs, and the coefficients there."""
    eq, (learn, _, enter, back) = loop.equations, known.given
    begin, _ = blocks.begin(k)
    everything = (known.given.x, known.hs, known.flags, known.kept)
    x, hs, (skip, reset), c = block_of(everything, begin, blocks.size)
    if blocks.number > 1:
        before = begin + blocks.size if loop.reverse else begin - 1
        before = at(known.hs, jnp.clip(before, 0, blocks.T - 1))
        enter = jnp.where(k == 0, enter, before)
    starts = shifted(enter, hs, loop.reverse)
    starts = where(reset, jnp.expand_dims(back, TIME), starts)
    # What a skipped step would compute counts for nothing, so it is computed where it is finite:
    # 0 · NaN in a derivative would count.
    starts = where(skip, 0.0, starts)
    if c is None:
        thirds = _products.thirds(learn)
        x_r, x_z, x_n = (where(skip, 0.5, part) for part in _products.input_parts(eq, thirds)(x))
        by = _products.in_bulk(eq, thirds)
        _, c = _cell.step(eq, thirds, by, starts, (x_r, x_z, x_n))
        c = passing(skip, c)
    return starts, x, c


def shifted(enter: jax.Array, hs: jax.Array, reverse: bool) -> jax.Array:
    """The state before each step, in processing order."""
    axis, enter = hs.ndim + TIME, jnp.expand_dims(enter, TIME)
    if reverse:
        return lax.concatenate((lax.slice_in_dim(hs, 1, None, axis=axis), enter), axis)
    return lax.concatenate((enter, lax.slice_in_dim(hs, 0, -1, axis=axis)), axis)
