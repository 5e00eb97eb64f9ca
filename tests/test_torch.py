"""Against `torch.nn.GRU`: recorded cases everywhere, new ones where PyTorch is installed.

Its weights have the rows and shapes used here; it computes the recurrent-bias mode with
bias = [bias_ih; bias_hh], and the after-multiplication mode where bias_hh is zero.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, as_dict, as_params, assert_close
from torch_cases import KINDS, recorded, torch_case

import gru_jax

NAMES = {"weight_ih": "input_weights", "weight_hh": "recurrent_weights"}
CASES = [(kind, dtype) for kind in KINDS for dtype in TOLERANCE]


def params_of(case, end, mode):
    """The parameters of one layer and direction; `end` is l0, l0_reverse, l1 and so on."""
    biases = [case[f"bias_ih_{end}"], case[f"bias_hh_{end}"]]
    bias = np.concatenate(biases) if mode.startswith("recurrent") else biases[0]
    return as_params({NAMES[w]: case[f"{w}_{end}"] for w in NAMES} | {"bias": bias}, mode)


def grads_of(params, end):
    """Gradients of those parameters, under torch's names."""
    arrays = as_dict(params)
    names = {f"dbias_ih_{end}": slice(0, 12), f"dbias_hh_{end}": slice(12, 24)}
    biases = {name: arrays["bias"][part] for name, part in names.items()}
    return {f"d{w}_{end}": arrays[NAMES[w]] for w in NAMES} | {
        name: array for name, array in biases.items() if array.size
    }


def stack_of_layers(layers, x, h0, lengths):
    """Several layers of one or two directions each."""
    states, h0 = [], iter(h0)
    for layer in layers:
        outputs = []
        for params, reverse in zip(layer, (False, True), strict=False):
            y, hidden = gru_jax.gru(params, x, next(h0), lengths=lengths, reverse=reverse)
            outputs.append(y)
            states.append(hidden)
        x = jnp.concatenate(outputs, -1)
    return x, jnp.stack(states)


@jax.jit
def values_and_gradients(layers, x, h0, lengths, cy, ch):
    """Outputs, states and gradients of the functional, by the library."""

    def functional(layers, x, h0):
        y, hidden = stack_of_layers(layers, x, h0, lengths)
        return jnp.sum(cy * y) + jnp.sum(ch * hidden), (y, hidden)

    grads, values = jax.grad(functional, argnums=(0, 1, 2), has_aux=True)(layers, x, h0)
    return values, grads


@pytest.mark.parametrize(("kind", "dtype"), CASES)
@pytest.mark.parametrize("source", ["recorded", "live"])
def test_equals_torch(source, kind, dtype):
    if source == "live":
        pytest.importorskip("torch")
    case = recorded()[kind, dtype] if source == "recorded" else torch_case(kind, dtype, seed=100)
    depth, bidirectional, _, bias_hh = KINDS[kind]
    mode = "recurrent-bias-after-multiplication" if bias_hh else "after-multiplication"
    directions = ("", "_reverse") if bidirectional else ("",)
    ends = [[f"l{layer}{direction}" for direction in directions] for layer in range(depth)]
    layers = [[params_of(case, end, mode) for end in layer] for layer in ends]
    lengths = jnp.asarray(case["lengths"]) if "lengths" in case else None
    arrays = (case[name] for name in ("cy", "ch"))
    values, grads = values_and_gradients(layers, case["x"], case["h0"], lengths, *arrays)
    got = dict(zip(("y", "hidden", "dx", "dh0"), (*values, *grads[1:]), strict=True))
    for params, end in zip(itertools.chain(*grads[0]), itertools.chain(*ends), strict=True):
        got |= grads_of(params, end)
    wanted = {name for name in case if name.startswith("d")} | {"y", "hidden"}
    assert wanted - got.keys() == (set() if bias_hh else {"dbias_hh_l0"})
    assert {array.dtype.name for array in got.values()} == {dtype}
    assert_close(got, {name: case[name] for name in got}, TOLERANCE[dtype])
