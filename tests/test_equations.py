"""The core against the NumPy loop: every mode, activation, projection and output, both dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, as_dict, as_params, assert_close, random_params
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS, gru_ref, gru_ref_grads, step

import gru_jax
from gru_jax import _products


@jax.jit
def everything(params, x, h0):
    """Cell, sequence and last of one case, compiled together."""
    y, hidden = gru_jax.gru(params, x, h0)
    last, last_hidden = gru_jax.gru(params, x, h0, output_mode="last")
    h = gru_jax.gru_cell(params, h0, x[:, 0])
    return {"y": y, "hidden": hidden, "last": last, "last hidden": last_hidden, "cell": h}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("gate", GATE_ACTIVATIONS)
@pytest.mark.parametrize("state", STATE_ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_core_equals_the_loop(mode, state, gate, projected):
    rng = np.random.default_rng(0)
    kinds = {"mode": mode, "state_activation": state, "gate_activation": gate}
    sizes = (4, 3, mode, 2, 3) if projected else (4, 3, mode)
    for dtype, tolerance in TOLERANCE.items():
        arrays = random_params(rng, *sizes, dtype=dtype)
        arrays["bias"] *= 4  # far enough for hard-sigmoid to reach 0 and 1
        x, h0 = rng.normal(size=(2, 3, 3)).astype(dtype), rng.normal(size=(2, 4)).astype(dtype)
        y, hidden = gru_ref(arrays, x, h0, **kinds)
        cell = np.stack([step(arrays, h, v, **kinds)[0] for h, v in zip(h0, x[:, 0], strict=True)])
        got = everything(as_params(arrays, mode, state, gate), x, h0)
        assert {v.dtype.name for v in got.values()} == {dtype}
        want = {"y": y, "hidden": hidden, "last": hidden, "last hidden": hidden, "cell": cell}
        assert_close(got, want, tolerance)


def test_the_modes_differ():
    """The inputs of these tests can tell all twelve functions apart."""
    rng = np.random.default_rng(0)
    arrays = random_params(rng, 4, 3, MODES[2])
    x, h0 = rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 4))
    last = []
    for mode in MODES:
        own = arrays if mode == MODES[2] else {**arrays, "bias": arrays["bias"][:12]}
        for state in STATE_ACTIVATIONS:
            for gate in GATE_ACTIVATIONS:
                _, hidden = gru_ref(
                    own, x, h0, mode=mode, state_activation=state, gate_activation=gate
                )
                last.append(hidden)
    gaps = [np.max(np.abs(a - b)) for i, a in enumerate(last) for b in last[:i]]
    assert min(gaps) > 1e-3


@pytest.mark.parametrize("sizes", [(), (3, 4)], ids=["dense", "projected"])
@pytest.mark.parametrize("mode", MODES)
def test_single_sequences_multiply_in_halves(mode, sizes, monkeypatch):
    """As large matrices do; what `jax.vmap` or further derivatives see is the same function."""
    monkeypatch.setattr(_products, "ONE_CORE", 0)
    jax.clear_caches()
    rng = np.random.default_rng(1)
    arrays = random_params(rng, 6, 5, mode, *sizes)
    x, h0 = rng.normal(size=(3, 7, 5)), rng.normal(size=(3, 6))
    cy, ch = rng.normal(size=(3, 7, 6)), rng.normal(size=(3, 6))
    params = as_params(arrays, mode)

    def one(params, x, h0, cy, ch):
        y, hidden = gru_jax.gru(params, x, h0)
        return jnp.sum(cy * y) + jnp.sum(ch * hidden), y

    both = jax.grad(one, (0, 1, 2), has_aux=True)
    for b in range(3):
        data = x[b], h0[b], cy[b], ch[b]
        want = gru_ref_grads(arrays, *data, mode=mode) | {
            "y": gru_ref(arrays, *data[:2], mode=mode)[0]
        }
        for run in (both, jax.jit(both)):
            (d_params, d_x, d_h0), y = run(params, *data)
            assert_close(as_dict(d_params, x=d_x, h0=d_h0, y=y), want, TOLERANCE["float64"])
    (d_params, d_x, d_h0), y = jax.vmap(both, (None, 0, 0, 0, 0))(params, x, h0, cy, ch)
    summed = jax.tree.map(lambda a: a.sum(0), d_params)
    want = gru_ref_grads(arrays, x, h0, cy, ch, mode=mode)
    assert_close(as_dict(summed, x=d_x, h0=d_h0), want, TOLERANCE["float64"])
    assert "custom_vmap_call" in str(jax.make_jaxpr(both)(params, *data))

    along = lambda x: jnp.sum(both(params, x, *data[1:])[0][1] * data[2][:, :5])  # noqa: E731
    twice = jax.grad(along)(data[0])
    step_size, direction = 1e-6, rng.normal(size=(7, 5))
    ends = [along(data[0] + s * step_size * direction) for s in (1, -1)]
    assert_close(
        {"d": jnp.vdot(twice, direction)}, {"d": (ends[0] - ends[1]) / (2 * step_size)}, 1e-7
    )
    jax.clear_caches()
