"""Data formats: every row of the table on a real layer, against column-major flattening."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import MODES, gru_ref

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import formats

H = 3
SIZES = {"C": 3, "B": 2, "T": 4, "U": 1}
SPATIAL = (2, 3, 2)  # so that S axes and C can be told apart by order

TABLE = {
    "CB SCB SSCB SSSCB": ("CB", "CB"),
    "CBT SCBT SSCBT SSSCBT": ("CBT", "CB"),
    "SC SSC SSSC": ("C", "C"),
    "CT SCT SSCT SSSCT": ("CT", "C"),
    "C S SS SSS": ("C", "C"),
    "B": ("CB", "CB"),
    "SB SSB SSSB": ("CB", "CB"),
    "BT SBT SSBT SSSBT": ("CBT", "CB"),
    "T ST SST SSST": ("CT", "C"),
}
ROWS = [(one, *out) for inputs, out in TABLE.items() for one in inputs.split()]
MODES_OF_OUTPUT = ("sequence", "last")


def shape_of(data_format):
    spatial = iter(SPATIAL)
    return tuple(next(spatial) if a == "S" else SIZES[a] for a in data_format)


def flattened(x, data_format):
    """(batch, time, channels) of x: axes put in the order S…, C, B, T, then Fortran's reshape."""
    order = [i for letter in "SCBTU" for i, a in enumerate(data_format) if a == letter]
    x = np.transpose(x, order)
    batch = SIZES["B"] if "B" in data_format else 1
    time = SIZES["T"] if "T" in data_format else 1
    columns = x.reshape((-1, batch, time), order="F")
    return np.moveaxis(columns, 0, -1)


def learnables(input_size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "input_weights": rng.normal(size=(3 * H, input_size)) / np.sqrt(input_size),
        "recurrent_weights": rng.normal(size=(3 * H, H)),
        "bias": rng.normal(size=3 * H),
    }


def arranged(y, target, output_mode):
    """(batch, time, H) or (batch, H) of the core with the axes that `target` names."""
    axes = "BTC" if output_mode == "sequence" else "BC"
    index = [slice(None) if axis in target else 0 for axis in axes]
    rest = [axis for axis in axes if axis in target]
    return np.transpose(y[tuple(index)], [rest.index(axis) for axis in target])


def call(data_format, output_mode, x, leaves, *, face, hidden=None):
    ports = hidden is not None
    options = {
        "output_mode": output_mode,
        "data_format": data_format,
        "has_state_inputs": ports,
        "has_state_outputs": ports,
        "param_dtype": "float64",
    }
    if face == "linen":
        return gru_jax.linen.GRULayer(H, **options).apply({"params": leaves}, x, hidden)
    return gru_jax.nnx.GRULayer(H, **leaves, **options)(x, hidden)


def check(data_format, output_mode, target, *, face, hidden=False):
    """One format on a layer: the shape and the numbers of the output, and the state port."""
    x = np.random.default_rng(1).normal(size=shape_of(data_format))
    flat = flattened(x, data_format)
    leaves = learnables(flat.shape[-1])
    h0 = np.random.default_rng(2).normal(size=(len(flat), H)) if hidden else None
    y, final = gru_ref(leaves, flat, h0, mode=MODES[0], output_mode=output_mode)
    want = arranged(y, target, output_mode)
    port = "".join(letter for letter in target if letter != "T")
    start = arranged(h0, port, "last") if hidden else None
    got = call(data_format, output_mode, x, leaves, face=face, hidden=start)
    if hidden:
        got, state = got
        state_want = arranged(final, port, "last")
        assert state.shape == state_want.shape
        np.testing.assert_allclose(state, state_want, atol=1e-12)
    assert got.shape == want.shape == shape_of(target)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_every_row_is_there():
    assert len(ROWS) == 31
    wanted = {s + c + b + t for s in ("", "S", "SS", "SSS") for c in ("C", "")
              for b in ("B", "") for t in ("T", "")} - {""}  # fmt: skip
    assert {row[0] for row in ROWS} == wanted
    assert formats.output_format("SSCBT", "last") == "CB"
    assert SIZES["C"] == H  # so that shape_of gives the shapes of outputs too


@pytest.mark.parametrize(("data_format", "sequence", "last"), ROWS)
def test_table(data_format, sequence, last):
    assert formats.output_format(data_format) == sequence
    assert formats.output_format(data_format, "sequence") == sequence
    assert formats.output_format(data_format, "last") == last
    check(data_format, "sequence", sequence, face="linen")
    check(data_format, "last", last, face="nnx")


def test_last_and_sequence_give_both_faces_the_same():
    for face, output_mode, target in (("nnx", "sequence", "CBT"), ("linen", "last", "CB")):
        check("SSCBT", output_mode, target, face=face)


def test_the_first_spatial_axis_is_fastest_and_c_slowest():
    x = jnp.arange(2 * 3 * 2).reshape(2, 3, 2)
    flat = formats.to_core(x, "SSC")
    assert flat.shape == (1, 12)
    order = [x[i, j, c] for c in range(2) for j in range(3) for i in range(2)]
    np.testing.assert_array_equal(flat[0], order)
    np.testing.assert_array_equal(formats.to_core(x.transpose(2, 0, 1), "CSS")[0], order)


