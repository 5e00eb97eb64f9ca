"""One documented update as NumPy float64 plain loops: the oracle of the optimiser's tests.

Nothing here is shared with the library. The order is that of the pages: the gradient, plus the L2
term, clipped, then the solver, then the learn-rate factor. What has learn-rate factor 0 is frozen:
its gradient and its L2 term are 0 before the clipping.

Parameters and gradients are plain dicts of name to array. A layer of several has its name in
front, "gru/bias"; what is no GRU's has scalar factors. A factor is a number, or three for the row
blocks (reset, update, candidate).
"""

import numpy as np

METHODS = ("l2norm", "global-l2norm", "absolute-value")
SOLVERS = ("sgdm", "adam", "rmsprop")
MOMENTUM = 0.9
GRADIENT_DECAY, SQUARED_GRADIENT_DECAY = 0.9, {"adam": 0.999, "rmsprop": 0.9}
EPSILON = 1e-8


def rows(factor, name, params):
    """The factor of every entry of one array."""
    array = np.asarray(params[name])
    out = np.zeros(array.shape)
    if np.ndim(factor) == 0:
        out[...] = factor
        return out
    layer, leaf = name[: name.rfind("/") + 1], name[name.rfind("/") + 1 :]
    assert leaf in ("input_weights", "recurrent_weights", "bias")
    H = len(params[layer + "recurrent_weights"]) // 3
    halves = len(array) // (3 * H)
    assert len(array) == halves * 3 * H
    for half in range(halves):
        first = half * 3 * H
        for gate in range(3):
            out[first + gate * H : first + (gate + 1) * H] = factor[gate]
    return out


def clip(grads, threshold, method):
    """Gradients clipped by the norm of each array, by the norm of all, or entry by entry."""
    squares = {name: float(np.sum(g * g)) for name, g in grads.items()}
    out = {}
    for name, g in grads.items():
        if method == "absolute-value":
            out[name] = np.sign(g) * np.minimum(np.abs(g), threshold)
            continue
        assert method in METHODS
        norm = np.sqrt(squares[name] if method == "l2norm" else sum(squares.values()))
        out[name] = g * (threshold / norm) if norm > threshold else g.copy()
    return out


def prepare(params, grads, *, l2, l2_factors, learn_rate_factors, threshold, method):
    """What enters the solver, and which part of each array the clipping changed."""
    total = {}
    for name, g in grads.items():
        frozen = rows(learn_rate_factors[name], name, params) == 0
        total[name] = np.where(frozen, 0.0, np.asarray(g, np.float64))
        p = np.asarray(params[name], np.float64)
        L2 = l2 * rows(l2_factors[name], name, params)
        for i in np.ndindex(*p.shape):
            if L2[i] != 0 and not frozen[i]:
                total[name][i] += L2[i] * p[i]
    clipped = clip(total, threshold, method)
    return clipped, {name: np.mean(clipped[name] != g) for name, g in total.items()}


def start(params):
    """The state before the first update."""
    zeros = {name: np.zeros(np.shape(p)) for name, p in params.items()}
    return {"step": 0, "first": zeros, "second": zeros, "clipped": []}


def update(
    params,
    grads,
    state,
    *,
    solver,
    learning_rate,
    l2,
    l2_factors,
    learn_rate_factors,
    threshold,
    method,
):
    """The parameters and the state after one update; `learning_rate` is a function of the step."""
    g, changed = prepare(
        params,
        grads,
        l2=l2,
        l2_factors=l2_factors,
        learn_rate_factors=learn_rate_factors,
        threshold=threshold,
        method=method,
    )
    alpha, t = learning_rate(state["step"]), state["step"] + 1
    new, first, second = {}, {}, {}
    for name, p in params.items():
        m, v = state["first"][name], state["second"][name]
        if solver == "sgdm":  # v ← m·v − α·g, p ← p + v
            m = MOMENTUM * m - alpha * g[name]
            step = m
        elif solver == "adam":  # −α·m̂ / (√v̂ + ε)
            beta1, beta2 = GRADIENT_DECAY, SQUARED_GRADIENT_DECAY["adam"]
            m = beta1 * m + (1 - beta1) * g[name]
            v = beta2 * v + (1 - beta2) * g[name] ** 2
            step = -alpha * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + EPSILON)
        elif solver == "rmsprop":  # −α·g / (√v + ε)
            beta2 = SQUARED_GRADIENT_DECAY["rmsprop"]
            v = beta2 * v + (1 - beta2) * g[name] ** 2
            step = -alpha * g[name] / (np.sqrt(v) + EPSILON)
        else:
            raise ValueError(f"no such solver: {solver}")
        p, factor = np.asarray(p, np.float64), rows(learn_rate_factors[name], name, params)
        new[name] = np.where(factor == 0, p, p + factor * step)
        first[name], second[name] = m, v
    return new, {
        "step": t,
        "first": first,
        "second": second,
        "clipped": [*state["clipped"], changed],
    }


def train(params, gradients, *, learning_rate, **options):
    """Several updates with prescribed gradients, or with those of a function of the parameters."""
    rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
    params = {name: np.array(p, np.float64) for name, p in params.items()}
    state = start(params)
    for g in gradients:
        g = g(params) if callable(g) else g
        params, state = update(params, g, state, learning_rate=rate, **options)
    return params, state
