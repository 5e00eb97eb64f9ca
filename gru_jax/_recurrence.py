"""The time loop of the GRU and its derivative rule.

Autodiff of a plain scan carries the gradient of the weights through the backward loop, a
read-modify-write of 3H × H numbers at every step, and keeps about nine arrays of the size of the
outputs. The rule here avoids both. It is a `jax.custom_jvp` whose tangents are a linear map of
known numbers, so it serves forward mode, reverse mode and derivatives of derivatives; `_derivative`
is that map and its transpose, `_linear` joins the two.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gru_jax import _cell, _products
from gru_jax._blocks import TIME, Blocks, at, block_of, put, space, where
from gru_jax._cell import Coefficients
from gru_jax._derivative import TANGENTS, at_block, passing
from gru_jax._linear import linear_call
from gru_jax._loop import Flags, Given, Known, Loop, Results, by_platform, pieces

STATES = "gru_states"  # name under which the rule marks h_1 … h_T for jax.checkpoint policies
BLOCK_BYTES = 5 * 2**20  # of the three gate arrays of a block


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def states(loop: Loop, given: Given, flags: Flags) -> Results:
    """Runs h_t = step(h_{t-1}, x_t): all h_t, if `loop.sequence`, and the last one."""
    return run(loop._replace(keep=False), given, flags)[0]


@states.defjvp
def _states_jvp(loop: Loop, primals: tuple, tangents: tuple) -> tuple[Results, Results]:
    known, last = _known(loop, *primals)
    d_out = linear_call(TANGENTS, loop, known, tangents[0])
    return Results(known.hs if loop.sequence else None, last), d_out


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _states_and_kept(loop: Loop, given: Given, flags: Flags) -> tuple:
    return run(loop._replace(sequence=True), given, flags)


@_states_and_kept.defjvp
def _states_and_kept_jvp(loop: Loop, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    known, last = _known(loop, *primals)
    d_out = linear_call(TANGENTS, loop._replace(sequence=True), known, tangents[0])
    # Nobody differentiates through `kept`: the smooth form of the map does without it.
    d_kept = jax.tree.map(jnp.zeros_like, known.kept)
    return (Results(known.hs, last), known.kept), (d_out, d_kept)


def _known(loop: Loop, given: Given, flags: Flags) -> tuple[Known, jax.Array]:
    (hs, last), kept = _states_and_kept(loop, given, flags)
    return Known(given, flags, checkpoint_name(hs, STATES), kept), last


def run(loop: Loop, given: Given, flags: Flags) -> tuple[Results, Coefficients | None]:
    """The loop; h_t and the coefficients, where wanted, are written into arrays of all time."""
    return by_platform(_run_on, loop, given, flags)


def _run_on(loop: Loop, given: Given, flags: Flags) -> tuple[Results, Coefficients | None]:
    kernel = _kernel(loop, given.enter.shape)
    if kernel:
        return kernel(given, flags)
    eq, (learn, x, enter, back), T = loop.equations, given, given.x.shape[TIME]
    thirds = _products.thirds(learn)
    many = math.prod(enter.shape[:-1]) != 1  # one row at a time reads the matrices as they are
    by = _products.in_loop(eq, learn, copied=many, halved=not many)
    # Adding biases to all parts first would pass through memory once more. One row is in the cache.
    input_parts = _products.input_parts(eq, thirds, copied=many, biased=not many)
    blocks, unroll = pieces(loop, T, enter, BLOCK_BYTES)
    if loop.keep:  # arrays of all time hold the parts of the input
        blocks = Blocks(T, T, loop.reverse)

    def block(k: Any, carry: tuple) -> tuple:
        begin, processed = blocks.begin(k)
        parts = None if loop.keep else input_parts(block_of(x, begin, blocks.size))

        def body(j: Any, carry: tuple) -> tuple:
            h, hs, kept = carry
            i = blocks.time(j)
            skip, reset = at(flags, begin + i)
            x_g = at((kept.r, kept.z, kept.c_n) if loop.keep else parts, i)
            x_g = _products.with_biases(thirds, x_g) if many else x_g
            new, c = _cell.step(eq, learn, by, where(reset, back, h), x_g)
            h = where(skip, h, new)
            values = (h if loop.sequence else None, passing(skip, c) if loop.keep else None)
            return h, *put((hs, kept), values, begin + i)

        return lax.fori_loop(processed, blocks.size, body, carry, **unroll)

    hs, kept = space(enter, T, 1) if loop.sequence else None, None
    if loop.keep:  # a step reads its parts of the input once, and can write where they were
        x_r, x_z, x_n = input_parts(x)
        kept = Coefficients(x_z, x_r, space(enter, T, 2), space(enter, T, 3), x_n)
    last, hs, kept = blocks.each(block, (enter, hs, kept))
    return Results(hs, last), kept


def _kernel(loop: Loop, shape: tuple[int, ...]) -> Callable | None:
    """The loop as a GPU kernel, where one is to run and states (*batch, H) fit into it."""
    if not loop.kernel:
        return None
    from gru_jax import _gpu_forward

    tiles = _gpu_forward.tiles_for(shape, loop.half)
    if tiles is None:
        return None

    def run(given: Given, flags: Flags) -> tuple[Results, Coefficients | None]:
        found = _gpu_forward.states(loop, tiles, given, flags)
        if not loop.keep or found.hs is None:
            return found, None
        whole = Blocks(given.x.shape[TIME], given.x.shape[TIME], loop.reverse)
        return found, at_block(loop, Known(given, flags, found.hs, None), whole, 0)[2]

    return run
