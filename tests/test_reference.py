"""The oracle itself: its gradients by central differences, and its options against each other."""

import itertools

import numpy as np
import pytest
from cases import random_params
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS, gru_ref, gru_ref_grads

VARIANTS = {
    "plain": {},
    "lengths": {"lengths": np.array([[4, 0, 2]])},
    "mask and resets": {
        "mask": np.array([[[1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]]], bool),
        "resets": np.array([[[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]]], bool),
    },
    "reverse, resets, last": {
        "resets": np.array([[[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]], bool),
        "reverse": True,
        "output_mode": "last",
    },
}


def central_differences(f, array, step=2e-4):
    """df/darray to fourth order, one entry at a time."""
    slopes = np.zeros(array.shape)
    for i in np.ndindex(*array.shape):
        here, values = array[i], {}
        for k in (-2, -1, 1, 2):
            array[i] = here + k * step
            values[k] = f()
        array[i] = here
        slopes[i] = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
    return slopes


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_by_central_differences(mode, variant, projected):
    """Every entry of every gradient, for the four pairs of activations."""
    for state, gate in itertools.product(STATE_ACTIVATIONS, GATE_ACTIVATIONS):
        kinds = {"mode": mode, "state_activation": state, "gate_activation": gate}
        check_gradients(projected, **kinds, **VARIANTS[variant])


def check_gradients(projected, mode, **options):
    rng, H = np.random.default_rng(3), 2
    params = random_params(rng, H, 3, mode, *((2, 1) if projected else ()))
    x, h0, ch = (
        rng.normal(size=(1, 3, 4, 3)),
        rng.normal(size=(1, 3, H)),
        rng.normal(size=(1, 3, H)),
    )
    cy = rng.normal(size=(1, 3, H) if "output_mode" in options else (1, 3, 4, H))

    def functional():
        y, hidden = gru_ref(params, x, h0, mode=mode, **options)
        return np.sum(cy * y) + np.sum(ch * hidden)

    grads = gru_ref_grads(params, x, h0, cy, ch, mode=mode, **options)
    leaves = {**params, "x": x, "h0": h0}
    assert grads.keys() == leaves.keys()
    for name, leaf in leaves.items():
        want = central_differences(functional, leaf)
        np.testing.assert_allclose(grads[name], want, rtol=0, atol=2e-10, err_msg=name)
