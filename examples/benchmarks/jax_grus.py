"""GRUs in JAX: the library's, a scan with plain autodiff as the baseline, and other libraries'."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import gru_jax
from examples.benchmarks import reverse_rule
from examples.benchmarks.problem import AFTER, BEFORE, RECURRENT_BIAS, Weights, update_first
from examples.benchmarks.runners import CORES, JaxGRU


def ours(weights: Weights, **options: Any) -> JaxGRU:
    """Returns `gru_jax.gru`."""
    mode = weights.mode
    bias = weights.bias
    if mode == RECURRENT_BIAS:
        bias = np.concatenate([bias, weights.recurrent_bias])
    params = gru_jax.GRUParams(weights.W, weights.R, bias, reset_gate_mode=mode)
    return of_params(jax.tree.map(jnp.asarray, params), **options)


def wide(weights: Weights) -> JaxGRU:
    """Returns `gru_jax.gru` compiled for vectors of 512 bits, which XLA does only when asked."""
    return ours(weights)._replace(options={"xla_cpu_prefer_vector_width": 512})


def over_cores(weights: Weights) -> JaxGRU:
    """Returns `gru_jax.gru` with the batch split over the cores, each a device, as on many GPUs."""
    gru, auto = ours(weights), (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((CORES,), ("batch",), auto, devices=jax.devices()[:CORES])
    whole, split = jax.P(), jax.P("batch")
    places = tuple(jax.NamedSharding(mesh, spec) for spec in (whole, split, split))
    return gru._replace(
        apply=jax.shard_map(gru.apply, mesh=mesh, in_specs=(whole, split), out_specs=split),
        place=lambda arrays: jax.device_put(arrays, places),
    )


def special(weights: Weights) -> JaxGRU:
    """Returns the GRU of `reverse_rule`, with the same parameters as the library's."""
    assert weights.mode == RECURRENT_BIAS
    return ours(weights)._replace(apply=reverse_rule.gru)


def of_params(params: gru_jax.GRUParams, **options: Any) -> JaxGRU:
    """Returns `gru_jax.gru` with these parameters, projected ones too."""
    hidden = params.recurrent_weights.shape[0] // 3

    def apply(p: gru_jax.GRUParams, x: Any) -> Any:
        return gru_jax.gru(p, x, **options)[0]

    return JaxGRU(params, apply, gru_jax.gru_cell, hidden)


