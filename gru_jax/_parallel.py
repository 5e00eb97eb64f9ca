"""`gru_parallel`: a sequence through the recurrence, all steps at once."""

from typing import Any

import jax

from gru_jax import _checks
from gru_jax._newton import Newton, ParallelInfo
from gru_jax._params import GRUParams
from gru_jax._sequence import Options, run_with_info


def gru_parallel(
    params: GRUParams,
    x: Any,
    h0: Any = None,
    *,
    jacobian: str = "full",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    output_mode: str = "sequence",
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array, ParallelInfo]:
    """Computes what `gru` computes, by Newton's method on all time steps at once.

    From a trajectory h that is not yet right, every step finds a better one::

        r_t = f(h_{t-1}, x_t) − h_t        how far h_t is from following from h_{t-1}, for all t
        d_t = J_t d_{t-1} + r_t            J_t = ∂f/∂h at h_{t-1}; for all t by an associative scan
        h_t ← h_t + d_t

    Networks that forget converge in a few steps however long the sequence is, chaotic ones do not
    at all. Each sequence of the batch is judged by itself, also by how far its steps amplify
    rounding. Where it has not converged, its outputs are those of the time loop, which then runs in
    the same program: the result is that of `gru` in any case, and `info` tells how it came about.

    The derivative is the exact one at the trajectory, the same linear recurrence run backwards, in
    parallel as well; it does not go through the iterations. Where one sequence has not converged,
    and in derivatives of derivatives, the linear recurrence is a loop.

    What it costs, for each sequence and for T steps of H units, beside the products with the
    inputs. Whether it pays is to be measured: `python -m examples.benchmarks.parallel_map`. It
    can where the device has idle cores, H is small and T long::

                          one after the other   multiplications        numbers in memory
        time loop         T                     3 T H²                 T H
        full, a step      2 log₂ T              T H³ + 12 T H²         about 3 T H²
        diagonal, a step  2 log₂ T              9 T H²                 about 40 T H

    with about 5 steps of the first kind, 13 of the second (20 in float64), and in the derivative
    one of the first, about 10 of the second. Where the reset comes before the multiplication, H³
    counts twice.

    Args:
      params: the learnables and the mode.
      x: inputs, shape (*batch, T, I).
      h0: initial state, shape (*batch, H), or (H,) for all sequences; zeros by default.
      jacobian: "full", or "diagonal": d then knows the diagonals of J_t alone. More steps, of less
        work and memory each.
      tolerance: the largest error in a state at which a sequence has converged, as estimated from
        d and from the response to rounding, relative to max(1, |h|). By default 5e-7 in float32 and
        5e-13 in float64. Networks with a long memory can need more in float32, where what they
        keep of roundings adds up.
      max_iterations: at most so many steps; 32 by default, or 100 with diagonals. A sequence that
        makes no progress is given up earlier.
      output_mode: "sequence" for all outputs, "last" for the final one.
      lengths: as in `gru`, like the following.
      mask: booleans, shape (*batch, T).
      resets: booleans, shape (*batch, T).
      reverse: process from each sequence's own last step to its first.
      precision: of the matrix products; those of the associative scan have the highest.

    Returns:
      y: outputs, shape (*batch, T, H), or (*batch, H) for "last".
      hidden: the final state, shape (*batch, H). Both typed as by `gru`.
      info: for each sequence `iterations`, `residual`, `error` and `converged`.

    Raises:
      TypeError: as `gru`; or `tolerance` is no number, `max_iterations` no integer.
      ValueError: as `gru`; `jacobian` is unknown, `tolerance` or `max_iterations` is not positive,
        or the number of steps is symbolic.

    References:
      Lim et al. 2024, arXiv:2309.12252 (Newton's method for recurrent networks); Gonzalez et al.
      2024, arXiv:2407.19115 (diagonals).

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> params = gru_jax.init_params(jax.random.key(0), 4, 3)
      >>> x = jax.random.normal(jax.random.key(1), (2, 100, 3))
      >>> y, hidden, info = gru_jax.gru_parallel(params, x)
      >>> y.shape, bool(info.converged.all()), bool((info.iterations < 10).all())
      ((2, 100, 4), True, True)
      >>> bool(jnp.allclose(y, gru_jax.gru(params, x)[0], rtol=0, atol=1e-6))
      True
    """
    newton = Newton(
        _checks.choice("jacobian", jacobian, ("full", "diagonal")),
        None if tolerance is None else _checks.static_number("tolerance", tolerance),
        _checks.size("max_iterations", max_iterations, None),
    )
    options = Options(output_mode, reverse, None, None, precision, "parallel")
    arrays = (x, h0, None, lengths, mask, resets)
    y, hidden, info = run_with_info(options, newton, params, *arrays)
    assert info is not None  # as it is where a loop runs
    return y, hidden, info
