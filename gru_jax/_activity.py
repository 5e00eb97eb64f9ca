"""What a GRU does on data: moments of its inputs and states, gathered batch by batch.

All sums are taken in float64 on the host, about means, and merge exactly in any order up to
rounding, so it does not matter how the data are cut into batches or where they were computed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gru_jax import _checks, _products
from gru_jax._moments import Moments
from gru_jax._params import GRUParams
from gru_jax._sequence import Options, run

DRAWS = 4  # random directions of the output for each sequence


@dataclasses.dataclass(frozen=True, eq=False)
class NeuronPCA:
    """The principal components of a GRU's inputs and hidden states on data.

    Two analyses of parts of the data merge: `analysis + analysis`.

    Attributes:
      reset_gate_mode: of the GRU.
      observations: number of sequences.
      longest: number of steps of the longest one.
      inputs: moments of x_t: `mean`, `covariance`, `eigenvalues`, `explained_variance` (curve).
      states: the same of h_t.
      before: the same of h_{t-1}, which the recurrent weights multiply.
      gated: E[r_t h_{t-1}ᵀ], (H, H).
      sensitivity: None, or two (3H, 3H) matrices E[g gᵀ], with g the gradient of a random
        direction of the output by W x_t and by R h_{t-1}.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import projection
      >>> params = gru_jax.init_params(jax.random.key(0), 8, 3)
      >>> x = jax.random.normal(jax.random.key(1), (16, 20, 3))
      >>> one, two = (projection.neuron_pca(params, [half]) for half in (x[:5], x[5:]))
      >>> one + two
      NeuronPCA(16 sequences, 320 steps, 3 inputs, 8 hidden units)
    """

    reset_gate_mode: str
    observations: int
    longest: int
    inputs: Moments
    states: Moments
    before: Moments
    gated: np.ndarray
    sensitivity: tuple[np.ndarray, np.ndarray] | None = None

    def __radd__(self, other: object) -> "NeuronPCA":
        return self if other == 0 else NotImplemented  # the start of sum()

    def __add__(self, other: "NeuronPCA") -> "NeuronPCA":
        if not isinstance(other, NeuronPCA):
            return NotImplemented
        if self.reset_gate_mode != other.reset_gate_mode:
            raise ValueError("the two analyses must be of the same GRU; their reset modes differ.")
        if self.gated.shape != other.gated.shape or len(self.inputs.mean) != len(other.inputs.mean):
            raise ValueError(f"the two analyses must be of the same GRU: {self} and {other}.")
        if (self.sensitivity is None) != (other.sensitivity is None):
            raise ValueError("only one of the two analyses was made with a key: make both alike.")
        weight = other.inputs.count / max(self.inputs.count + other.inputs.count, 1)

        def mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (1.0 - weight) * a + weight * b

        sensitivity = None
        if self.sensitivity and other.sensitivity:
            (a, b), (c, d) = self.sensitivity, other.sensitivity
            sensitivity = mix(a, c), mix(b, d)
        return NeuronPCA(
            self.reset_gate_mode,
            self.observations + other.observations,
            max(self.longest, other.longest),
            self.inputs + other.inputs,
            self.states + other.states,
            self.before + other.before,
            mix(self.gated, other.gated),
            sensitivity,
        )

    def __repr__(self) -> str:
        return (
            f"NeuronPCA({self.observations} sequences, {self.inputs.count} steps, "
            f"{len(self.inputs.mean)} inputs, {len(self.states.mean)} hidden units)"
        )


def analyse(
    params: GRUParams,
    x: Any,
    h0: Any = None,
    back: Any = None,
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    *,
    reverse: bool = False,
    last: bool = False,
    key: Any = None,
) -> NeuronPCA:
    """Returns the analysis of one batch; `last`: only the last state is an output."""
    how = Options("sequence", _checks.flag("reverse", reverse), 1, None, None, None)
    y, _ = run(how, params, x, h0, back, lengths, mask, resets)
    kept = _kept(y.shape[:-1], lengths, mask)
    start = jnp.zeros(y.shape[-1], y.dtype) if h0 is None else h0
    before = _before(y, start, start if back is None else back, kept, resets, reverse=reverse)
    x = jnp.asarray(x, y.dtype)
    r = _reset_gate(params, before, x)
    rows = [np.asarray(array)[kept].astype(np.float64) for array in (x, y, before, r)]
    for name, values in zip(("x", "the hidden states"), rows, strict=False):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in a step that counts.")
    inputs, states, previous, gates = rows
    sensitivity = None
    if key is not None:
        how = how._replace(output_mode="last" if last else "sequence")
        g = _gradients(how, params, x, key, (h0, back, lengths, mask, resets))
        sensitivity = _sensitivity(params, np.asarray(g, np.float64)[:, kept], gates)
    return NeuronPCA(
        params.reset_gate_mode,
        int(kept.any(axis=-1).sum()),
        int(kept.sum(axis=-1).max(initial=0)),
        Moments.of(inputs),
        Moments.of(states),
        Moments.of(previous),
        gates.T @ previous / max(len(gates), 1),
        sensitivity,
    )


def _kept(shape: tuple[int, ...], lengths: Any, mask: Any) -> np.ndarray:
    """Booleans (*batch, T): the steps that are part of a sequence."""
    if mask is not None:
        return np.asarray(mask)
    if lengths is None:
        return np.ones(shape, bool)
    return np.arange(shape[-1]) < np.asarray(lengths)[..., None]


def _before(
    y: Any, start: Any, back: Any, kept: np.ndarray, resets: Any, *, reverse: bool
) -> np.ndarray:
    """The state from which each step starts, (*batch, T, H); at skipped steps anything."""
    order, T = slice(None, None, -1) if reverse else slice(None), kept.shape[-1]
    h, kept = np.asarray(y)[..., order, :], kept[..., order]
    last = np.maximum.accumulate(np.where(kept, np.arange(T), -1), axis=-1)
    last = np.concatenate([np.full((*kept.shape[:-1], 1), -1), last], axis=-1)[..., :T]
    found = np.take_along_axis(h, last.clip(0)[..., None], axis=-2)
    found = np.where(last[..., None] < 0, np.asarray(start)[..., None, :], found)
    if resets is not None:
        fresh = np.asarray(resets)[..., order, None]
        found = np.where(fresh, np.asarray(back)[..., None, :], found)
    return found[..., order, :]


@jax.jit
def _reset_gate(params: GRUParams, before: jax.Array, x: jax.Array) -> jax.Array:
    params = jax.tree.map(lambda a: a.astype(x.dtype), params)
    eq, learn = _products.equations(params), _products.thirds(_products.learnables(params))
    x_r, *_ = _products.input_parts(eq, learn)(_products.project_inputs(params, x))
    Rh_r, *_ = _products.in_bulk(eq, learn).gates(before)
    return eq.gate(x_r + Rh_r)


def _gradients(
    how: Options, params: GRUParams, x: jax.Array, key: jax.Array, rest: tuple[Any, ...]
) -> jax.Array:
    """Gradients of random directions of the output by W x_t, (draws, *batch, T, 3H)."""
    W = params.input_weights
    Wx = _products.times(W, _products.project_inputs(params, x), None)
    identity = jnp.eye(W.shape[0], dtype=W.dtype)
    direct = params.replace(input_weights=identity, input_projector=None)
    y, pull = jax.vjp(lambda Wx: run(how, direct, Wx, *rest)[0], Wx)
    keys = jax.random.split(key, DRAWS)
    return jnp.stack([pull(jax.random.normal(k, y.shape, y.dtype))[0] for k in keys])


def _sensitivity(params: GRUParams, g: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[g gᵀ] for W x and for R h; where r multiplies R h, it multiplies its gradient too."""
    H = r.shape[-1]
    by_state = g.copy()
    if params.reset_gate_mode != "before-multiplication":
        by_state[..., 2 * H :] *= r

    def moment(g: np.ndarray) -> np.ndarray:
        flat = g.reshape(-1, 3 * H)
        return flat.T @ flat / max(len(flat), 1)

    return moment(g), moment(by_state)


def fold(key: Any, n: int) -> Any:
    """Returns another key for each batch."""
    return None if key is None else jax.random.fold_in(key, n)


def check_enough(name: str, pca: NeuronPCA | None) -> NeuronPCA:
    """Returns the analysis if there are data enough for it."""
    if pca is None:
        raise ValueError("batches must hold at least one batch, got none.")
    if pca.observations < 2 or pca.longest < 2:
        raise ValueError(
            f"an analysis of {name} needs at least two sequences and two time steps, got "
            f"sequences: {pca.observations}, steps of the longest: {pca.longest}."
        )
    size = np.abs(pca.inputs.mean) + np.sqrt(np.diag(pca.inputs.covariance))
    constant = np.flatnonzero(np.sqrt(np.diag(pca.inputs.covariance)) <= 1e-12 * size)
    if len(constant):
        raise ValueError(
            f"x of {name} must vary in every channel, but is constant in channels "
            f"{constant.tolist()}: a projection could not see what they do. Leave them out, or "
            "pass data that represent the training set."
        )
    return pca
