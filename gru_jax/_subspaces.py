"""The algebra of projection, in float64: sizes, low-rank maps, and what becomes of the mean.

For one side, with M = W or R and v = x_t or h_{t-1}, M v is replaced by M' Qᵀ v + E[(M − M' Qᵀ) v]:
the expected value of what is dropped goes into the bias.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gru_jax._activity import NeuronPCA
from gru_jax._moments import Moments
from gru_jax._params import LEAVES, RESET_MODES, GRUParams, Sizes

METHODS = ("pca", "output")
DAMPING = 1e-2  # of the metric of the output, relative to its mean


class Side(NamedTuple):
    """One of the two matrices of a GRU that can be projected."""

    weights: str
    projector: str

    def size(self, sizes: Sizes) -> int | None:
        """Returns the projector size of this side."""
        return getattr(sizes, f"{self.projector}_size")

    def resize(self, sizes: Sizes, size: int | None) -> Sizes:
        """Returns the sizes with another projector on this side."""
        changed: dict[str, Any] = {f"{self.projector}_size": size}
        return sizes._replace(**changed)

    def most(self, sizes: Sizes) -> int:
        """Returns the largest projector size of this side."""
        return sizes.input_size if self is INPUT else sizes.num_hidden_units

    def moments(self, pca: NeuronPCA) -> Moments:
        """Returns the moments that the projector of this side is made from."""
        return pca.inputs if self is INPUT else pca.states


INPUT = Side("input_weights", "input_projector")
OUTPUT = Side("recurrent_weights", "output_projector")
SIDES = (INPUT, OUTPUT)


def count(sizes: Sizes) -> int:
    """Returns the number of learnables of a GRU of these sizes."""
    shapes = [leaf.shape(sizes) for leaf in LEAVES]
    return sum(math.prod(shape) for shape in shapes if shape)


def operations(sizes: Sizes) -> int:
    """Returns the multiplications and additions of the matrix products of one step."""
    shapes = [shape for leaf in LEAVES if (shape := leaf.shape(sizes)) and len(shape) == 2]
    total = sum(rows * columns for rows, columns in shapes)
    if sizes.output_projector_size and not RESET_MODES[sizes.reset_gate_mode].reset_after:
        total += sizes.num_hidden_units * sizes.output_projector_size  # h, and r ⊙ h
    return 2 * total


def fit(dense: Sizes, pca: NeuronPCA, goal: float, fixed: dict[Side, int | None]) -> Sizes:
    """Returns the smallest sizes that explain a part of the variance; no side may grow."""
    sizes = dense
    for side in SIDES:
        if side in fixed:
            sizes = side.resize(sizes, fixed[side])
            continue
        smaller = side.resize(sizes, side.moments(pca).directions_for(goal))
        sizes = smaller if count(smaller) < count(sizes) else sizes
    return sizes


def explained(params: GRUParams, pca: NeuronPCA, side: Side) -> float:
    """Returns the part of the variance inside the subspace of a projector, 1 without one."""
    Q = getattr(params, side.projector)
    if Q is None:
        return 1.0
    basis = np.linalg.qr(np.asarray(Q, np.float64))[0]
    covariance = side.moments(pca).covariance
    total = np.trace(covariance)
    return float(np.trace(basis.T @ covariance @ basis) / total) if total else 1.0


def project_to(params: GRUParams, pca: NeuronPCA, sizes: Sizes, method: str) -> GRUParams:
    """Projects dense parameters to the given sizes."""
    arrays = {name: np.asarray(a, np.float64) for name, a in params.arrays().items()}
    dropped = {}
    for n, side in enumerate(SIDES):
        k, M = side.size(sizes), arrays[side.weights]
        if k is not None:
            metric = None if method == "pca" else _sensitivity(pca)[n]
            small, Q = _low_rank(M, side.moments(pca), k, metric)
            arrays |= {side.weights: small, side.projector: Q}
            dropped[side] = M - small @ Q.T
    arrays["bias"] = arrays["bias"] + _mean(dropped, pca, params.reset_gate_mode)
    types = {side.projector: getattr(params, side.weights).dtype for side in SIDES}
    types |= {name: array.dtype for name, array in params.arrays().items()}
    types = {name: jax.dtypes.canonicalize_dtype(dtype) for name, dtype in types.items()}
    return params.replace(**{name: jnp.asarray(a, types[name]) for name, a in arrays.items()})


def expand(params: GRUParams) -> GRUParams:
    """Returns the dense parameters of the same function, W = W' Q_iᵀ and R = R' Q_oᵀ."""
    changed: dict[str, Any] = {}
    for side in SIDES:
        small, Q = getattr(params, side.weights), getattr(params, side.projector)
        if Q is not None:
            changed[side.weights] = jnp.matmul(small, Q.T.astype(small.dtype), precision="highest")
    return params.replace(**changed, input_projector=None, output_projector=None)


def _sensitivity(pca: NeuronPCA) -> tuple[np.ndarray, np.ndarray]:
    if pca.sensitivity is None:
        raise ValueError("method='output' needs an analysis that was made with a key: pass key=.")
    if not np.isfinite(pca.sensitivity).all():
        raise ValueError(
            "method='output' needs finite gradients of the output, got NaN or infinity: they "
            "explode over so many steps. Pass method='pca'."
        )
    return pca.sensitivity


def _low_rank(
    M: np.ndarray, moments: Moments, k: int, metric: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns M', (3H, k), and Q, (n, k) with orthonormal columns.

    Without a metric Q spans the k first principal directions, and M' = M Q. With G = E[g gᵀ], M' Qᵀ
    is the map of rank k with the smallest error of the output to first order, tr G (M − M'Qᵀ) C
    (M − M'Qᵀ)ᵀ: with U the k first left singular vectors of G^½ M C^½ it is G^-½ U Uᵀ G^½ M.
    Where G is zero, any map is as good.
    """
    if metric is None or not np.trace(metric):
        Q = moments.directions[:, :k]
        return M @ Q, Q
    damped = metric + DAMPING * np.trace(metric) / len(metric) * np.eye(len(metric))
    values, vectors = np.linalg.eigh(damped)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    scaled = moments.directions * np.sqrt(moments.eigenvalues)
    U = np.linalg.svd(root @ M @ scaled, full_matrices=False)[0][:, :k]
    best = inverse @ U @ (U.T @ root @ M)
    Q = np.linalg.svd(best)[2][:k].T
    return best @ Q, Q


