"""Compression by projection: smaller layers from trained ones and the data that they see.

The principal components of a layer's inputs and of its hidden states span subspaces in which
nearly all of their variance lies. With Q_i and Q_o orthonormal bases of these,

    W x ≈ W' (Q_iᵀ x),  W' = W Q_i        R h ≈ R' (Q_oᵀ h),  R' = R Q_o

which stores (3H + I)·P_i numbers instead of 3H·I and 4·H·P_o instead of 3H². The expected value of
what is dropped, taken over x_t and h_{t-1}, goes into the bias. Fine-tuning afterwards is highly
recommended.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from gru_jax import _arguments, _checks, _subspaces
from gru_jax._activity import NeuronPCA as NeuronPCA
from gru_jax._activity import analyse, check_enough, fold
from gru_jax._compression import neuron_pca_of as neuron_pca_of
from gru_jax._compression import project_model as project_model
from gru_jax._compression import unproject_model as unproject_model
from gru_jax._moments import Moments
from gru_jax._params import GRUParams, num_learnables
from gru_jax._plan import LayerInfo as LayerInfo
from gru_jax._plan import Plan, check_fraction
from gru_jax._plan import ProjectionInfo as ProjectionInfo
from gru_jax._plan import summary as summary

__all__ = [
    "LayerInfo",
    "NeuronPCA",
    "ProjectionInfo",
    "neuron_pca",
    "neuron_pca_of",
    "project",
    "project_dense",
    "project_model",
    "summary",
    "unproject",
    "unproject_model",
]


def neuron_pca(
    params: GRUParams,
    batches: Iterable[Any],
    *,
    key: Any = None,
    h0: Any = None,
    reverse: bool = False,
) -> NeuronPCA:
    """Analyses what a GRU does on data that represent the training set.

    Args:
      params: the parameters.
      batches: x of shape (*batch, time, channels), or pairs (x, lengths) with integers (*batch,),
        or (x, mask) with booleans (*batch, time). Padding never enters. They are taken once, one
        by one; how the data are cut into batches, and their order, make no difference.
      key: a JAX random key, to find out also how much the output depends on each neuron, for
        `project(..., method="output")`; costs four backward passes. Random directions are drawn
        anew for each batch; give each of several analyses a key of its own.
      h0: the state that sequences start from, (H,) or as in `gru_jax.gru`; zeros by default.
      reverse: the GRU runs backward in time, as one direction of a bidirectional layer does.

    Returns:
      The analysis; one serves for any number of goals. `analysis.inputs` and `analysis.states` have
      `mean`, `covariance`, `eigenvalues` and `explained_variance`, the curve over the number of
      directions. Analyses of parts of the data, as of several devices, merge: `one + two`.

    Raises:
      ValueError: fewer than two sequences or two time steps, NaN, an input channel that is
        constant, or wrong shapes.
      TypeError: wrong types, as in `gru_jax.gru`.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import projection
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> x = jax.random.normal(jax.random.key(1), (32, 50, 12))
      >>> pca = projection.neuron_pca(params, [x[:16], x[16:]])
      >>> pca, pca.states.explained_variance.shape
      (NeuronPCA(32 sequences, 1600 steps, 12 inputs, 100 hidden units), (100,))
    """
    total = None
    for n, batch in enumerate(batches):
        x, *flags = batch if isinstance(batch, tuple | list) else (batch,)
        if len(flags) > 1:
            raise ValueError(
                f"a batch must be x, (x, lengths) or (x, mask), got {len(batch)} parts."
            )
        kinds = ("mask" if np.asarray(flag).dtype == bool else "lengths" for flag in flags)
        how: dict[str, Any] = dict(zip(kinds, flags, strict=True))
        part = analyse(params, x, h0, key=fold(key, n), reverse=reverse, **how)
        total = part if total is None else total + part
    return check_enough("params", total)


def project(
    params: GRUParams,
    pca: NeuronPCA,
    explained_variance_goal: float | None = None,
    learnables_reduction_goal: float | None = None,
    *,
    input_projector_size: int | str | None = "auto",
    output_projector_size: int | str | None = "auto",
    method: str = "pca",
    loss: Callable[[GRUParams], Any] | None = None,
) -> tuple[GRUParams, ProjectionInfo]:
    """Projects a GRU onto the subspaces of an analysis.

    Args:
      params: dense parameters; `unproject` those that are projected already.
      pca: of `neuron_pca`.
      explained_variance_goal: each projector gets the fewest directions that explain this part of
        the variance, 0 to 1; 0.95 if neither goal is given.
      learnables_reduction_goal: 1 − after / before, 0 to 1, instead: the largest common goal of
        explained variance that saves so many learnables.
      input_projector_size: "auto" (default) for the goal, a number, or None to stay dense. Where
        there are few channels, each of them counts: try None.
      output_projector_size: likewise.
      method: "pca", or "output": the maps of these sizes that change the output the least, to
        first order; needs an analysis with a key. It is closer to the dense layer while little is
        dropped; sizes are chosen by variance all the same.
      loss: with a reduction goal, chooses the sizes instead of the variance: `loss(dense)` is
        evaluated for the equal dense parameters of every P_i and the largest P_o that the goal
        allows, and the smallest loss wins.

    Returns:
      The parameters, with projectors, and the record. A side whose projector would make the layer
      larger stays dense, unless its size is given; the record says so.

    Raises:
      ValueError: a goal is not between 0 and 1, both goals are given, a goal cannot be reached, or
        sizes, method or analysis do not fit.
      TypeError: an argument is of a wrong type.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import projection
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> pca = projection.neuron_pca(params, [jax.random.normal(jax.random.key(1), (32, 50, 12))])
      >>> small, info = projection.project(params, pca, learnables_reduction_goal=0.6)
      >>> info.learnables_reduction >= 0.6, gru_jax.num_learnables(small) == info.learnables[1]
      (True, True)
    """
    plan = Plan({(): (params, pca)}, num_learnables(params), method)
    fixed = {"input_projector": input_projector_size, "output_projector": output_projector_size}
    sizes = plan.sizes(explained_variance_goal, learnables_reduction_goal, fixed, loss)
    projected, info = plan.carry_out(sizes)
    return projected[()], info


def unproject(params: GRUParams) -> GRUParams:
    """Returns the dense parameters of the same function: W = W' Q_iᵀ and R = R' Q_oᵀ.

    Args:
      params: projected parameters; dense ones come back as they are.

    Returns:
      Parameters without projectors; equal in exact arithmetic, in all three reset modes.

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import projection
      >>> small = gru_jax.init_params(jax.random.key(0), 100, 12, output_projector_size=25)
      >>> projection.unproject(small).recurrent_weights.shape
      (300, 100)
    """
    _arguments.sizes_of(params)
    return _subspaces.expand(params)


def project_dense(
    kernel: Any,
    bias: Any,
    moments: Moments,
    explained_variance_goal: float = 0.95,
    *,
    projector_size: int | None = None,
) -> tuple[Any, Any, Any]:
    """Projects a dense layer that follows a GRU: x K + b becomes (x Q) K' + b'.

    K' = Qᵀ K, and the mean of what is dropped goes into the bias, which is exact. In a model it
    becomes two dense layers, the first without a bias.

    Args:
      kernel: K, shape (n, m), as in Flax.
      bias: b, shape (m,).
      moments: of the n inputs, `states` or `inputs` of an analysis by `neuron_pca`; behind a GRU
        the inputs are its states.
      explained_variance_goal: the part of the variance to keep, 0 to 1.
      projector_size: the columns of Q, instead of the goal.

    Returns:
      (Q, K', b'), of shapes (n, k), (k, m) and (m,); Q is None, and the rest as it was, where a
      projector would make the layer larger and its size was not given.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: shapes do not fit, or the goal or the size is outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> from gru_jax import projection
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> pca = projection.neuron_pca(params, [jax.random.normal(jax.random.key(1), (32, 50, 12))])
      >>> kernel, bias = jnp.ones((100, 80)), jnp.zeros(80)
      >>> Q, kernel, bias = projection.project_dense(kernel, bias, pca.states, projector_size=30)
      >>> Q.shape, kernel.shape, bias.shape
      ((100, 30), (30, 80), (80,))
    """
    _checks.made_by("neuron_pca(...).states or .inputs", "moments", moments, Moments)
    kernel = _arguments.as_floating("kernel", kernel)
    bias, n = _arguments.as_floating("bias", bias), len(moments.mean)
    if kernel.ndim != 2 or kernel.shape[0] != n or bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"kernel must have shape ({n}, m) and bias (m,) for {n} inputs, got {kernel.shape} "
            f"and {bias.shape}."
        )
    if projector_size is None:
        goal = check_fraction("explained_variance_goal", explained_variance_goal)
        k = moments.directions_for(goal)
        if k * sum(kernel.shape) >= kernel.size:
            return None, kernel, bias
    else:
        k = _checks.positive_int("projector_size", projector_size)
        if k > n:
            raise ValueError(f"projector_size must be at most {n}, got {projector_size}.")
    K, Q = np.asarray(kernel, np.float64), moments.directions[:, :k]
    mean = (moments.mean - Q @ (Q.T @ moments.mean)) @ K
    shifted = jnp.asarray(np.asarray(bias, np.float64) + mean, bias.dtype)
    return jnp.asarray(Q, kernel.dtype), jnp.asarray(Q.T @ K, kernel.dtype), shifted
