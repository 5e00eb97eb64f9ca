"""The derivative rule of a GRU as one writes it by hand for a single purpose.

The library's rule, which serves every mode and every derivative, is held against it. This one knows
dense weights in recurrent-bias mode, whole sequences from a zero state, and reverse mode. With δ_t
the gradient of h_t, g_t what of it comes from y_t, and a = R_h̃ h_{t-1} + b_Rh̃:

    c_n = (1 − z) ⊙ (1 − n²)    c_z = (h_{t-1} − n) ⊙ z ⊙ (1 − z)    c_r = c_n ⊙ a ⊙ r ⊙ (1 − r)
    δ_{t-1} = g_{t-1} + z ⊙ δ_t + R_rᵀ (c_r ⊙ δ_t) + R_zᵀ (c_z ⊙ δ_t) + R_h̃ᵀ (r ⊙ c_n ⊙ δ_t)

The forward loop keeps r, z and the three c, the backward loop stores δ, and all other gradients are
products over a block of time. Arrays are (batch, time, channels).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import GRUParams

FORWARD, BACKWARD = 5 * 2**18, 5 * 2**17  # numbers in three arrays (B, steps of a block, H)

at = partial(lax.dynamic_index_in_dim, axis=1, keepdims=False, allow_negative_indices=False)
put = partial(lax.dynamic_update_index_in_dim, axis=1, allow_negative_indices=False)
block_of = partial(lax.dynamic_slice_in_dim, axis=1, allow_negative_indices=False)


@jax.custom_vjp
def gru(params: GRUParams, x: jax.Array) -> jax.Array:
    """Returns y (B, T, H) of x (B, T, I)."""
    return _forward(params, x, keep=False)[0]


def _forward(params: GRUParams, x: jax.Array, keep: bool = True) -> tuple[jax.Array, tuple]:
    """The outputs, and what the derivative needs; r, z, c_r, c_z, c_n of all steps if wanted."""
    W, R, b, b_R = _by_gate(params)
    (B, T, _), H = x.shape, R.shape[1]
    b = b.at[:2].add(b_R[:2])
    W, R = [W_g.T for W_g in W], params.recurrent_weights.T
    if B > 1:  # transposed once; one row at a time reads the matrices as they are
        W, R = lax.optimization_barrier((W, R))
    size = _block_size(T, 3 * B * H, FORWARD)

    def block(k: Any, carry: tuple) -> tuple:
        parts = [block_of(x, k * size, size) @ W[i] + b[i] for i in range(3)]

        def step(i: Any, carry: tuple) -> tuple:
            h, y, kept = carry
            (x_r, x_z, x_n), (r, z, a) = (at(p, i) for p in parts), jnp.split(h @ R, 3, axis=-1)
            r, z, a = jax.nn.sigmoid(x_r + r), jax.nn.sigmoid(x_z + z), a + b_R[2]
            n = jnp.tanh(x_n + r * a)
            c_n = (1 - z) * (1 - n * n)
            now = r, z, c_n * a * (r * (1 - r)), (h - n) * (z * (1 - z)), c_n
            h, t = (1 - z) * n + z * h, k * size + i
            kept = tuple(put(c, c_t, t) for c, c_t in zip(kept, now, strict=True)) if keep else ()
            return h, put(y, h, t), kept

        return lax.fori_loop(0, size, step, carry)

    # To be overwritten. They differ: of equal arrays XLA makes one, and copies it.
    y, *kept = (jnp.full((B, T, H), k, x.dtype) for k in range(6 if keep else 1))
    carry = jnp.zeros((B, H), x.dtype), y, tuple(kept)
    _, y, kept = lax.fori_loop(0, T // size, block, carry)
    return y, (params, x, y, kept)


def _gradients(known: tuple, g: jax.Array) -> tuple[GRUParams, jax.Array]:
    """The gradients of the learnables and of x."""
    params, x, y, kept = known
    (W, R, *_), (B, T, H) = _by_gate(params), y.shape
    size = _block_size(T, 3 * B * H, BACKWARD)
    over_time = partial(jnp.tensordot, axes=((0, 1), (0, 1)))

    def block(m: Any, carry: tuple) -> tuple:
        begin = T - (m + 1) * size

        def step(m: Any, carry: tuple) -> tuple:
            dh, dhs = carry
            i = size - 1 - m
            r, z, c_r, c_z, c_n = (at(c, begin + i) for c in kept)
            dh = dh + at(g, begin + i)
            back = jnp.stack([c_r * dh, c_z * dh, r * c_n * dh], axis=1)
            return z * dh + jnp.tensordot(back, R, 2), put(dhs, dh, i)

        dh, dx, sums = carry
        dh, dhs = lax.fori_loop(0, size, step, (dh, jnp.full((B, size, H), 6, x.dtype)))
        r, _, *coefficients = (block_of(c, begin, size) for c in kept)
        dr, dz, dn = (c * dhs for c in coefficients)
        of_x, of_h = (dr, dz, dn), (dr, dz, r * dn)  # of W x + b_W and of R h + b_R, by gate
        first = jnp.where(begin > 0, at(y, jnp.maximum(begin - 1, 0)), 0)
        before = jnp.concatenate([first[:, None], block_of(y, begin, size)[:, :-1]], axis=1)
        pairs = (of_x, block_of(x, begin, size)), (of_h, before)
        more = [[over_time(d, a) for d in ds] for ds, a in pairs]
        more += [[d.sum((0, 1)) for d in ds] for ds, _ in pairs]
        d_x = dr @ W[0] + dz @ W[1] + dn @ W[2]
        dx = lax.dynamic_update_slice_in_dim(dx, d_x, begin, 1, allow_negative_indices=False)
        return dh, dx, jax.tree.map(jnp.add, sums, more)

    sums = [[jnp.zeros_like(a_g) for a_g in a] for a in _by_gate(params)]
    carry = jnp.zeros((B, H), x.dtype), jnp.full_like(x, 7), sums
    _, dx, (dW, dR, db, db_R) = lax.fori_loop(0, T // size, block, carry)
    dW, dR, db = (jnp.concatenate(gates) for gates in (dW, dR, db + db_R))
    return params.replace(input_weights=dW, recurrent_weights=dR, bias=db), dx


gru.defvjp(_forward, _gradients)


def _by_gate(params: GRUParams) -> tuple[jax.Array, ...]:
    """W (3, H, I), R (3, H, H), b_W (3, H) and b_R (3, H)."""
    W, R = (a.reshape(3, -1, a.shape[1]) for a in (params.input_weights, params.recurrent_weights))
    return W, R, *params.bias.reshape(2, 3, -1)


def _block_size(T: int, numbers: int, most: int) -> int:
    """The largest divisor of T with which a block has few enough numbers, given those of a step."""
    return max(n for n in range(1, T + 1) if T % n == 0 and (n == 1 or n * numbers <= most))
