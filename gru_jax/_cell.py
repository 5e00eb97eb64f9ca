"""The equations of the GRU: one step, its coefficients, and the linear steps of its derivative.

The letters are those of `_products`. Everything broadcasts over leading axes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gru_jax import _arguments, _checks
from gru_jax._params import GRUParams
from gru_jax._products import (
    Equations,
    Learnables,
    Products,
    Three,
    cut,
    dense,
    equations,
    in_bulk,
    in_loop,
    in_step,
    input_parts,
    input_row,
    learnables,
    project,
    project_inputs,
    row,
    sum_of_transposed,
    times,
)


class Coefficients(NamedTuple):
    """Of the linear map dh_{t-1} → dh_t; σ_g' and σ_s' at the arguments of the gate in question."""

    z: jax.Array
    r: jax.Array
    c_r: jax.Array  # reset after: (1−z) σ_s' (R_h̃ h + b_Rh̃) σ_g'(r); reset before: h σ_g'(r)
    c_z: jax.Array  # (h − h̃) σ_g'(z)
    c_n: jax.Array  # (1−z) σ_s'


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
    eq, learn = equations(params, precision), learnables(params)
    x_g = input_row(eq, learn, project_inputs(params, x, precision))
    one_row = math.prod(h.shape[:-1]) == 1
    by = in_step(eq, learn) if one_row else in_loop(eq, learn)
    return step(eq, learn, by, wide_h, x_g)[0].astype(h.dtype)


def step(
    eq: Equations, learn: Learnables, by: Products, h: jax.Array, x: Three
) -> tuple[jax.Array, Coefficients]:
    """h_t from h_{t-1} and the input parts, and the coefficients of its derivative.

    Where the coefficients are not used, they are not computed: the compiler drops them.
    """
    x_r, x_z, x_n = x
    Rh_r, Rh_z, Rh_n = by.gates(h)
    r, dr = _value_and_slope(eq.gate, x_r + Rh_r)
    z, dz = _value_and_slope(eq.gate, x_z + Rh_z)
    if eq.reset_after:
        a = Rh_n if learn.b_n is None else Rh_n + row(learn.b_n, h)
        n, dn = _value_and_slope(eq.state, x_n + r * a)
        c_n = (1.0 - z) * dn
        c_r = c_n * a * dr
    else:
        n, dn = _value_and_slope(eq.state, x_n + by.candidate(r * h))
        c_n = (1.0 - z) * dn
        c_r = h * dr
    return (1.0 - z) * n + z * h, Coefficients(z, r, c_r, (h - n) * dz, c_n)


def linear_step(eq: Equations, by: Products, c: Coefficients, dh: jax.Array) -> jax.Array:
    """J dh: what a change of the state before a step makes of the state after it.

    reset after:   z dh + c_r (R_r dh) + c_z (R_z dh) + c_n r (R_h̃ dh)
    reset before:  z dh + c_z (R_z dh) + c_n R_h̃ (c_r (R_r dh) + r dh)
    """
    p_r, p_z, p_n = by.gates(dh)
    if eq.reset_after:
        return c.z * dh + c.c_r * p_r + c.c_z * p_z + c.c_n * c.r * p_n
    return c.z * dh + c.c_z * p_z + c.c_n * by.candidate(c.c_r * p_r + c.r * dh)


def jacobian(eq: Equations, by: Products, c: Coefficients) -> jax.Array:
    """Jᵀ, (*batch, H, H): `linear_step` of every unit vector, each a row."""
    H = c.z.shape[-1]
    identity = jnp.expand_dims(jnp.eye(H, dtype=c.z.dtype), tuple(range(c.z.ndim - 1)))
    each = jax.tree.map(lambda a: jnp.expand_dims(a, -2), c)
    return linear_step(eq, by, each, identity)


def diagonal(eq: Equations, learn: Learnables, c: Coefficients) -> jax.Array:
    """The diagonal of J, (*batch, H).

    reset after:   z + c_r diag R_r + c_z diag R_z + c_n r diag R_h̃
    reset before:  z + c_z diag R_z + c_n (r diag R_h̃ + (R_h̃ ⊙ R_rᵀ) c_r)
    """
    R_r, R_z, R_n = cut(dense(eq, learn), 3, 0)
    r, z, n = (row(jnp.diagonal(R_g), c.z) for R_g in (R_r, R_z, R_n))
    if eq.reset_after:
        return c.z + c.c_r * r + c.c_z * z + c.c_n * c.r * n
    return c.z + c.c_z * z + c.c_n * (c.r * n + times(R_n * R_r.T, c.c_r, eq.precision))


def forcing(
    eq: Equations, learn: Learnables, c: Coefficients, h: jax.Array, x: jax.Array,
    d_learn: Learnables, dx: jax.Array,
) -> jax.Array:  # fmt: skip
    """u: what changes of the learnables and of the inputs add to the state after a step.

    As `linear_step`, with dR_g h + dW_g x + W_g dx + db_g in place of R_g dh. All in thirds.
    """
    parts = lambda learn, x: input_parts(eq, learn)(x)  # noqa: E731
    _, (x_r, x_z, x_n) = jax.jvp(parts, (learn, x), (d_learn, dx))
    _, p = jax.jvp(lambda learn: in_bulk(eq, learn).gates(h), (learn,), (d_learn,))
    e_r, e_z = x_r + p[0], x_z + p[1]
    if eq.reset_after:
        p_n = p[2] if d_learn.b_n is None else p[2] + row(d_learn.b_n, h)
        return c.c_r * e_r + c.c_z * e_z + c.c_n * (x_n + c.r * p_n)
    candidate = lambda learn, v: in_bulk(eq, learn).candidate(v)  # noqa: E731
    _, p_n = jax.jvp(candidate, (learn, c.r * h), (d_learn, c.c_r * e_r))
    return c.c_z * e_z + c.c_n * (x_n + p_n)


def adjoint_step(eq: Equations, learn: Learnables) -> Callable:
    """Returns (c, dh) -> Jᵀ dh, s: the transpose of `linear_step`, and what Q multiplies there.

    reset after:   z dh + R_rᵀ (c_r dh) + R_zᵀ (c_z dh) + R_h̃ᵀ (c_n r dh)
    reset before:  z dh + r m + R_rᵀ (c_r m) + R_zᵀ (c_z dh),  m = R_h̃ᵀ (c_n dh)
    """
    H = learn.R.shape[0] // 3
    R = learn.R.reshape(3, H, learn.R.shape[1])

    def back(R: jax.Array, parts: tuple) -> tuple:
        s = sum_of_transposed(eq, R, parts)
        return (s, ()) if learn.Q is None else (times(learn.Q, s, eq.precision), (s,))

    def after(c: Coefficients, dh: jax.Array) -> tuple:
        m, s = back(R, (c.c_r * dh, c.c_z * dh, c.c_n * c.r * dh))
        return c.z * dh + m, s

    R_rz, R_n = R[:2], R[2:]

    def before(c: Coefficients, dh: jax.Array) -> tuple:
        m, s_n = back(R_n, (c.c_n * dh,))
        m_rz, s_rz = back(R_rz, (c.c_r * m, c.c_z * dh))
        return c.z * dh + c.r * m + m_rz, s_rz + s_n

    return after if eq.reset_after else before


def adjoint_forcing(
    eq: Equations, learn: Learnables, c: Coefficients, h: jax.Array, x: jax.Array,
    dh: jax.Array, s: tuple | None = None,
) -> tuple[Learnables, jax.Array]:  # fmt: skip
    """The transpose of `forcing`; `dh` and `s` are what `adjoint_step` took and gave beside Jᵀ dh.

    dQ = Σ v sᵀ over the steps, v being what Qᵀ multiplies: h and, reset before, r h. Without `s`
    it takes a product more.
    """
    d_learn, dx = jax.linear_transpose(partial(forcing, eq, learn, c, h, x), learn, x)(dh)
    if learn.Q is None or s is None:
        return d_learn, dx
    projections = lambda Q: [project(eq, Q, v) for v in (h, c.r * h)[: len(s)]]  # noqa: E731
    (dQ,) = jax.linear_transpose(projections, learn.Q)(list(s))
    return d_learn._replace(Q=dQ), dx


def _value_and_slope(function: Callable, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(function, (a,), (jnp.ones_like(a),))
