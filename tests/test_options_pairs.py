"""Options in combination against the NumPy loop: values and all gradients, eager and under jit.

In `ROWS` every pair of options meets in every mode, and so does every triple; in `PAIRS` every pair
meets, the mode being one of the options.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, as_dict, as_params, assert_close, random_params
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS, gru_ref, gru_ref_grads

import gru_jax

T = 7
CHECKPOINTS = (None, 1, 3, "sqrt")
ACTIVATIONS = tuple(itertools.product(STATE_ACTIVATIONS, GATE_ACTIVATIONS))
OPTIONS = {
    "mode": MODES,
    "padding": (None, "lengths", "mask"),
    "checkpoint": CHECKPOINTS,
    "resets": (False, True),
    "reverse": (False, True),
    "output_mode": ("sequence", "last"),
    "projected": (False, True),
    "batch_axes": (1, 2),
}


def covering(options, strength):
    """Rows of options in which any `strength` of them meet in all their values; greedy."""
    meetings = [
        frozenset(zip(names, values, strict=True))
        for names in itertools.combinations(options, strength)
        for values in itertools.product(*(options[name] for name in names))
    ]
    rows = []
    while meetings:
        row = dict(meetings[0])
        for name in [name for name in options if name not in row]:
            gains = [sum(m <= {**row, name: v}.items() for m in meetings) for v in options[name]]
            row[name] = options[name][int(np.argmax(gains))]
        meetings = [m for m in meetings if not m <= row.items()]
        rows.append({name: row[name] for name in options})
    return rows


ROWS = covering(OPTIONS, 3)
PAIRS = covering(OPTIONS, 2)
# Batch and hidden size of each row: every B and every H of 1..9, and (4, 5) among them.
SIZES = [(1 + (i + i // 9) % 9, 1 + (i + 1) % 9) for i in range(len(ROWS))]


class Case(NamedTuple):
    """A call of the layer: learnables, inputs, the weights of the functional, and options."""

    arrays: dict
    kinds: tuple  # mode and the two activations
    x: np.ndarray
    h0: np.ndarray
    cy: np.ndarray
    ch: np.ndarray
    static: dict  # output_mode, reverse, checkpoint
    flags: dict  # lengths or mask, resets


def make_case(row, B, H, seed, dtype="float64"):
    """The arrays of one row; NaN in the padded steps of x."""
    rng = np.random.default_rng(seed)
    channels = 1 + H % 4 + (H == 1)
    batch = (B,) if row["batch_axes"] == 1 else (B, 2)
    steps = () if row["output_mode"] == "last" else (T,)
    projectors = (max(1, channels - 1), max(1, H - 1)) if row["projected"] else ()
    arrays = random_params(rng, H, channels, row["mode"], *projectors, dtype=dtype)
    shapes = ((*batch, T, channels), (*batch, H), (*batch, *steps, H), (*batch, H))
    x, h0, cy, ch = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    flags = {}
    if row["padding"] == "lengths":
        flags["lengths"] = rng.integers(0, T + 1, batch, dtype=np.int32)
        x[np.arange(T) >= flags["lengths"][..., None]] = np.nan
    if row["padding"] == "mask":
        flags["mask"] = rng.random((*batch, T)) < 0.6
        x[~flags["mask"]] = np.nan
    if row["resets"]:
        flags["resets"] = rng.random((*batch, T)) < 0.3
    static = {name: row[name] for name in ("output_mode", "reverse", "checkpoint")}
    kinds = (row["mode"], *ACTIVATIONS[seed % len(ACTIVATIONS)])
    return Case(arrays, kinds, x, h0, cy, ch, static, flags)


def by_the_loop(case):
    """Values and gradients by the NumPy loop."""
    names = ("mode", "state_activation", "gate_activation")
    options = dict(zip(names, case.kinds, strict=True)) | case.flags
    options |= {name: case.static[name] for name in ("output_mode", "reverse")}
    y, hidden = gru_ref(case.arrays, case.x, case.h0, **options)
    grads = gru_ref_grads(case.arrays, case.x, case.h0, case.cy, case.ch, **options)
    return {"y": y, "hidden": hidden} | {f"d{name}": grad for name, grad in grads.items()}


def by_the_library(case, transform=lambda function: function):
    """The same by the library, by a transformed function of all arrays."""

    def functional(params, x, h0, flags):
        y, hidden = gru_jax.gru(params, x, h0, **case.static, **flags)
        return jnp.sum(case.cy * y) + jnp.sum(case.ch * hidden), (y, hidden)

    function = transform(jax.value_and_grad(functional, argnums=(0, 1, 2), has_aux=True))
    params = as_params(case.arrays, *case.kinds)
    flags = {name: jnp.asarray(flag) for name, flag in case.flags.items()}
    (_, (y, hidden)), (dp, dx, dh0) = function(params, case.x, case.h0, flags)
    grads = as_dict(dp, x=dx, h0=dh0)
    return {"y": y, "hidden": hidden} | {f"d{name}": grad for name, grad in grads.items()}


def name_of(row):
    return "-".join(str(value) for value in row.values())


def test_the_cases_can_fail():
    """Every batch and hidden size of 1..9; whole and empty sequences, resets where it matters."""
    cases = [make_case(row, *SIZES[i], seed=i) for i, row in enumerate(ROWS)]
    assert {B for B, _ in SIZES} == {H for _, H in SIZES} == set(range(1, 10))
    assert all(case.x.shape[-1] != case.h0.shape[-1] for case in cases)
    lengths = np.concatenate([c.flags["lengths"].ravel() for c in cases if "lengths" in c.flags])
    assert set(lengths.tolist()) == set(range(T + 1))
    skipped = [
        (~c.flags["mask"] & c.flags["resets"]).any()
        for c in cases
        if len(c.flags) == 2 and "mask" in c.flags
    ]
    assert all(skipped)


@pytest.mark.parametrize("i", range(len(ROWS)), ids=list(map(name_of, ROWS)))
def test_values_and_gradients(i):
    case = make_case(ROWS[i], *SIZES[i], seed=i)
    assert_close(by_the_library(case, jax.jit), by_the_loop(case), TOLERANCE["float64"])


@pytest.mark.parametrize("i", range(len(PAIRS)), ids=list(map(name_of, PAIRS)))
def test_values_and_gradients_eagerly(i):
    case = make_case(PAIRS[i], *SIZES[i], seed=i)
    assert_close(by_the_library(case), by_the_loop(case), TOLERANCE["float64"])


@pytest.mark.parametrize("i", range(len(PAIRS)), ids=list(map(name_of, PAIRS)))
def test_values_and_gradients_in_float32(i):
    case = make_case(PAIRS[i], *SIZES[i], seed=i, dtype="float32")
    got = by_the_library(case, jax.jit)
    assert {array.dtype.name for array in got.values()} == {"float32"}
    assert_close(got, by_the_loop(case), TOLERANCE["float32"])


def check_size(B, H, mode, projected=False):
    """Gradients under jit at one size; XLA's CPU compiler has faults at single small sizes."""
    row = {"mode": mode, "padding": None, "resets": False, "reverse": False, "batch_axes": 1}
    row |= {"output_mode": "sequence", "projected": projected, "checkpoint": None}
    case = make_case(row, B, H, seed=0)
    assert_close(by_the_library(case, jax.jit), by_the_loop(case), TOLERANCE["float64"])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_size_of_a_known_compiler_fault(mode, projected):
    check_size(4, 5, mode, projected)