def plain(weights: Weights) -> JaxGRU:
    """Returns a scan as one writes it with care, its derivative left to JAX.

    The input products stand before the loop, as three arrays that it reads without slices; the
    recurrent product is one of 3H rows (before-multiplication: of 2H and of H).
    """
    mode, H = weights.mode, weights.R.shape[1]
    split = (2 if mode == BEFORE else 3) * H
    params = {
        "W": weights.W.reshape(3, H, -1),
        "b": weights.folded.reshape(3, H),
        "R": weights.R[:split],
    }
    if mode == BEFORE:
        params["R_n"] = weights.R[split:]
    if mode == RECURRENT_BIAS:
        params["b_n"] = weights.candidate_bias

    def cell(p: Any, h: Any, parts: Any) -> Any:
        x_r, x_z, x_n = parts
        r, z, *rest = jnp.split(h @ p["R"].T, split // H, axis=-1)
        r, z = jax.nn.sigmoid(x_r + r), jax.nn.sigmoid(x_z + z)
        if mode == BEFORE:
            n = jnp.tanh(x_n + (r * h) @ p["R_n"].T)
        else:
            n = jnp.tanh(x_n + r * (rest[0] + p["b_n"] if mode == RECURRENT_BIAS else rest[0]))
        return (1.0 - z) * n + z * h

    def parts_of(p: Any, x: Any) -> Any:
        return [x @ p["W"][i].T + p["b"][i] for i in range(3)]

    def apply(p: Any, x: Any) -> Any:
        def body(h: Any, parts: Any) -> Any:
            h = cell(p, h, parts)
            return h, h

        h0 = jnp.zeros((x.shape[0], H), x.dtype)
        _, y = lax.scan(body, h0, parts_of(p, x.swapaxes(0, 1)))
        return y.swapaxes(0, 1)

    return JaxGRU(params, apply, lambda p, h, x: cell(p, h, parts_of(p, x)), H)


def linen(weights: Weights) -> JaxGRU:
    """Returns `flax.linen.RNN` of `flax.linen.GRUCell`."""
    import flax.linen as nn

    assert weights.mode == RECURRENT_BIAS
    H = weights.R.shape[1]
    W, R, b = (np.split(a, 3) for a in (weights.W, weights.R, weights.folded))
    params: dict[str, Any] = {}
    for i, gate in enumerate("rzn"):
        params[f"i{gate}"] = {"kernel": W[i].T, "bias": b[i]}
        params[f"h{gate}"] = {"kernel": R[i].T}
    params["hn"]["bias"] = weights.candidate_bias
    cell, rnn = nn.GRUCell(H), nn.RNN(nn.GRUCell(H))
    return JaxGRU(
        params,
        lambda p, x: rnn.apply({"params": {"cell": p}}, x),
        lambda p, h, x: cell.apply({"params": p}, h, x)[0],
        H,
    )


def nnx(weights: Weights) -> JaxGRU:
    """Returns `flax.nnx.RNN` of `flax.nnx.GRUCell`."""
    from flax import nnx

    assert weights.mode == AFTER
    H, I = weights.R.shape[1], weights.W.shape[1]  # noqa: E741
    cell = nnx.GRUCell(I, H, rngs=nnx.Rngs(0))
    of_x: Any = cell.dense_i
    of_x.kernel[...] = jnp.asarray(weights.W.T)
    of_x.bias[...] = jnp.asarray(weights.bias)
    cell.dense_h.kernel[...] = jnp.asarray(weights.R.T)
    graph, params = nnx.split(nnx.RNN(cell, rngs=False))

    def apply(p: Any, x: Any) -> Any:
        return nnx.merge(graph, p)(x, initial_carry=jnp.zeros((x.shape[0], H), x.dtype))

    def step(p: Any, h: Any, x: Any) -> Any:
        return nnx.merge(graph, p).cell(h, x)[0]

    return JaxGRU(params, apply, step, H)


def equinox(weights: Weights) -> JaxGRU:
    """Returns a scan of `equinox.nn.GRUCell`, vectorised over the batch."""
    import equinox

    assert weights.mode == RECURRENT_BIAS
    H, I = weights.R.shape[1], weights.W.shape[1]  # noqa: E741
    cell = equinox.nn.GRUCell(I, H, key=jax.random.key(0))
    arrays = weights.W, weights.R, weights.folded, weights.candidate_bias
    leaves = tuple(map(jnp.asarray, arrays))
    cell = equinox.tree_at(lambda c: (c.weight_ih, c.weight_hh, c.bias, c.bias_n), cell, leaves)

    def one_sequence(cell: Any, x: Any) -> Any:
        def body(h: Any, x_t: Any) -> Any:
            h = cell(x_t, h)
            return h, h

        return lax.scan(body, jnp.zeros(H, x.dtype), x)[1]

    return JaxGRU(
        cell,
        jax.vmap(one_sequence, in_axes=(None, 0)),
        jax.vmap(lambda cell, h, x: cell(x, h), in_axes=(None, 0, 0)),
        H,
    )


def haiku(weights: Weights) -> JaxGRU:
    """Returns `haiku.dynamic_unroll` of `haiku.GRU`, whose update gate is the library's 1 − z."""
    import haiku

    assert weights.mode == BEFORE
    H = weights.R.shape[1]

    def reordered(rows: np.ndarray) -> np.ndarray:
        r, z, n = np.split(rows, 3)
        return np.concatenate([-z, r, n]).T

    leaves = {"w_i": weights.W, "w_h": weights.R, "b": weights.bias}
    params = {"gru": {name: reordered(rows) for name, rows in leaves.items()}}

    @haiku.without_apply_rng
    @haiku.transform
    def sequence(x: Any) -> Any:
        h0 = jnp.zeros((x.shape[0], H), x.dtype)
        return haiku.dynamic_unroll(haiku.GRU(H), x, h0, time_major=False)[0]

    @haiku.without_apply_rng
    @haiku.transform
    def step(h: Any, x: Any) -> Any:
        return haiku.GRU(H)(x, h)[0]

    return JaxGRU(params, sequence.apply, step.apply, H)


def keras(weights: Weights) -> JaxGRU:
    """Returns `keras.layers.GRU` with the JAX backend; its rows are update, reset, candidate."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.backend.backend() != "jax":
        raise RuntimeError("Keras was imported before with another backend than JAX")
    assert weights.mode == RECURRENT_BIAS
    H, I = weights.R.shape[1], weights.W.shape[1]  # noqa: E741

    layer = keras.layers.GRU(H, reset_after=True, return_sequences=True)
    layer.build((None, None, I))
    bias = np.stack([update_first(weights.bias), update_first(weights.recurrent_bias)])
    layer.set_weights([update_first(weights.W).T, update_first(weights.R).T, bias])
    cell = layer.cell
    params, others = ([v.value for v in part] for part in _variables(layer))
    cell_others = [v.value for v in cell.non_trainable_variables]
    return JaxGRU(
        params,
        lambda p, x: layer.stateless_call(p, others, x)[0],
        lambda p, h, x: cell.stateless_call(p, cell_others, x, [h])[0][0],
        H,
    )


def _variables(layer: Any) -> tuple[list, list]:
    """Returns a Keras layer's trainable variables and the others (its seeds)."""
    return layer.trainable_variables, layer.non_trainable_variables
