"""Random cases that can fail: input size ≠ hidden size, biases and initial state never zero."""

import jax.numpy as jnp
import numpy as np

import gru_jax

TOLERANCE = {"float64": 1e-12, "float32": 1e-6}


def random_params(rng, num_hidden_units, input_size, mode, P_i=None, P_o=None, dtype="float64"):
    """A dict of random learnables, of order 1/√columns so that no gate saturates."""
    H, halves = num_hidden_units, 2 if mode == "recurrent-bias-after-multiplication" else 1
    arrays = {
        "input_weights": rng.normal(size=(3 * H, P_i or input_size)) / np.sqrt(P_i or input_size),
        "recurrent_weights": rng.normal(size=(3 * H, P_o or H)) / np.sqrt(P_o or H),
        "bias": rng.normal(size=halves * 3 * H) / 2,
    }
    if P_i:
        arrays["input_projector"] = rng.normal(size=(input_size, P_i)) / np.sqrt(input_size)
    if P_o:
        arrays["output_projector"] = rng.normal(size=(H, P_o)) / np.sqrt(H)
    return {name: array.astype(dtype) for name, array in arrays.items()}


def as_params(arrays, mode, state_activation="tanh", gate_activation="sigmoid"):
    """The dict as the library's parameters."""
    return gru_jax.GRUParams(
        **{name: jnp.asarray(array) for name, array in arrays.items()},
        reset_gate_mode=mode,
        state_activation_function=state_activation,
        gate_activation_function=gate_activation,
    )


def as_dict(params, **others):
    """The library's parameters (or their gradients), and others, as a dict without missing ones."""
    return {k: v for k, v in params.arrays().items() if v is not None} | others


def relative_error(actual, expected):
    """Largest |actual − expected| over max(1, largest |expected|); shapes must be equal."""
    assert np.shape(actual) == np.shape(expected)
    expected = np.asarray(expected, np.float64)
    scale = np.max(np.abs(expected), initial=1.0)
    return np.max(np.abs(np.asarray(actual, np.float64) - expected), initial=0.0) / scale


def assert_close(actual, expected, tolerance):
    """Every entry of two dicts with equal keys within the tolerance of `relative_error`; no NaN."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.2g}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"errors above {tolerance}: {wrong}"