def _mean(dropped: dict[Side, np.ndarray], pca: NeuronPCA, mode: str) -> Any:
    """The expected value of what the projection drops, for the bias.

    It is exact for W x_t and for the reset and update rows of R h_{t-1}, and with a recurrent bias
    for the candidate too. In the other modes r_t stands beside the candidate's product, and
    E[r_t ⊙ (R_h̃ − R'_h̃ Qᵀ) h_{t-1}] or E[(R_h̃ − R'_h̃ Qᵀ)(r_t ⊙ h_{t-1})] is the best constant.
    """
    H = len(pca.states.mean)
    bias: Any = np.zeros(3 * H)
    if INPUT in dropped:
        bias = bias + dropped[INPUT] @ pca.inputs.mean
    if OUTPUT not in dropped:
        return np.append(bias, np.zeros(3 * H)) if RESET_MODES[mode].recurrent_bias else bias
    gap = dropped[OUTPUT]
    by_state = gap @ pca.before.mean
    if RESET_MODES[mode].recurrent_bias:
        return np.append(bias, by_state)
    if RESET_MODES[mode].reset_after:
        by_state[2 * H :] = np.sum(gap[2 * H :] * pca.gated, axis=1)
    else:
        by_state[2 * H :] = gap[2 * H :] @ np.diag(pca.gated)
    return bias + by_state
