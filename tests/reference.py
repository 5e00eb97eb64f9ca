"""The equations as NumPy float64 plain loops: the oracle of the tests.

Nothing here is shared with the library and nothing is clever: one sequence at a time, one step at
a time, one gate at a time. The gradients are back-propagation through time written by hand, step
by step; `test_reference.py` checks them by central differences.

Parameters are a plain dict with the keys of `LEAVES`; the projectors may be missing.
"""

from typing import NamedTuple

import numpy as np

LEAVES = (
    "input_weights",
    "recurrent_weights",
    "bias",
    "input_projector",
    "output_projector",
)
MODES = (
    "after-multiplication",
    "before-multiplication",
    "recurrent-bias-after-multiplication",
)
STATE_ACTIVATIONS = ("tanh", "softsign")
GATE_ACTIVATIONS = ("sigmoid", "hard-sigmoid")


def activation(name, v):
    """σ(v) for one of the four activations, element by element."""
    out = np.empty_like(v)
    for i, e in enumerate(v):
        if name == "tanh":
            out[i] = np.tanh(e)
        elif name == "softsign":
            out[i] = e / (1 + abs(e))
        elif name == "sigmoid":
            out[i] = 1 / (1 + np.exp(-e))
        elif name == "hard-sigmoid":
            out[i] = 0.0 if e < -2.5 else 1.0 if e > 2.5 else 0.2 * e + 0.5
        else:
            raise ValueError(f"no such activation: {name}")
    return out


def derivative(name, v):
    """σ'(v) for one of the four activations, element by element."""
    out = np.empty_like(v)
    for i, e in enumerate(v):
        if name == "tanh":
            out[i] = 1 - np.tanh(e) ** 2
        elif name == "softsign":
            out[i] = 1 / (1 + abs(e)) ** 2
        elif name == "sigmoid":
            out[i] = np.exp(-e) / (1 + np.exp(-e)) ** 2
        elif name == "hard-sigmoid":
            out[i] = 0.2 if -2.5 <= e <= 2.5 else 0.0
        else:
            raise ValueError(f"no such activation: {name}")
    return out


def gates(params, mode):
    """The blocks W, R, b_W and b_R of each gate; gates in the order r, z, c (candidate)."""
    W = np.asarray(params["input_weights"], np.float64)
    R = np.asarray(params["recurrent_weights"], np.float64)
    b = np.asarray(params["bias"], np.float64)
    H = R.shape[0] // 3
    recurrent_bias = mode == "recurrent-bias-after-multiplication"
    assert mode in MODES
    assert b.shape == ((6 if recurrent_bias else 3) * H,)
    blocks = {}
    for i, gate in enumerate("rzc"):
        rows = slice(i * H, (i + 1) * H)
        b_R = b[3 * H + i * H : 3 * H + (i + 1) * H] if recurrent_bias else np.zeros(H)
        blocks[gate] = (W[rows], R[rows], b[rows], b_R)
    return blocks


def projectors(params, input_size, num_hidden_units):
    """Q_i and Q_o in float64; a layer without projectors has identities."""
    Q_i, Q_o = params.get("input_projector"), params.get("output_projector")
    Q_i = np.eye(input_size) if Q_i is None else np.asarray(Q_i, np.float64)
    Q_o = np.eye(num_hidden_units) if Q_o is None else np.asarray(Q_o, np.float64)
    return Q_i, Q_o


class Saved(NamedTuple):
    """What the way back needs of one step: x_t, h_{t-1}, what enters σ, the gates, R_c h + b."""

    x: np.ndarray
    h: np.ndarray
    a_r: np.ndarray
    a_z: np.ndarray
    a_c: np.ndarray
    r: np.ndarray
    z: np.ndarray
    c: np.ndarray
    s: np.ndarray


def step(params, h, x, mode, state_activation="tanh", gate_activation="sigmoid"):
    """One step of one sequence: h_t, and what the way back needs."""
    (W_r, R_r, b_Wr, b_Rr), (W_z, R_z, b_Wz, b_Rz), (W_c, R_c, b_Wc, b_Rc) = gates(
        params, mode
    ).values()
    Q_i, Q_o = projectors(params, len(x), len(h))
    p = Q_i.T @ x
    q = Q_o.T @ h
    a_r = W_r @ p + b_Wr + R_r @ q + b_Rr
    a_z = W_z @ p + b_Wz + R_z @ q + b_Rz
    r = activation(gate_activation, a_r)
    z = activation(gate_activation, a_z)
    if mode == "before-multiplication":
        s = R_c @ (Q_o.T @ (r * h))
        a_c = W_c @ p + b_Wc + s
    else:
        s = R_c @ q + b_Rc
        a_c = W_c @ p + b_Wc + r * s
    c = activation(state_activation, a_c)
    h_new = (1 - z) * c + z * h
    return h_new, Saved(x, h, a_r, a_z, a_c, r, z, c, s)