PERMUTED = {
    "BTC": ("BTC", "BC"),
    "BCT": ("BCT", "BC"),
    "TBC": ("TBC", "BC"),
    "TCB": ("TCB", "CB"),
    "CTB": ("CTB", "CB"),
    "TC": ("TC", "C"),
    "BC": ("BC", "BC"),
    "TB": ("CTB", "CB"),
    "BSTSC": ("BCT", "BC"),
    "BTCS": ("BTC", "BC"),
    "SBTS": ("CBT", "CB"),
    "TSB": ("TCB", "CB"),
    "CBSTS": ("CBT", "CB"),
    "UCBT": ("CBT", "CB"),
    "BUTUC": ("BTC", "BC"),
    "SCBTU": ("CBT", "CB"),
    "CU": ("C", "C"),
    "U": ("C", "C"),
    "TU": ("CT", "C"),
}


@pytest.mark.parametrize(("data_format", "targets"), PERMUTED.items())
def test_any_order_of_the_letters(data_format, targets):
    for output_mode, target in zip(MODES_OF_OUTPUT, targets, strict=True):
        assert formats.output_format(data_format, output_mode) == target
        check(data_format, output_mode, target, face="linen")


@pytest.mark.parametrize("data_format", ["BTC", "CBT", "SCB", "TCS", "UBT", "C"])
@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_state_ports_have_the_letters_of_last(data_format, face):
    for output_mode in MODES_OF_OUTPUT:
        target = formats.output_format(data_format, output_mode)
        check(data_format, output_mode, target, face=face, hidden=True)


def test_lengths_do_not_follow_the_format():
    x = np.random.default_rng(0).normal(size=(4, 5, 2))  # T, C, B
    leaves, lengths = learnables(5), np.array([1, 4])
    y, _ = gru_ref(leaves, x.transpose(2, 0, 1), mode=MODES[0], lengths=lengths)
    layer = gru_jax.linen.GRULayer(H, data_format="TCB")
    got = layer.apply({"params": leaves}, x, lengths=lengths)
    np.testing.assert_allclose(got, y.transpose(1, 2, 0), atol=1e-12)


def test_large_u_axes_are_refused():
    with pytest.raises(ValueError, match=r"U axis must have size 1, got 2 in axis 1 of shape"):
        formats.to_core(jnp.ones((4, 2, 3)), "TUC")


def test_formats_work_on_traced_and_empty_arrays():
    for shape in ((3, 0, 4), (3, 2, 0)):
        x = jnp.ones(shape)
        assert formats.to_core(x, "CBT").shape == (*shape[1:], 3)
        y = jax.jit(lambda x: call("CBT", "sequence", x, learnables(3), face="nnx"))(x)
        assert y.shape == (H, *shape[1:])


SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def any_format(draw):
    letters = [x for x in "CBT" if draw(st.booleans())]
    letters += ["S"] * draw(st.integers(0, 3)) + ["U"] * draw(st.integers(0, 1))
    return "".join(draw(st.permutations(letters or ["C"])))


@SETTINGS
@given(any_format(), st.sampled_from(MODES_OF_OUTPUT))
def test_the_rules_hold_for_any_format(data_format, output_mode):
    target = formats.output_format(data_format, output_mode)
    assert target.count("C") == 1
    assert set(target) <= set("CBT")
    assert ("B" in target) == ("B" in data_format)
    assert ("T" in target) == ("T" in data_format and output_mode == "sequence")
    kept = [a for a in data_format if a in target and a != "C"]
    assert [a for a in target if a != "C"] == kept
    flattened_axes = [i for i, a in enumerate(data_format) if a in "SC"]
    before = data_format[: flattened_axes[0]] if flattened_axes else ""
    assert target.index("C") == sum(a in target for a in before)
    assert formats.output_format(target) == target  # layers of one format can be stacked
    assert formats.channel_axis(data_format, output_mode) == target.index("C") - len(target)


@settings(SETTINGS, max_examples=20)
@given(any_format(), st.data())
def test_to_core_and_back_for_any_shape(data_format, data):
    shape = tuple(1 if a == "U" else data.draw(st.integers(0, 4)) for a in data_format)
    x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    flat = np.asarray(formats.to_core(jnp.asarray(x), data_format))

    letters = data_format.replace("U", "")
    x = x.reshape([n for n, a in zip(shape, data_format, strict=True) if a != "U"])
    columns = np.transpose(x, [i for a in "SCBT" for i, b in enumerate(letters) if a == b])
    want = columns.reshape((flat.shape[-1], *flat.shape[:-1]), order="F")
    np.testing.assert_array_equal(flat, np.moveaxis(want, 0, -1))
    if "S" not in letters and "C" in letters:  # nothing was flattened: the way back undoes it
        back = formats.from_core(jnp.asarray(flat), data_format)
        np.testing.assert_array_equal(back, x)


@settings(SETTINGS, max_examples=8)
@given(st.data())
def test_lengths_of_any_shape_against_the_loop(data):
    batch = tuple(data.draw(st.lists(st.integers(0, 2), max_size=2)))
    time = data.draw(st.integers(0, 3))
    count = int(np.prod(batch, dtype=int))
    drawn = data.draw(st.lists(st.integers(0, time), min_size=count, max_size=count))
    lengths = np.reshape(np.array(drawn, int), batch)
    x = np.random.default_rng(0).normal(size=(*batch, time, 2))
    leaves = learnables(2)
    padded = np.where((np.arange(time) < lengths[..., None])[..., None], x, np.nan)
    for output_mode in MODES_OF_OUTPUT:
        want = gru_ref(leaves, x, mode=MODES[0], lengths=lengths, output_mode=output_mode)
        params = gru_jax.GRUParams(**leaves)
        got = gru_jax.gru(params, padded, lengths=lengths, output_mode=output_mode)
        for one, other in zip(got, want, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, atol=1e-12)
