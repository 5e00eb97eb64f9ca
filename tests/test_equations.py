"""The core against the NumPy loop: every mode, activation, projection and output, both dtypes."""

import jax
import numpy as np
import pytest
from cases import TOLERANCE, as_params, assert_close, random_params
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS, gru_ref, step

import gru_jax


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
