"""The time loop of the GRU as one GPU kernel.

Block c of a cluster (see `_gpu`) owns 64 hidden units of N batch rows. What lies where, C blocks:

    R_s (192, 64 C)       16 bit   its rows of R: 64 of the reset, update and candidate gate; all T
    h_s (2, 64 C, N)      16 bit   the state of all units. Reset after: of this step and of the
                                   next. Reset before: h, and r ⊙ h
    x_s (2, 192, N)      float32   its parts of the input, W_g x_t + b_g, of this and the next step
    y_s (64, N)          float32   its outputs on their way out
    registers            float32   h_{t-1} of its units, b_h̃ of the recurrent-bias mode

A step: multiply R_s and h_s; gates and new state in registers; send the state, rounded to 16 bits,
to all blocks; write it out; wait for the others'. A padded step has z = 1, by way of x_z = ∞.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gru_jax import _gpu, _products
from gru_jax._blocks import TIME
from gru_jax._gpu import FLAGS, GATES, STATES, UNITS, Tiles
from gru_jax._loop import Flags, Given, Loop, Results
from gru_jax._products import Equations

DEFAULT_PRECISIONS = (None, "default", "fastest", lax.Precision.DEFAULT)


def shared_bytes(C: int, N: int) -> int:
    """The shared memory of a block."""
    matrices = 3 * UNITS * C * UNITS + 2 * C * UNITS * N
    return 2 * matrices + 4 * (2 * 3 * UNITS * N + UNITS * N + 2 * FLAGS)


def kernel(
    eq: Equations, tiles: Tiles, T: int, reverse: bool, sequence: bool, resets: bool
) -> Callable:
    """Returns (R, b_n), (x, h_all, h, back, resets_next) -> (all h_t,), or (the last one,)."""
    C, N, operand = tiles
    gate, state, rows = GATES[eq.gate], STATES[eq.state], (UNITS, N)

    def body(
        net, tile, block, R, b_n, x, h_all, h_own, back, resets_next, out,
        R_s, h_s, x_s, y_s, reset_s, once, came, sent,
    ):  # fmt: skip
        mine = block * UNITS

        def registers(source):
            return _gpu.registers(source, y_s, once)

        def fetch(i):
            slot, t = lax.rem(i, jnp.int32(2)), T - 1 - i if reverse else i
            plgpu.copy_gmem_to_smem(x.at[net, tile, t, block], x_s.at[slot], came.at[slot])
            if resets:
                flags = resets_next.at[net, tile, t]
                place = reset_s.at[slot, pl.ds(0, N)]
                plgpu.copy_gmem_to_smem(flags, place, came.at[slot])

        _gpu.load(R.at[net, block], R_s, once)
        _gpu.load(h_all.at[net, tile], h_s.at[0], once)
        b, h = registers(b_n.at[net, block]), registers(h_own.at[net, tile, block])
        start = registers(back.at[net, tile, block]) if resets else h
        fetch(jnp.int32(0))

        def step(i, h):
            i = jnp.int32(i)  # which JAX counts in 64 bits where those are the default
            slot = lax.rem(i, jnp.int32(2))
            pl.when(i + 1 < T)(lambda: fetch(i + 1))
            if eq.reset_after:
                now, then = slot, 1 - slot
                Rh = _gpu.product([(R_s, h_s.at[now])], (3 * UNITS, N))
            else:
                now, then = 0, 0
                Rh = _gpu.product([(R_s.at[pl.ds(0, 2 * UNITS)], h_s.at[now])], (2 * UNITS, N))
            plgpu.barrier_wait(came.at[slot])
            x_r, x_z, x_n = (x_s[slot, pl.ds(g * UNITS, UNITS)] for g in range(3))
            r = gate(x_r + Rh[:UNITS])
            z = gate(x_z + Rh[UNITS : 2 * UNITS])
            if eq.reset_after:
                n = state(x_n + r * (Rh[2 * UNITS :] + b))
            else:
                _gpu.send((r * h).astype(operand), h_s.at[1], mine, sent.at[1], C)
                _gpu.receive(sent.at[1], C)
                R_n = R_s.at[pl.ds(2 * UNITS, UNITS)]
                n = state(x_n + _gpu.product([(R_n, h_s.at[1])], rows))
            h = (1.0 - z) * n + z * h
            enters = h
            if resets:
                enters = jnp.where(
                    lax.broadcast_in_dim(reset_s[slot, pl.ds(0, N)], rows, (1,)) > 0, start, h
                )
            _gpu.send(enters.astype(operand), h_s.at[then], mine, sent.at[then], C)
            if sequence:
                _gpu.write(h, y_s, out.at[net, tile, T - 1 - i if reverse else i, block])
            _gpu.receive(sent.at[then], C)
            return enters

        h = lax.fori_loop(0, T, step, h)
        if not sequence:
            _gpu.write(h, y_s, out.at[net, tile, block])
        plgpu.wait_smem_to_gmem(0)

    scratch = (
        _gpu.shared((3 * UNITS, C * UNITS), operand, N),
        _gpu.shared((2, C * UNITS, N), operand, N),
        _gpu.shared((2, 3 * UNITS, N), jnp.float32, N),
        _gpu.shared(rows, jnp.float32, N),
        plgpu.SMEM((2, FLAGS), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=1 + resets, num_barriers=2),
        plgpu.Barrier(num_arrivals=C, num_barriers=2),
    )
    shape = (T, C, *rows) if sequence else (C, *rows)
    return _gpu.launch(body, tiles, (jax.ShapeDtypeStruct(shape, jnp.float32),), scratch)


def tiles_for(shape: tuple[int, ...], half: str | None) -> Tiles | None:
    """How the loop lies on the GPU for states (*batch, H); None if it does not fit."""
    return None if half is None else _gpu.tiles_for(shape, half, shared_bytes)


def check(eq: Equations, half: str | None, unroll: int | None, shape: tuple[Any, ...]) -> None:
    """Raises where the kernel cannot run a layer with states (*batch, T, H), and says why."""
    *batch, _, H = shape
    # pyrefly: ignore[missing-attribute]
    precision = eq.precision or jax.config.jax_default_matmul_precision
    if not all(isinstance(size, int) for size in shape):
        reason = f"it needs fixed sizes, and those of (*batch, time, H) are {shape}"
    elif half is None:
        reason = "it multiplies in 16 bits, which does not suit float64"
    elif precision not in DEFAULT_PRECISIONS:
        reason = f"it multiplies in 16 bits, and precision is {precision!r}"
    elif eq.gate not in GATES or eq.state not in STATES:
        reason = "it knows the activation functions that have names, and no others"
    elif unroll not in (None, 1):
        reason = f"it has no loop to unroll, and unroll is {unroll}"
    elif tiles_for((*batch, H), half) is None:
        reason = f"{H} hidden units do not fit into the shared memory of a cluster; 448 do"
    else:
        return
    raise ValueError(
        f"implementation 'pallas' cannot run this: {reason}. Pass implementation=None or 'scan'."
    )


def states(loop: Loop, tiles: Tiles, given: Given, flags: Flags) -> Results:
    """Runs the recurrence."""
    eq, (learn, x, enter, back) = loop.equations, given
    batch, T, H = enter.shape[:-1], x.shape[TIME], enter.shape[-1]
    parts = list(_products.input_parts(eq, _products.thirds(learn))(x))
    if flags.skip is not None:
        parts[1] = jnp.where(flags.skip, jnp.inf, parts[1])
    parts = _gpu.pack(tiles, *(_gpu.flat(part, 2) for part in parts))
    enter, back = _gpu.flat(enter, 1), _gpu.flat(back, 1)
    resets_next = jnp.zeros((parts.shape[0], 1, tiles.columns), jnp.float32)
    if flags.reset is not None:
        reset = _gpu.flat(flags.reset[..., 0], 1)
        first, rest = (
            (reset[:, -1:], reset[:, :-1]) if loop.reverse else (reset[:, :1], reset[:, 1:])
        )
        enter = jnp.where(first, back, enter)
        none = jnp.zeros_like(first)
        order = (none, rest) if loop.reverse else (rest, none)
        resets_next = _gpu.pack_flags(tiles, jnp.concatenate(order, axis=1))

    pack = partial(_gpu.pack_state, tiles)
    own = pack(enter)
    everyone = pack(_gpu.in_range(enter, tiles.operand)).astype(tiles.operand)
    everyone = everyone.reshape(own.shape[0], -1, tiles.columns)
    data = (parts, everyone, own, pack(_gpu.in_range(back, tiles.operand)), resets_next)
    run = kernel(eq, tiles, T, loop.reverse, loop.sequence, flags.reset is not None)
    (out,) = run((_rows(tiles, loop, learn), _bias(tiles, learn)), tuple(a[None] for a in data))
    if not loop.sequence:
        last = _gpu.unpack(out[0][:, None], enter.shape[0], H)
        return Results(None, last.reshape(*batch, H))
    hs = _gpu.unpack(out[0], enter.shape[0], H).reshape(*batch, T, H)
    return Results(hs, hs[..., 0 if loop.reverse else -1, :])


def _rows(tiles: Tiles, loop: Loop, learn: _products.Learnables) -> jax.Array:
    """R for each block, (1, C, 192, 64 C); with a projector the product R Q_oᵀ."""
    R = _gpu.dense(loop.equations, learn)
    C, operand = tiles.blocks, tiles.operand
    R = _gpu.pad_units(R, C, (1, 2)).reshape(3, C, UNITS, C * UNITS)
    R = jnp.swapaxes(R, 0, 1).reshape(1, C, 3 * UNITS, C * UNITS)
    return _gpu.in_range(R, operand).astype(operand)


def _bias(tiles: Tiles, learn: _products.Learnables) -> jax.Array:
    """b_h̃ inside the reset, (1, C, 64, N); zeros in modes without it."""
    C, N = tiles.blocks, tiles.columns
    if learn.b_n is None:
        return jnp.zeros((1, C, UNITS, N), jnp.float32)
    b = _gpu.pad_units(learn.b_n, C, (0,)).reshape(1, C, UNITS, 1)
    return jnp.broadcast_to(b, (1, C, UNITS, N))
