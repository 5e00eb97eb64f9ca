"""The time loops in several blocks, even and uneven, against a NumPy loop that knows none.

Elsewhere the tests are so small that one block holds them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_dict, as_params, assert_close, random_params
from reference import MODES, gru_ref, gru_ref_grads

import gru_jax
from gru_jax import _derivative, _recurrence
from gru_jax._blocks import Blocks, blocks_of

B, I, H = 3, 4, 6  # noqa: E741
STEP = 3 * B * H * 8  # bytes of the three gate arrays of a step, in float64
CASES = {  # mode, T, reverse, flags, options; every option meets every mode
    "after": (MODES[0], 13, False, (), {}),
    "after, all": (MODES[0], 13, True, ("mask", "resets"), {"checkpoint": 1}),
    "after, even": (MODES[0], 12, True, ("lengths",), {}),
    "after, projected": (MODES[0], 13, False, ("resets",), {"P_i": 2, "P_o": 4}),
    "after, last": (MODES[0], 13, False, ("lengths",), {"output_mode": "last"}),
    "before": (MODES[1], 13, True, (), {}),
    "before, all": (MODES[1], 13, False, ("mask", "resets"), {"checkpoint": 1}),
    "before, even": (MODES[1], 12, False, ("resets",), {"checkpoint": 1}),
    "before, projected": (MODES[1], 13, True, ("mask",), {"P_o": 4}),
    "before, last": (MODES[1], 12, True, ("mask", "resets"), {"output_mode": "last"}),
    "recurrent bias": (MODES[2], 13, False, (), {"checkpoint": 1}),
    "recurrent bias, all": (MODES[2], 13, True, ("mask", "resets"), {}),
    "recurrent bias, even": (MODES[2], 12, False, ("lengths", "resets"), {}),
    "recurrent bias, segments": (MODES[2], 13, True, ("mask",), {"checkpoint": 8}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five steps forward, three steps backward; compiled programs know only one choice."""
    jax.clear_caches()
    monkeypatch.setattr(_recurrence, "BLOCK_BYTES", 5 * STEP)
    monkeypatch.setattr(_derivative, "BLOCK_BYTES", 3 * STEP)
    yield
    jax.clear_caches()


def problem(mode, T, flags, P_i=None, P_o=None):
    rng = np.random.default_rng(T)
    arrays = random_params(rng, H, I, mode, P_i, P_o)
    x, h0 = rng.normal(size=(B, T, I)), rng.normal(size=(B, H))
    made = {
        "lengths": np.array([T, 0, 7]),
        "mask": rng.random((B, T)) < 0.7,
        "resets": rng.random((B, T)) < 0.3,
    }
    return arrays, x, h0, {name: made[name] for name in flags}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    mode, T, reverse, flags, options = CASES[case]
    sizes = {name: options[name] for name in ("P_i", "P_o") if name in options}
    arrays, x, h0, flags = problem(mode, T, flags, **sizes)
    output_mode = options.get("output_mode", "sequence")
    rng = np.random.default_rng(1)
    cy = rng.normal(size=(B, H) if output_mode == "last" else (B, T, H))
    ch = rng.normal(size=(B, H))
    how = {"reverse": reverse, "output_mode": output_mode}
    run = partial(gru_jax.gru, **how, **flags, checkpoint=options.get("checkpoint"))

    @partial(jax.jit)
    def all_of_it(params, x, h0):
        out, pullback = jax.vjp(lambda p, x, h0: run(p, x, h0), params, x, h0)
        return out, pullback((jnp.asarray(cy, dtype), jnp.asarray(ch, dtype)))

    cast = partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))
    out, (d_params, d_x, d_h0) = all_of_it(cast(as_params(arrays, mode)), *cast((x, h0)))
    y, hidden = gru_ref(arrays, x, h0, mode=mode, **how, **flags)
    right = gru_ref_grads(arrays, x, h0, cy, ch, mode=mode, **how, **flags)
    # Measured: at most 6e-16 and 2e-15, and 3e-7 and 5e-7.
    value, gradient = (2e-15, 5e-15) if dtype == "float64" else (1e-6, 2e-6)
    assert_close({"y": out[0], "hidden": out[1]}, {"y": y, "hidden": hidden}, value)
    assert_close(as_dict(d_params, x=d_x, h0=d_h0), right, gradient)


@pytest.mark.parametrize("case", ["after, all", "before, all", "recurrent bias, even"])
def test_further_derivatives(case, monkeypatch):
    """Forward mode, and forward and reverse mode over reverse mode, against one block."""
    mode, T, reverse, flags, options = CASES[case]
    arrays, *values, flags = problem(mode, T, flags)
    primals = (as_params(arrays, mode), *map(jnp.asarray, values))
    run = partial(gru_jax.gru, reverse=reverse, **flags, **options)

    def loss(*primals):
        return jnp.sum(jnp.sin(run(*primals)[0]))

    def derivatives(*primals):
        grad = jax.grad(loss, (0, 1, 2))
        size = lambda *p: sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(*p)))  # noqa: E731
        return (
            jax.jvp(loss, primals, primals)[1],
            jax.jvp(grad, primals, primals)[1],
            jax.grad(size, (0, 1, 2))(*primals),
        )

    found = jax.jit(derivatives)(*primals)
    monkeypatch.setattr(_recurrence, "BLOCK_BYTES", 2**30)
    monkeypatch.setattr(_derivative, "BLOCK_BYTES", 2**30)
    jax.clear_caches()
    whole = jax.jit(derivatives)(*primals)
    found, whole = (dict(enumerate(jax.tree.leaves(tree))) for tree in (found, whole))
    assert_close(found, whole, 2e-15)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "size"), [(1, 1), (5, 5), (12, 4), (13, 5), (13, 12), (7, 1)])
def test_blocks_process_every_step_once_and_in_order(T, size, reverse):
    blocks = Blocks(T, size, reverse)
    steps = []
    for k in range(blocks.number):
        begin, processed = map(int, blocks.begin(k))
        assert 0 <= begin <= T - size
        steps += [begin + blocks.time(j) for j in range(processed, size)]
    assert steps == list(range(T))[:: -1 if reverse else 1]


@pytest.mark.parametrize(
    ("T", "most", "size"), [(12, 5, 4), (13, 5, 5), (50, 6, 5), (7, 7, 7), (9, 0, 1), (101, 50, 34)]
)
def test_sizes_of_blocks(T, most, size):
    """A divisor of T if one is near, else nearly equal sizes."""
    row = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    assert blocks_of(T, row, most * 3 * 64, False).size == size
    assert blocks_of("T", row, most * 3 * 64, False).number == 1
