"""The equations of the GRU: one step, and the coefficients of its derivative.

Letters: H hidden units, I input channels, P the columns of R (H, or P_o with an output projector).
Rows are in the order reset, update, candidate. Everything broadcasts over leading axes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import _activations, _arguments, _checks
from gru_jax._params import RESET_MODES, GRUParams


class Equations(NamedTuple):
    """Which GRU it is: static, hashable."""

    reset_after: bool
    gate: Callable  # σ_g
    state: Callable  # σ_s
    precision: Any


class Recurrent(NamedTuple):
    """The learnables inside the recurrence, cut once before the loop."""

    weights: jax.Array  # rows that multiply h: (3, H, P), or (2, H, P) where the reset comes before
    candidate: Any  # rows that multiply r ⊙ h, (H, P), where the reset comes before, else None
    bias: jax.Array | None  # b_Rh̃, (H,), in recurrent-bias mode
    projector: jax.Array | None  # Q_oᵀ, (P_o, H)


Parts = tuple[jax.Array, jax.Array, jax.Array]


def gru_cell(params: GRUParams, h: jax.Array, x: jax.Array, *, precision: Any = None) -> jax.Array:
    """Takes one step of a GRU: the new hidden state from the old one and one input.

    The GRU of Cho et al. 2014. As there, and in PyTorch, ONNX and MATLAB, z keeps the old state::

        r_t = σ_g(W_r x_t + b_Wr + R_r h_{t-1} [+ b_Rr])
        z_t = σ_g(W_z x_t + b_Wz + R_z h_{t-1} [+ b_Rz])
        h̃_t = σ_s(W_h̃ x_t + b_Wh̃ + r_t ⊙ (R_h̃ h_{t-1}))            after-multiplication
        h̃_t = σ_s(W_h̃ x_t + b_Wh̃ + R_h̃ (r_t ⊙ h_{t-1}))            before-multiplication
        h̃_t = σ_s(W_h̃ x_t + b_Wh̃ + r_t ⊙ (R_h̃ h_{t-1} + b_Rh̃))   recurrent-bias-after-multiplication
        h_t = (1 − z_t) ⊙ h̃_t + z_t ⊙ h_{t-1}

    The terms in [ ] belong to the recurrent-bias mode. With projectors every W x is W'(Q_iᵀ x) and
    every R v is R'(Q_oᵀ v). PyTorch and cuDNN compute the recurrent-bias mode, Flax nnx the first,
    Keras with `reset_after=False` and Haiku the second (Haiku with z inverted).

    Args:
      params: the learnables and the mode; rows in the order reset, update, candidate.
      h: state, shape (*batch, H).
      x: input, shape (*batch, I).
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      The new state, shape (*batch, H), in the dtype of `h`; computed in float32 at least.

    Raises:
      TypeError: an argument is not of a floating-point type.
      ValueError: shapes do not fit.

    References:
      Cho et al. 2014, arXiv:1406.1078.

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> gru_jax.gru_cell(params, jnp.zeros((2, 5)), jnp.ones((2, 3))).shape
      (2, 5)
    """
    sizes = _arguments.sizes_of(params)
    x = _arguments.check_x(x, sizes, ndim=1)
    h = _arguments.check_state("h", h, x.shape[:-1], sizes.num_hidden_units)
    return _gru_cell(_checks.precision("precision", precision), params, h, x)


@partial(jax.jit, static_argnums=0)
def _gru_cell(precision: Any, params: GRUParams, h: jax.Array, x: jax.Array) -> jax.Array:
    _, dtype = _arguments.result_dtypes(x, h, *params.arrays().values())
    params, wide_h, x = jax.tree.map(lambda a: a.astype(dtype), (params, h, x))
    parts = input_parts(params, x, precision)
    return step(equations(params, precision), recurrent(params), wide_h, parts).astype(h.dtype)


def equations(params: GRUParams, precision: Any = None) -> Equations:
    """The static side of the parameters."""
    return Equations(
        RESET_MODES[params.reset_gate_mode].reset_after,
        _activations.gate_function(params.gate_activation_function),
        _activations.state_function(params.state_activation_function),
        precision,
    )


def recurrent(params: GRUParams) -> Recurrent:
    """The learnables of the recurrence."""
    mode = RESET_MODES[params.reset_gate_mode]
    R = params.recurrent_weights
    H = R.shape[0] // 3
    R = R.reshape(3, H, R.shape[1])
    Q = params.output_projector
    return Recurrent(
        R if mode.reset_after else R[:2],
        None if mode.reset_after else R[2],
        params.bias[5 * H :] if mode.recurrent_bias else None,
        None if Q is None else Q.T,
    )


def input_parts(params: GRUParams, x: jax.Array, precision: Any = None) -> Parts:
    """W_g x + b_g for the three gates; b_Rr and b_Rz, which nothing multiplies, are added here too.

    Three arrays of shape (*batch, H) and not one of 3H: a loop that reads them needs no slices.
    """
    H = params.recurrent_weights.shape[0] // 3
    b = params.bias[: 3 * H].reshape(3, H)
    if RESET_MODES[params.reset_gate_mode].recurrent_bias:
        b = b.at[:2].add(params.bias[3 * H : 5 * H].reshape(2, H))
    if params.input_projector is not None:
        x = times(params.input_projector.T, x, precision)
    W = params.input_weights.reshape(3, H, x.shape[-1])
    x_r, x_z, x_n = (add_row(times(W[g], x, precision), b[g]) for g in range(3))
    return x_r, x_z, x_n


def step(eq: Equations, rec: Recurrent, h: jax.Array, x: Parts) -> jax.Array:
    """h_t from h_{t-1} and the input parts: the step that `jax.lax.scan` runs."""
    x_r, x_z, x_n = x
    Rh = times(rec.weights, project(eq, rec, h), eq.precision)
    r = eq.gate(x_r + Rh[..., 0, :])
    z = eq.gate(x_z + Rh[..., 1, :])
    if eq.reset_after:
        n = eq.state(x_n + r * _with_bias(rec, Rh[..., 2, :]))
    else:
        n = eq.state(x_n + times(rec.candidate, project(eq, rec, r * h), eq.precision))
    return (1.0 - z) * n + z * h


def coefficients(eq: Equations, rec: Recurrent, h: jax.Array, x: Parts) -> tuple[jax.Array, ...]:
    """The coefficients of the linear map dh_{t-1} → dh_t that `linear_step` applies.

    σ_g' and σ_s' are the slopes at the arguments of the gate in question:

        reset after:   z,  C = [(1−z) σ_s' (R_h̃ h + b) σ_g'(r),  (h − h̃) σ_g'(z),  (1−z) σ_s' r]
        reset before:  z,  r,  c_r = h σ_g'(r),  c_z = (h − h̃) σ_g'(z),  c_n = (1−z) σ_s'
    """
    x_r, x_z, x_n = x
    Rh = times(rec.weights, project(eq, rec, h), eq.precision)
    r, dr = _value_and_slope(eq.gate, x_r + Rh[..., 0, :])
    z, dz = _value_and_slope(eq.gate, x_z + Rh[..., 1, :])
    if eq.reset_after:
        a = _with_bias(rec, Rh[..., 2, :])
        n, dn = _value_and_slope(eq.state, x_n + r * a)
        dn = (1.0 - z) * dn
        return z, jnp.stack([dn * a * dr, (h - n) * dz, dn * r], axis=-2)
    a = times(rec.candidate, project(eq, rec, r * h), eq.precision)
    n, dn = _value_and_slope(eq.state, x_n + a)
    return z, r, h * dr, (h - n) * dz, (1.0 - z) * dn


def linear_step(
    eq: Equations, rec: Recurrent, c: tuple[jax.Array, ...], dh: jax.Array
) -> jax.Array:
    """Returns J_t dh, linear in dh.

    reset after:   z dh + Σ_g C_g ⊙ (R_g dh)
    reset before:  z dh + c_z ⊙ (R_z dh) + c_n ⊙ R_h̃ (c_r ⊙ (R_r dh) + r ⊙ dh)
    """
    Rd = times(rec.weights, project(eq, rec, dh), eq.precision)
    if eq.reset_after:
        z, C = c
        return z * dh + jnp.sum(C * Rd, axis=-2)
    z, r, c_r, c_z, c_n = c
    inner = project(eq, rec, c_r * Rd[..., 0, :] + r * dh)
    return z * dh + c_z * Rd[..., 1, :] + c_n * times(rec.candidate, inner, eq.precision)


def project(eq: Equations, rec: Recurrent, v: jax.Array) -> jax.Array:
    """Q_oᵀ v, or v where there is no output projector."""
    return v if rec.projector is None else times(rec.projector, v, eq.precision)


def times(matrix: jax.Array, v: jax.Array, precision: Any) -> jax.Array:
    """M v for every vector v in the last axis: (..., n) and (*rows, n) give (..., *rows)."""
    contract = ((v.ndim - 1,), (matrix.ndim - 1,))
    return lax.dot_general(v, matrix, (contract, ((), ())), precision=precision)


def add_row(array: jax.Array, row: jax.Array) -> jax.Array:
    """Array + row, the row standing for every leading index."""
    return array + jnp.expand_dims(row, tuple(range(array.ndim - 1)))


def _with_bias(rec: Recurrent, Rh: jax.Array) -> jax.Array:
    return Rh if rec.bias is None else add_row(Rh, rec.bias)


def _value_and_slope(function: Callable, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(function, (a,), (jnp.ones_like(a),))