def step_back(params, saved, dh_new, grads, mode, state_activation, gate_activation):
    """Adds one step's gradients of the learnables to `grads`; returns dh and dx."""
    x, h, a_r, a_z, a_c, r, z, c, s = saved
    blocks = gates(params, mode)
    Q_i, Q_o = projectors(params, len(x), len(h))
    dh = dh_new * z
    da = {"c": dh_new * (1 - z) * derivative(state_activation, a_c)}
    da["z"] = dh_new * (h - c) * derivative(gate_activation, a_z)
    if mode == "before-multiplication":
        through, into = r * h, da["c"]
        d_through = Q_o @ (blocks["c"][1].T @ into)
        dr = d_through * h
        dh = dh + d_through * r
    else:
        through, into = h, da["c"] * r
        dr = da["c"] * s
        dh = dh + Q_o @ (blocks["c"][1].T @ into)
    da["r"] = dr * derivative(gate_activation, a_r)
    recurrent = {"r": (h, da["r"]), "z": (h, da["z"]), "c": (through, into)}
    dp = np.zeros(Q_i.shape[1])
    for i, gate in enumerate("rzc"):
        W, R, _, _ = blocks[gate]
        v, e = recurrent[gate]
        rows = slice(i * len(h), (i + 1) * len(h))
        grads["input_weights"][rows] += np.outer(da[gate], Q_i.T @ x)
        grads["recurrent_weights"][rows] += np.outer(e, Q_o.T @ v)
        grads["bias"][rows] += da[gate]
        if mode == "recurrent-bias-after-multiplication":
            grads["bias"][3 * len(h) + i * len(h) : 3 * len(h) + (i + 1) * len(h)] += e
        grads["output_projector"] += np.outer(v, R.T @ e)
        dp += W.T @ da[gate]
        if gate != "c":
            dh = dh + Q_o @ (R.T @ e)
    grads["input_projector"] += np.outer(x, dp)
    return dh, Q_i @ dp


def plan(b, T, lengths, mask, resets, reverse):
    """The steps that count for sequence b, in the order of processing, each with its reset flag."""
    steps = []
    for t in range(T):
        if lengths is not None and t >= lengths[b]:
            continue
        if mask is not None and not mask[b][t]:
            continue
        steps.append((t, resets is not None and bool(resets[b][t])))
    return steps[::-1] if reverse else steps


def arrays(params, x, h0):
    """x and h0 in float64, zeros for a missing h0."""
    x = np.asarray(x, np.float64)
    H = np.shape(params["recurrent_weights"])[0] // 3
    h0 = np.zeros((*x.shape[:-2], H)) if h0 is None else np.asarray(h0, np.float64)
    return x, h0


def gru_ref(
    params,
    x,
    h0=None,
    *,
    mode,
    state_activation="tanh",
    gate_activation="sigmoid",
    output_mode="sequence",
    lengths=None,
    mask=None,
    resets=None,
    reverse=False,
):
    """`(y, hidden)` of a GRU layer over x of shape (*batch, T, I), with any batch axes or none."""
    x, h0 = arrays(params, x, h0)
    y = np.zeros((*x.shape[:-1], h0.shape[-1]))
    hidden = np.zeros(h0.shape)
    for b in np.ndindex(*x.shape[:-2]):
        h = h0[b]
        for t, reset in plan(b, x.shape[-2], lengths, mask, resets, reverse):
            h = h0[b] if reset else h
            h, _ = step(params, h, x[b][t], mode, state_activation, gate_activation)
            y[b][t] = h
        hidden[b] = h
    return (hidden if output_mode == "last" else y), hidden


def gru_ref_grads(
    params,
    x,
    h0,
    cy,
    ch,
    *,
    mode,
    state_activation="tanh",
    gate_activation="sigmoid",
    output_mode="sequence",
    lengths=None,
    mask=None,
    resets=None,
    reverse=False,
):
    """Gradients of sum(cy * y) + sum(ch * hidden): a dict of every leaf in `params`, x and h0."""
    x, h0 = arrays(params, x, h0)
    kinds = (mode, state_activation, gate_activation)
    grads = zero_grads(params, x, h0)
    for b in np.ndindex(*x.shape[:-2]):
        steps = plan(b, x.shape[-2], lengths, mask, resets, reverse)
        h, tape = h0[b], []
        for t, reset in steps:
            h, saved = step(params, h0[b] if reset else h, x[b][t], *kinds)
            tape.append(saved)
        dh = np.array(ch[b] + cy[b] if output_mode == "last" else ch[b], np.float64)
        for (t, reset), saved in zip(steps[::-1], tape[::-1], strict=True):
            if output_mode == "sequence":
                dh = dh + cy[b][t]
            dh, grads["x"][b][t] = step_back(params, saved, dh, grads, *kinds)
            if reset:
                grads["h0"][b] += dh
                dh = np.zeros(dh.shape)
        grads["h0"][b] += dh
    return {k: v for k, v in grads.items() if k in ("x", "h0") or params.get(k) is not None}


def zero_grads(params, x, h0):
    """Zeros to add to, with both projectors whether they are there or not."""
    shapes = {k: np.shape(params[k]) for k in LEAVES[:3]}
    Q_i, Q_o = projectors(params, x.shape[-1], h0.shape[-1])
    shapes |= {"input_projector": Q_i.shape, "output_projector": Q_o.shape}
    shapes |= {"x": x.shape, "h0": h0.shape}
    return {k: np.zeros(shape) for k, shape in shapes.items()}
