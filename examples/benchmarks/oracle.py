"""The GRU in float64 with NumPy, and its gradients by hand: what is held to be right.

Nothing here is shared with the library: the equations step by step, then back in time.
"""

from typing import NamedTuple

import numpy as np

ACTIVATIONS = {  # the function of a, and its derivative from a and the value
    "tanh": (np.tanh, lambda a, v: 1 - v * v),
    "softsign": (lambda a: a / (1 + np.abs(a)), lambda a, v: (1 - np.abs(v)) ** 2),
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a, v: v * (1 - v)),
    "hard-sigmoid": (
        lambda a: np.clip(0.2 * a + 0.5, 0, 1),
        lambda a, v: np.where(np.abs(a) <= 2.5, 0.2, 0.0),
    ),
}


class Call(NamedTuple):
    """One call of a GRU, and the cotangents of what it returns."""

    mode: str
    leaves: dict[str, np.ndarray]  # input_weights (3H, I), recurrent_weights (3H, H), bias
    x: np.ndarray  # (B, T, I)
    h0: np.ndarray  # (B, H)
    cy: np.ndarray  # (B, T, H)
    ch: np.ndarray  # (B, H)
    keep: np.ndarray | None = None  # (B, T), False where a step is skipped
    resets: np.ndarray | None = None  # (B, T)
    reverse: bool = False
    state_activation: str = "tanh"
    gate_activation: str = "sigmoid"


class Right(NamedTuple):
    """What the call returns, and the gradients of sum(y ⊙ cy) + sum(hidden ⊙ ch)."""

    y: np.ndarray
    hidden: np.ndarray
    leaves: dict[str, np.ndarray]
    x: np.ndarray
    h0: np.ndarray


class Step(NamedTuple):
    """What the way back needs of a step: the state it began with, and everything in between."""

    h: np.ndarray
    a_r: np.ndarray
    a_z: np.ndarray
    a_n: np.ndarray
    r: np.ndarray
    z: np.ndarray
    n: np.ndarray
    s: np.ndarray  # R_n h + b_Rn, or R_n (r ⊙ h)


def solve(call: Call) -> Right:
    """Computes outputs, final state and all gradients."""
    shape = call.x.shape[:2]
    keep = np.ones(shape, bool) if call.keep is None else call.keep
    resets = np.zeros(shape, bool) if call.resets is None else call.resets & keep
    W, R, b = (leaf.astype(np.float64) for leaf in call.leaves.values())
    x, h0 = np.where(keep[..., None], call.x, 0.0).astype(np.float64), call.h0.astype(np.float64)
    rows = len(R)
    x_parts, h = x @ W.T + b[:rows], h0
    order = range(shape[1])[:: -1 if call.reverse else 1]
    y, steps = np.zeros((*shape, rows // 3)), {}
    for t in order:
        start = np.where(resets[:, t, None], h0, h)
        steps[t] = step = _step(call, R, b[rows:], start, x_parts[:, t])
        new = (1 - step.z) * step.n + step.z * step.h
        h = np.where(keep[:, t, None], new, h)
        y[:, t] = np.where(keep[:, t, None], new, 0.0)

    dh, dh0 = call.ch.astype(np.float64), np.zeros_like(h0)
    da, e = np.zeros((2, *shape, rows))  # gradients beside W x and beside R h
    for t in reversed(order):
        kept, reset = keep[:, t, None], resets[:, t, None]
        d_new = np.where(kept, dh + call.cy[:, t], 0.0)
        d_start, da[:, t], e[:, t] = _back(call, R, steps[t], d_new)
        dh0 += np.where(reset, d_start, 0.0)
        dh = np.where(kept, np.where(reset, 0.0, d_start), dh)

    into = np.stack([steps[t].h for t in range(shape[1])], 1)
    into_n = into
    if call.mode.startswith("before"):
        into_n = into * np.stack([steps[t].r for t in range(shape[1])], 1)
    H = rows // 3
    dR = [_outer(e[..., : 2 * H], into), _outer(e[..., 2 * H :], into_n)]
    db = [a.sum((0, 1)) for a in (da, e)][: len(b) // rows]
    leaves = zip(call.leaves, (_outer(da, x), np.concatenate(dR), np.concatenate(db)), strict=True)
    return Right(y, h, dict(leaves), da @ W, dh0 + dh)


def _step(call: Call, R: np.ndarray, b_R: np.ndarray, h: np.ndarray, x_part: np.ndarray) -> Step:
    """One step: rows of R, of the biases and of x_part in the order reset, update, candidate."""
    R_r, R_z, R_n = np.split(R, 3)
    b_r, b_z, b_n = np.split(b_R if len(b_R) else np.zeros(len(R)), 3)
    x_r, x_z, x_n = np.split(x_part, 3, axis=-1)
    gate, state = (ACTIVATIONS[n][0] for n in (call.gate_activation, call.state_activation))
    a_r, a_z = x_r + h @ R_r.T + b_r, x_z + h @ R_z.T + b_z
    r, z = gate(a_r), gate(a_z)
    if call.mode.startswith("before"):
        s = (r * h) @ R_n.T
        a_n = x_n + s
    else:
        s = h @ R_n.T + b_n
        a_n = x_n + r * s
    return Step(h, a_r, a_z, a_n, r, z, state(a_n), s)


def _back(call: Call, R: np.ndarray, step: Step, d: np.ndarray) -> tuple:
    """Of one step the gradients of its first state, beside W x and beside R h."""
    gate, state = (ACTIVATIONS[n][1] for n in (call.gate_activation, call.state_activation))
    h, a_r, a_z, a_n, r, z, n, s = step
    R_gates, R_n = np.split(R, [2 * len(R) // 3])
    dn = d * (1 - z) * state(a_n, n)
    dz = d * (h - n) * gate(a_z, z)
    if call.mode.startswith("before"):
        e_n = dn
        through = e_n @ R_n
        dr, dh = through * h, d * z + through * r
    else:
        e_n = dn * r
        dr, dh = dn * s, d * z + e_n @ R_n
    dr = dr * gate(a_r, r)
    gates = np.concatenate([dr, dz], axis=-1)
    beside = [np.concatenate([gates, last], axis=-1) for last in (dn, e_n)]
    return dh + gates @ R_gates, *beside


def _outer(d: np.ndarray, into: np.ndarray) -> np.ndarray:
    """The gradient of a matrix: the sum over batch and time of d ⊗ into."""
    return d.reshape(-1, d.shape[-1]).T @ into.reshape(-1, into.shape[-1])