@pytest.mark.slow
@pytest.mark.parametrize("B", range(1, 10))
def test_every_other_small_size(B):
    """With the rows above, all of 1..9 by 1..9."""
    for H in range(1, 10):
        if (B, H) not in SIZES:
            check_size(B, H, MODES[(B + H) % 3])


def one_sequence(mode, seed, reverse=False):
    """A masked sequence with resets and without batch axes, and the same without its gaps."""
    row = {"mode": mode, "padding": "mask", "resets": True, "reverse": reverse, "batch_axes": 1}
    row |= {"output_mode": "sequence", "projected": False, "checkpoint": None}
    case = make_case(row, 1, 4, seed)
    case = case._replace(**{name: getattr(case, name)[0] for name in ("x", "h0", "cy", "ch")})
    mask, resets = case.flags["mask"][0], case.flags["resets"][0]
    short = case._replace(x=case.x[mask], cy=case.cy[mask], flags={"resets": resets[mask]})
    return mask, case._replace(flags={"mask": mask, "resets": resets}), short


@pytest.mark.parametrize(("mode", "reverse"), list(zip(MODES, (False, True, True), strict=True)))
def test_masked_steps_are_as_if_absent(mode, reverse):
    mask, case, short = one_sequence(mode, 1, reverse)
    assert 2 <= mask.sum() <= T - 2
    got, want = by_the_library(case, jax.jit), by_the_library(short, jax.jit)
    for name in ("y", "dx"):
        assert np.all(np.asarray(got[name])[~mask] == 0)
        got[name] = got[name][mask]
    assert_close(got, want, TOLERANCE["float64"])
    assert_close(want, by_the_loop(short), TOLERANCE["float64"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_chunks_equal_one_run(mode, reverse):
    """The state handed on from chunk to chunk; a mask lies across the border."""
    rng = np.random.default_rng(2)
    params = as_params(random_params(rng, 4, 3, mode), mode)
    x, h0, mask = rng.normal(size=(3, 6, 3)), rng.normal(size=(3, 4)), rng.random((3, 6)) < 0.6
    y, hidden = gru_jax.gru(params, x, h0, mask=mask, reverse=reverse)
    h, ys = h0, {}
    for part in (slice(3, 6), slice(0, 3)) if reverse else (slice(0, 3), slice(3, 6)):
        ys[part.start], h = gru_jax.gru(params, x[:, part], h, mask=mask[:, part], reverse=reverse)
    chunked = {"y": np.concatenate([ys[0], ys[3]], 1), "hidden": h}
    assert_close(chunked, {"y": y, "hidden": hidden}, TOLERANCE["float64"])


def test_no_initial_state_means_zeros():
    """Also where resets go back to it."""
    rng = np.random.default_rng(3)
    params = as_params(random_params(rng, 4, 3, MODES[0]), MODES[0])
    x, resets = rng.normal(size=(2, 5, 3)), rng.random((2, 5)) < 0.4
    for got, want in zip(
        gru_jax.gru(params, x, resets=resets),
        gru_jax.gru(params, x, np.zeros((2, 4)), resets=resets),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_lengths_and_mask_exclude_each_other():
    params = as_params(random_params(np.random.default_rng(4), 4, 3, MODES[0]), MODES[0])
    flags = {"lengths": np.array([5, 2]), "mask": np.ones((2, 5), bool)}
    with pytest.raises(ValueError, match="lengths and mask"):
        gru_jax.gru(params, np.ones((2, 5, 3)), **flags)


def plain(params, x, h0, mask, resets):
    """What autodiff makes of a scan of the cell."""

    def body(h, now):
        x, valid, reset = now
        h = jnp.where(valid, gru_jax.gru_cell(params, jnp.where(reset, h0, h), x), h)
        return h, jnp.where(valid, h, 0.0)

    flags = (mask[..., None], resets[..., None])
    hidden, y = lax.scan(body, h0, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, *flags)))
    return jnp.moveaxis(y, 0, 1), hidden


def flat_problem(mode, projected, activations):
    """All arrays of a tiny layer as one vector, the way back, and flags."""
    rng = np.random.default_rng(5)
    arrays = random_params(rng, 2, 3, mode, *((2, 1) if projected else ()))
    params = as_params(arrays, mode, *activations)
    flat, unravel = ravel_pytree((params, rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 2))))
    flags = {"mask": rng.random((2, 4)) < 0.8, "resets": rng.random((2, 4)) < 0.3}
    return flat, unravel, flags


