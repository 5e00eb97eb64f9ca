"""The backward loop of the GRU, δ_{t-1} = J_tᵀ (δ_t + g_t), as one GPU kernel.

The loop carries the cotangent of the state alone; all coefficients of J_t are known before it, and
all gradients of learnables and inputs are large products after it (see `_derivative`). Block c of a
cluster (see `_gpu`) owns 64 hidden units of N batch rows. What lies where, C blocks:

    R_s (192, 64 C)         16 bit   the columns of R_r, R_z, R_h̃ for its units; all T
    e_s (2 or 1, 192 C, N)  16 bit   what R_rᵀ, R_zᵀ, R_h̃ᵀ multiply, of all units, for this and the
                                     next step. Reset before: for this step, filled in two turns
    c_s (2, 64 n, N)       float32   its n coefficients and g_t, of this and the next step
    o_s (64, N)            float32   δ_t + g_t of its units on its way out
    registers              float32   δ of its units

The 16 bits are bfloat16, whatever the layer's type: cotangents have no natural scale.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gru_jax import _gpu
from gru_jax._blocks import TIME
from gru_jax._cell import Coefficients
from gru_jax._gpu import FLAGS, UNITS, Tiles
from gru_jax._loop import Results
from gru_jax._products import Equations, Learnables

OPERAND = "bfloat16"


def shared_bytes(reset_after: bool, C: int, N: int) -> int:
    """The shared memory of a block."""
    turns, coefficients = (2, 5) if reset_after else (1, 6)
    matrices = 3 * UNITS * C * UNITS + turns * 3 * C * UNITS * N
    return 2 * matrices + 4 * ((2 * coefficients + 1) * UNITS * N + 2 * FLAGS)


def kernel(
    reset_after: bool, tiles: Tiles, T: int, reverse: bool, outputs: bool, resets: bool
) -> Callable:
    """Returns (R,), (rows, last, resets) -> (all δ_t + g_t, δ_0, the sum that resets return).

    `rows`: z, c_r, c_z, c_n r, or z, c_r, c_z, c_n, r if the reset comes before; then g_t, if there
    are `outputs`.
    """
    C, N, operand = tiles
    rows, K = (UNITS, N), C * UNITS
    count = (4 if reset_after else 5) + outputs

    def body(
        net, tile, block, R, c, last, resets_now, dhs, d_enter, d_back,
        R_s, e_s, c_s, o_s, reset_s, once, came, sent, sent_n,
    ):  # fmt: skip

        def send(value, slot, gate, barrier):
            row = gate * K + block * UNITS
            _gpu.send(value.astype(operand), e_s.at[slot], row, barrier, C)

        def time(i):
            return i if reverse else T - 1 - i

        def fetch(i):
            slot, t = lax.rem(i, jnp.int32(2)), time(i)
            plgpu.copy_gmem_to_smem(c.at[net, tile, t, block], c_s.at[slot], came.at[slot])
            if resets:
                flags = resets_now.at[net, tile, t]
                place = reset_s.at[slot, pl.ds(0, N)]
                plgpu.copy_gmem_to_smem(flags, place, came.at[slot])

        def sum_of(slot, gates):
            at = [(pl.ds(g * UNITS, UNITS), pl.ds(g * K, K)) for g in gates]
            return _gpu.product([(R_s.at[own], e_s.at[slot, all_]) for own, all_ in at], rows)

        def after(slot, dh, place, z, *others):
            for g, coefficient in enumerate(others):
                send(coefficient * dh, slot, g, sent.at[slot])
            _gpu.write(dh, o_s, place)
            _gpu.receive(sent.at[slot], C)
            return z * dh + sum_of(slot, (0, 1, 2))

        def before(slot, dh, place, z, c_r, c_z, c_n, r):
            send(c_n * dh, 0, 2, sent_n)
            _gpu.write(dh, o_s, place)
            _gpu.receive(sent_n, C)
            m = sum_of(0, (2,))
            send(c_r * m, 0, 0, sent.at[0])
            send(c_z * dh, 0, 1, sent.at[0])
            _gpu.receive(sent.at[0], C)
            return z * dh + r * m + sum_of(0, (0, 1))

        _gpu.load(R.at[net, block], R_s, once)
        dh = _gpu.registers(last.at[net, tile, block], o_s, once)
        fetch(jnp.int32(0))

        def step(i, carry):
            dh, back = carry
            i = jnp.int32(i)  # which JAX counts in 64 bits where those are the default
            slot = lax.rem(i, jnp.int32(2))
            pl.when(i + 1 < T)(lambda: fetch(i + 1))
            plgpu.barrier_wait(came.at[slot])
            known = [c_s[slot, pl.ds(n * UNITS, UNITS)] for n in range(count)]
            if outputs:
                dh = dh + known.pop()
            place = dhs.at[net, tile, time(i), block]
            dh = (after if reset_after else before)(slot, dh, place, *known)
            if resets:
                reset = lax.broadcast_in_dim(reset_s[slot, pl.ds(0, N)], rows, (1,)) > 0
                nothing = jnp.zeros_like(dh)
                dh, returned = jnp.where(reset, nothing, dh), jnp.where(reset, dh, nothing)
                back = back + returned
            return dh, back

        dh, back = lax.fori_loop(0, T, step, (dh, dh - dh))
        _gpu.write(dh, o_s, d_enter.at[net, tile, block])
        _gpu.write(back, o_s, d_back.at[net, tile, block])
        plgpu.wait_smem_to_gmem(0)

    scratch = (
        _gpu.shared((3 * UNITS, K), operand, N),
        _gpu.shared((2 if reset_after else 1, 3 * K, N), operand, N),
        _gpu.shared((2, count * UNITS, N), jnp.float32, N),
        _gpu.shared(rows, jnp.float32, N),
        plgpu.SMEM((2, FLAGS), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=1 + resets, num_barriers=2),
        plgpu.Barrier(num_arrivals=(3 if reset_after else 2) * C, num_barriers=2),
        plgpu.Barrier(num_arrivals=C),
    )
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = float32((T, C, *rows)), float32((C, *rows)), float32((C, *rows))
    return _gpu.launch(body, tiles, out, scratch)


def tiles_for(reset_after: bool, shape: tuple[int, ...]) -> Tiles | None:
    """How the loop lies on the GPU for states (*batch, H); None if it does not fit."""
    return _gpu.tiles_for(shape, OPERAND, partial(shared_bytes, reset_after))


def cotangents(
    eq: Equations, tiles: Tiles, reverse: bool, learn: Learnables, c: Coefficients,
    reset: jax.Array | None, ct: Results,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array]]:  # fmt: skip
    """δ_0, the sum of what resets return, and all δ_t + g_t, from the coefficients, g_t and δ_T."""
    g, last = ct
    batch, T, H = c.z.shape[:-2], c.z.shape[TIME], c.z.shape[-1]
    rows: list[Any] = [c.z, c.c_r, c.c_z]
    rows += [c.c_n * c.r] if eq.reset_after else [c.c_n, c.r]
    rows += [] if g is None else [g]
    packed = _gpu.pack(tiles, *(_gpu.flat(a, 2) for a in rows))
    start = _gpu.flat(last, 1)
    B, resets = start.shape[0], jnp.zeros((packed.shape[0], 1, tiles.columns), jnp.float32)
    if reset is not None:
        resets = _gpu.pack_flags(tiles, _gpu.flat(reset[..., 0], 1))
    run = kernel(eq.reset_after, tiles, T, reverse, g is not None, reset is not None)
    data = packed, _gpu.pack_state(tiles, start), resets
    dhs, *sums = run((_columns(tiles, eq, learn),), tuple(a[None] for a in data))
    d_enter, d_back = (_gpu.unpack(a[0][:, None], B, H).reshape(last.shape) for a in sums)
    return d_enter, d_back, (_gpu.unpack(dhs[0], B, H).reshape(*batch, T, H),)


def _columns(tiles: Tiles, eq: Equations, learn: Learnables) -> jax.Array:
    """R_rᵀ, R_zᵀ, R_h̃ᵀ for each block, (1, C, 192, 64 C)."""
    C = tiles.blocks
    R = _gpu.pad_units(jnp.swapaxes(_gpu.dense(eq, learn), 1, 2), C, (1, 2))
    R = jnp.swapaxes(R.reshape(3, C, UNITS, C * UNITS), 0, 1)
    return R.reshape(1, C, 3 * UNITS, C * UNITS).astype(tiles.operand)
