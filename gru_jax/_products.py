"""What a step is made of: which GRU it is, its learnables, and how they multiply.

Letters: H hidden units, I input channels, P the columns of R (H, or P_o with an output projector).
Rows are in the order reset, update, candidate. Everything broadcasts over leading axes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from gru_jax import _activations
from gru_jax._params import RESET_MODES, GRUParams

ONE_CORE = 100_000  # numbers in a matrix that one core multiplies by a vector as fast as two
Three = tuple[jax.Array, jax.Array, jax.Array]  # for reset, update, candidate


class Equations(NamedTuple):
    """Which GRU it is: static, hashable."""

    reset_after: bool
    gate: Callable  # σ_g
    state: Callable  # σ_s
    precision: Any


class Learnables(NamedTuple):
    """What a step multiplies and adds; either whole matrices or, after `thirds`, one per gate."""

    W: Any  # (3H, I), or (3H, P_i) where the inputs come projected
    R: Any  # (3H, P)
    b: Any  # (3H,), b_Rr and b_Rz included
    b_n: jax.Array | None  # b_Rh̃, (H,), in recurrent-bias mode
    Q: jax.Array | None  # Q_o, (H, P_o)


class Products(NamedTuple):
    """How R multiplies the state: made once before a loop."""

    gates: Callable[[jax.Array], tuple]  # h -> R_r h, R_z h, R_h̃ h; no third if reset before
    candidate: Any  # v -> R_h̃ v, where the reset comes before


def equations(params: GRUParams, precision: Any = None) -> Equations:
    """The static side of the parameters."""
    return Equations(
        RESET_MODES[params.reset_gate_mode].reset_after,
        _activations.gate_function(params.gate_activation_function),
        _activations.state_function(params.state_activation_function),
        precision,
    )


def learnables(params: GRUParams) -> Learnables:
    """The learnables of a step; b_Rr and b_Rz, which nothing multiplies, join b_Wr and b_Wz."""
    H = params.recurrent_weights.shape[0] // 3
    b, b_n = params.bias[: 3 * H], None
    if RESET_MODES[params.reset_gate_mode].recurrent_bias:
        b = b.at[: 2 * H].add(params.bias[3 * H : 5 * H])
        b_n = params.bias[5 * H :]
    return Learnables(
        params.input_weights, params.recurrent_weights, b, b_n, params.output_projector
    )


def thirds(learn: Learnables) -> Learnables:
    """The same with W, R and b cut into one piece for each gate."""
    return learn._replace(W=cut(learn.W, 3, 0), R=cut(learn.R, 3, 0), b=cut(learn.b, 3, 0))


def wholes(learn: Learnables) -> Learnables:
    """Undoes `thirds`."""
    join = jnp.concatenate
    return learn._replace(W=join(learn.W), R=join(learn.R), b=join(learn.b))


def project_inputs(params: GRUParams, x: jax.Array, precision: Any = None) -> jax.Array:
    """Q_iᵀ x, or x where there is no input projector."""
    Q = params.input_projector
    return x if Q is None else times(Q, x, precision, axis=0)


def input_parts(
    eq: Equations, learn: Learnables, copied: bool = False, biased: bool = True
) -> Callable:
    """Returns x -> W_g x + b_g for the three gates, or W_g x; `learn` is cut into thirds.

    Three arrays of shape (*batch, H) and not one of 3H: a loop that reads them needs no slices.
    """
    Ws, axis = _laid_out(learn.W, copied)

    def parts(x: jax.Array) -> Three:
        x_r, x_z, x_n = (times(W, x, eq.precision, axis) for W in Ws)
        return with_biases(learn, (x_r, x_z, x_n)) if biased else (x_r, x_z, x_n)

    return parts


def with_biases(learn: Learnables, parts: Three) -> Three:
    """Adds b_g to W_g x for the three gates; `learn` is cut into thirds."""
    x_r, x_z, x_n = (part + row(b, part) for part, b in zip(parts, learn.b, strict=True))
    return x_r, x_z, x_n


def input_row(eq: Equations, learn: Learnables, x: jax.Array) -> Three:
    """The same from one product, for a single step; `learn` is whole."""
    x_r, x_z, x_n = cut(times(learn.W, x, eq.precision) + row(learn.b, x), 3)
    return x_r, x_z, x_n


def in_step(eq: Equations, learn: Learnables) -> Products:
    """All of R in every product: for one step of one row, where cutting R would cost a copy."""
    if eq.reset_after:
        return in_loop(eq, learn)

    def by_all(v: jax.Array) -> tuple:
        return cut(times(learn.R, project(eq, learn.Q, v), eq.precision), 3)

    return Products(lambda h: (*by_all(h)[:2], None), lambda v: by_all(v)[2])


def in_loop(
    eq: Equations, learn: Learnables, copied: bool = False, halved: bool = False
) -> Products:
    """One product for all gates that read h, cut out of R once: for a loop over time.

    `halved`, for loops that nobody differentiates: see `times_in_halves`.
    """
    H = learn.R.shape[0] // 3
    Rs = (learn.R,) if eq.reset_after else (learn.R[: 2 * H], learn.R[2 * H :])
    Rs, axis = _laid_out(Rs, copied)

    def by(R: jax.Array, v: jax.Array) -> jax.Array:
        product = times_in_halves if halved else times
        return product(R, project(eq, learn.Q, v), eq.precision, axis)

    if eq.reset_after:
        return Products(lambda h: cut(by(Rs[0], h), 3), None)
    return Products(lambda h: (*cut(by(Rs[0], h), 2), None), partial(by, Rs[1]))


def in_bulk(eq: Equations, learn: Learnables) -> Products:
    """A product for each gate: for many steps at once; `learn` is cut into thirds."""

    def by(Rs: tuple, v: jax.Array) -> list:
        v = project(eq, learn.Q, v)
        return [times(R, v, eq.precision) for R in Rs]

    if eq.reset_after:
        return Products(lambda h: tuple(by(learn.R, h)), None)
    return Products(lambda h: (*by(learn.R[:2], h), None), lambda v: by(learn.R[2:], v)[0])


def times(matrix: jax.Array, v: jax.Array, precision: Any, axis: int = 1) -> jax.Array:
    """M v for every vector v in the last axis: (..., n) and (m, n) give (..., m). Axis 0: Mᵀ v."""
    return lax.dot_general(v, matrix, (((v.ndim - 1,), (axis,)), ((), ())), precision=precision)


def times_in_halves(matrix: jax.Array, v: jax.Array, precision: Any, axis: int = 1) -> jax.Array:
    """`times` for a single vector; on CPUs, XLA gives each half of a large matrix a core.

    Vectors that `jax.vmap` adds make it a product of matrices, which needs no such help.
    """
    whole = partial(times, precision=precision, axis=axis)
    if v.ndim > 1 or matrix.size < ONE_CORE or matrix.shape[0] % 2:
        return whole(matrix, v)

    @custom_vmap
    def product(matrix: jax.Array, v: jax.Array) -> jax.Array:
        halves = matrix.reshape(2, -1, matrix.shape[1])
        both = jnp.broadcast_to(v, (2, v.size)) if axis else v.reshape(2, -1)
        parts = lax.dot_general(
            both, halves, (((1,), (1 + axis,)), ((0,), (0,))), precision=precision
        )
        return parts.reshape(-1) if axis else parts.sum(0)

    @product.def_vmap
    def _(size: int, mapped: list, *operands: jax.Array) -> tuple[jax.Array, bool]:
        return jax.vmap(whole, [0 if one else None for one in mapped])(*operands), True

    return lax.platform_dependent(matrix, v, cpu=product, default=whole)


def project(eq: Equations, Q: jax.Array | None, v: jax.Array) -> jax.Array:
    """Qᵀ v, or v where there is no output projector."""
    return v if Q is None else times(Q, v, eq.precision, axis=0)


def dense(eq: Equations, learn: Learnables) -> jax.Array:
    """R, or R Q_oᵀ with an output projector: (3H, H); `learn` is whole."""
    return learn.R if learn.Q is None else times(learn.Q, learn.R, eq.precision)


def sum_of_transposed(eq: Equations, R: jax.Array, parts: tuple) -> jax.Array:
    """Σ_g R_gᵀ v_g as one product, for loops that nobody differentiates; R is (gates, H, P)."""
    if parts[0].ndim == 1:
        v = jnp.concatenate(parts)
        return times_in_halves(R.reshape(v.size, -1), v, eq.precision, axis=0)
    v = jnp.stack(parts, axis=-2)
    contract = ((v.ndim - 2, v.ndim - 1), (0, 1))
    return lax.dot_general(v, R, (contract, ((), ())), precision=eq.precision)


def _laid_out(matrices: tuple, copied: bool) -> tuple[tuple, int]:
    """The matrices and the axis that products sum over.

    Products of many rows are faster with a transposed copy, if it is made once, before a loop.
    """
    if not copied:
        return matrices, 1
    return lax.optimization_barrier(tuple(M.T for M in matrices)), 0


def row(row: jax.Array, like: jax.Array) -> jax.Array:
    """The row with as many axes as `like`: it stands for every leading index."""
    return jnp.expand_dims(row, tuple(range(like.ndim - 1)))


def cut(a: jax.Array, pieces: int, axis: int = -1) -> tuple:
    """Slices and not `lax.split`, whose transpose XLA miscompiles on CPUs in jax 0.10 (float64)."""
    n = a.shape[axis] // pieces
    return tuple(lax.slice_in_dim(a, i * n, (i + 1) * n, axis=axis) for i in range(pieces))