def outputs_of(layer, unravel, **options):
    """The layer from one vector to one vector."""

    def function(flat):
        y, hidden = layer(*unravel(flat), **options)
        return jnp.concatenate([y.ravel(), hidden.ravel()])

    return function


def derivatives(function, flat):
    """The kinds of derivative that reverse mode alone does not give."""
    weights = jnp.cos(jnp.arange(function(flat).size, dtype=flat.dtype))
    other = jnp.sin(jnp.arange(flat.size, dtype=flat.dtype))
    scalar = lambda flat: jnp.sum(weights * function(flat))  # noqa: E731
    return {
        "jvp": jax.jvp(function, (flat,), (other,))[1],
        "jacfwd": jax.jacfwd(function)(flat),
        "hessian": jax.hessian(scalar)(flat),
        "vmap of grad": jax.vmap(jax.grad(scalar))(jnp.stack([flat, flat + 0.1 * other])),
        "grad of checkpoint": jax.grad(jax.checkpoint(scalar))(flat),
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_equal_plain_autodiff(mode):
    flat, unravel, flags = flat_problem(mode, False, ACTIVATIONS[MODES.index(mode)])
    got = outputs_of(gru_jax.gru, unravel, **flags)
    want = outputs_of(plain, unravel, **flags)
    run = jax.jit(lambda flat: (derivatives(got, flat), derivatives(want, flat)))
    assert_close(*run(flat), TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "checkpoint"), list(zip(MODES, CHECKPOINTS[1:], strict=True)))
def test_second_derivatives_of_checkpointed_runs(mode, checkpoint):
    """Equal to those of a run that keeps everything."""
    flat, unravel, flags = flat_problem(mode, True, ACTIVATIONS[0])
    weights = np.cos(np.arange(flat.size))

    def curvature(checkpoint):
        function = outputs_of(gru_jax.gru, unravel, checkpoint=checkpoint, **flags)
        grad = jax.grad(lambda flat: jnp.sum(jnp.square(function(flat))))
        return jax.jvp(grad, (flat,), (weights,))

    got, want = jax.jit(lambda: (curvature(checkpoint), curvature(None)))()
    names = ("gradient", "curvature")
    tolerance = TOLERANCE["float64"]
    assert_close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_second_order_by_finite_differences(mode, projected):
    """Forward, reverse, and each of each."""
    flat, unravel, flags = flat_problem(mode, projected, ACTIVATIONS[0])
    function = jax.jit(outputs_of(gru_jax.gru, unravel, **flags))
    options = {"order": 2, "modes": ("fwd", "rev"), "eps": 3e-6}
    check_grads(function, (flat,), atol=2e-8, rtol=2e-8, **options)
