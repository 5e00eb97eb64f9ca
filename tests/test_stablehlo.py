"""Programs for other processes: against the oracle and the core, in a process with JAX alone."""

import dataclasses
import os
import pickle
import random
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, as_params, assert_close, random_params
from jax import export as jax_export
from reference import MODES, gru_ref, gru_ref_grads

import gru_jax
from gru_jax.export import _stablehlo
from gru_jax.export._stablehlo import FOOTER, MARK, from_stablehlo, to_stablehlo

H, CHANNELS = 5, 3
PLATFORMS = ("cpu", "cuda", "tpu")
SIZES = [(7, 1), (3, 33), (1, 6), (2, 4)]
PROJECTED = {"P_i": 2, "P_o": 4}


def problem(mode=MODES[2], dtype="float64", channels=CHANNELS, batch=2, time=4, **sizes):
    rng = np.random.default_rng([3, channels, batch, time, *sizes.values()])
    arrays = random_params(rng, H, channels, mode, dtype=dtype, **sizes)
    x = rng.normal(size=(batch, time, channels)).astype(dtype)
    return as_params(arrays, mode), jnp.asarray(x), jnp.asarray(rng.normal(size=(batch, H)), dtype)


def loss(run, x, h0, *flags):
    y, hidden = run(x, h0, *flags)
    return jnp.sum(jnp.sin(y)) + jnp.sum(hidden**2)


def leaves(tree):
    return dict(enumerate(jax.tree.leaves(tree)))


@pytest.fixture(scope="module")
def artefact():
    """With a gradient, float32; and its parameters."""
    params, *_ = problem(dtype="float32")
    return params, to_stablehlo(params, gradient=True)


# The same numbers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "sizes"), [("float64", PROJECTED), ("float32", {})], ids=["projected", "dense"]
)
def test_any_batch_and_time_of_one_artefact(mode, sizes, dtype):
    params, *_ = problem(mode, dtype, **sizes)
    run = from_stablehlo(to_stablehlo(params, gradient=True))
    for batch, time in SIZES:
        _, x, h0 = problem(mode, dtype, batch=batch, time=time, **sizes)
        out = run(x, h0)
        assert [a.dtype for a in out] == [dtype, dtype]
        oracle = gru_ref(params.arrays(), x, h0, mode=mode)
        assert_close(leaves(out), leaves(oracle), TOLERANCE[dtype])
    check_gradient(run, params, x, h0, dtype)


def check_gradient(run, params, x, h0, dtype, *flags, **options):
    """Of a loaded program, against back-propagation by hand."""
    rng = np.random.default_rng(4)
    (y, hidden), pullback = jax.vjp(lambda x, h0: run(x, h0, *flags), x, h0)
    cy, ch = rng.normal(size=y.shape), rng.normal(size=hidden.shape)
    dx, dh0 = pullback((jnp.asarray(cy, y.dtype), jnp.asarray(ch, y.dtype)))
    mode = params.reset_gate_mode
    expected = gru_ref_grads(params.arrays(), x, h0, cy, ch, mode=mode, **options)
    expected = {name: expected[name] for name in ("x", "h0")}
    assert_close({"x": dx, "h0": dh0}, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "sizes"), [("float32", PROJECTED), ("float64", {})])
def test_the_bits_are_those_of_the_core(mode, sizes, dtype):
    params, x, h0 = problem(mode, dtype, batch=3, time=33, **sizes)
    run = from_stablehlo(to_stablehlo(params))
    for actual, expected in zip(run(x, h0), jax.jit(gru_jax.gru)(params, x, h0), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("options", "with_lengths", "channels"), [
    ({"reverse": True}, False, 1), ({"output_mode": "last"}, False, 3 * H), ({}, True, 1),
    ({"reverse": True, "output_mode": "last"}, True, 3 * H), ({"reverse": True}, True, 3),
])  # fmt: skip
def test_options_of_the_sequence(options, with_lengths, channels):
    params, x, h0 = problem(channels=channels, batch=4, time=6)
    run = from_stablehlo(to_stablehlo(params, gradient=True, lengths=with_lengths, **options))
    lengths = np.array([6, 0, 3, 1])
    flags = [lengths] if with_lengths else []
    kinds = {"mode": params.reset_gate_mode, **options}
    kinds |= {"lengths": lengths} if with_lengths else {}
    assert_close(
        leaves(run(x, h0, *flags)), leaves(gru_ref(params.arrays(), x, h0, **kinds)), 1e-12
    )
    check_gradient(
        run, params, x, h0, "float64", *flags, **{k: v for k, v in kinds.items() if k != "mode"}
    )
    assert run.lengths is with_lengths
    whole = gru_ref(params.arrays(), x, **{**kinds, "lengths": None})
    assert_close(leaves(run(x)), leaves(whole), 1e-12)  # all of time, from zeros


@pytest.mark.parametrize("precision", [None, "highest"])
def test_precision_of_the_products_is_in_the_program(precision):
    data = to_stablehlo(problem(dtype="float32")[0], precision=precision)
    text = from_stablehlo(data).exported.mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all(("HIGHEST" in line) is (precision == "highest") for line in products)


def test_custom_activations_and_one_state_for_all():
    def gate(v):
        return 0.5 + 0.5 * jnp.sin(v)

    params, x, h0 = problem("before-multiplication")
    params = params.replace(gate_activation_function=gate, state_activation_function=jnp.arctan)
    run = from_stablehlo(to_stablehlo(params))
    assert_close(leaves(run(x, h0[0])), leaves(gru_jax.gru(params, x, h0[0])), 1e-13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_its_state_in_float32(dtype):
    params, x, h0 = problem(dtype="float32")
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    run = from_stablehlo(to_stablehlo(params))
    y, hidden = run(x.astype(dtype), h0)
    expected, state = gru_jax.gru(params, x.astype(dtype), h0)
    assert (y.dtype, hidden.dtype, run.dtype) == (jnp.dtype(dtype), jnp.float32, jnp.dtype(dtype))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(hidden, state)


def test_narrow_inputs_are_widened_as_the_core_does_it():
    params, x, h0 = problem()
    run = from_stablehlo(to_stablehlo(params.replace(bias=params.bias.astype("float32"))))
    params = params.replace(bias=params.bias.astype("float32"))
    x, h0 = x.astype("bfloat16"), h0.astype("float32")
    assert_close(leaves(run(x, h0)), leaves(gru_jax.gru(params, x, h0)), 1e-13)


# Under transformations


def test_jit_vmap_and_leading_axes():
    params, x, h0 = problem(batch=6)
    run = from_stablehlo(to_stablehlo(params, gradient=True, lengths=True))
    lengths = jnp.array([4, 0, 1, 2, 3, 4])
    core = lambda x, h0, n: gru_jax.gru(params, x, h0, lengths=n)  # noqa: E731
    whole = core(x, h0, lengths)
    split = lambda a: a.reshape(3, 2, *a.shape[1:])  # noqa: E731
    joined = lambda tree: leaves(jax.tree.map(lambda a: a.reshape(6, *a.shape[2:]), tree))  # noqa: E731
    parts = [split(a) for a in (x, h0, lengths)]
    for f in (run, jax.jit(jax.vmap(run)), jax.vmap(jax.vmap(run))):
        assert_close(joined(f(*parts)), leaves(whole), 1e-13)
    one = jax.tree.map(lambda a: a[5], (x, h0, lengths))
    assert_close(leaves(run(*one)), leaves(jax.tree.map(lambda a: a[5], whole)), 1e-13)

    grads = jax.grad(partial(loss, core), (0, 1))(x, h0, lengths)
    inside = jax.vmap(jax.grad(partial(loss, run), (0, 1)))(*parts)
    outside = jax.grad(partial(loss, jax.vmap(run)), (0, 1))(*parts)
    assert_close(joined(inside), leaves(grads), 1e-12)
    assert_close(joined(outside), leaves(grads), 1e-12)
    shared = jax.vmap(lambda h: run(x, h, lengths))(jnp.stack([h0, -h0]))
    expected = jax.vmap(lambda h: core(x, h, lengths))(jnp.stack([h0, -h0]))
    assert_close(leaves(shared), leaves(expected), 1e-13)


def test_exports_again_as_part_of_another_program(artefact):
    params, data = artefact
    _, x, _ = problem(dtype="float32")
    b, t = jax_export.symbolic_shape("b, t")
    around = jax.jit(lambda x: from_stablehlo(data)(x + 1.0)[0])
    exported = jax_export.export(around)(jax.ShapeDtypeStruct((b, t, CHANNELS), jnp.float32))
    y = jax_export.deserialize(exported.serialize()).call(x)
    assert_close({0: y}, {0: gru_jax.gru(params, x + 1.0)[0]}, 1e-6)


def test_a_mesh_splits_the_batch_and_none_may_be_set_at_export(artefact):
    params, data = artefact
    _, x, h0 = problem(dtype="float32", batch=8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = jax.device_put((x, h0), jax.NamedSharding(mesh, jax.P("data")))
        out = from_stablehlo(data)(*rows)
        with pytest.raises(ValueError, match=r"4 devices only: call to_stablehlo outside"):
            to_stablehlo(params)
    assert_close(leaves(out), leaves(gru_jax.gru(params, x, h0)), 1e-6)


def test_the_second_call_compiles_nothing(artefact):
    run = from_stablehlo(artefact[1])
    _, x, h0 = problem(dtype="float32")
    grad, other, shorter = jax.grad(partial(loss, run)), x + 1.0, x[:, 1:]
    jax.block_until_ready((run(x, h0), grad(x, h0)))
    compiled = []
    count = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.block_until_ready((run(other, h0), grad(other, h0)))
        assert not [event for event in compiled if "backend_compile" in event]
        run(shorter, h0)
        assert [event for event in compiled if "backend_compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


# Elsewhere

ELSEWHERE = """
import sys
import numpy as np
import jax
from jax import export

data = np.load(sys.argv[1])
program = export.deserialize(bytearray(data["artefact"].tobytes()))
y, hidden = program.call(data["x"], data["h0"])
loss = lambda x, h0: jax.numpy.sin(program.call(x, h0)[0]).sum()
dx, dh0 = jax.grad(loss, (0, 1))(data["x"], data["h0"])
assert not [name for name in sys.modules if "gru_jax" in name or "flax" in name]
np.savez(sys.argv[2], y=y, hidden=hidden, dx=dx, dh0=dh0)
"""


@pytest.mark.parametrize(("dtype", "x64"), [("float32", "0"), ("float32", "1"), ("float64", "1")])
def test_runs_and_differentiates_where_only_jax_is(tmp_path, dtype, x64):
    params, x, h0 = problem(dtype=dtype)
    data = np.frombuffer(to_stablehlo(params, gradient=True), np.uint8)
    np.savez(tmp_path / "in.npz", artefact=data, x=x, h0=h0)
    command = [sys.executable, "-c", ELSEWHERE, tmp_path / "in.npz", tmp_path / "out.npz"]
    environment = {**os.environ, "JAX_ENABLE_X64": x64, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    found = dict(np.load(tmp_path / "out.npz"))
    y, hidden = gru_jax.gru(params, x, h0)
    dx, dh0 = jax.grad(lambda *a: jnp.sin(gru_jax.gru(params, *a)[0]).sum(), (0, 1))(x, h0)
    expected = {"y": y, "hidden": hidden, "dx": dx, "dh0": dh0}
    assert_close(found, expected, 2 * TOLERANCE[dtype])
    assert {a.dtype for a in found.values()} == {np.dtype(dtype)}


def test_an_artefact_made_without_x64_runs_with_it(artefact):
    params, _ = artefact
    _, x, h0 = problem(dtype="float32")
    with jax.enable_x64(False):
        data = to_stablehlo(params, gradient=True, lengths=True)
    run, lengths = from_stablehlo(data), jnp.array([4, 2])
    expected = gru_jax.gru(params, x, h0, lengths=lengths)
    assert_close(leaves(run(x, h0, lengths)), leaves(expected), 1e-6)


def test_holds_the_programs_of_platforms_that_are_not_here(artefact):
    exported = jax_export.deserialize(bytearray(artefact[1]))
    assert exported.platforms == from_stablehlo(artefact[1]).platforms == PLATFORMS
    _, x, h0 = problem(dtype="float32")
    for platform in PLATFORMS:
        lowered = jax.jit(exported.call).trace(x, h0).lower(lowering_platforms=(platform,))
        assert "stablehlo.while" in lowered.as_text()


@pytest.mark.parametrize("under", [lambda f: f, jax.jit])
def test_another_platform_is_refused(under):
    params, x, h0 = problem()
    run = from_stablehlo(to_stablehlo(params, platforms=["cuda", "rocm"]))
    assert run.platforms == ("cuda", "rocm")
    with pytest.raises(ValueError, match=r"exported for platforms .*cuda.* is used on .*cpu"):
        under(run)(x, h0)


def test_the_artefact_is_the_exported_one_and_a_footer(artefact):
    _, data = artefact
    assert type(data) is bytes
    assert data.endswith(MARK)
    assert b"gru_jax_gru" in data
    exported = jax_export.deserialize(bytearray(data[:-FOOTER]))
    whole = jax_export.deserialize(bytearray(data))
    assert exported.mlir_module_serialized == whole.mlir_module_serialized
    assert repr(from_stablehlo(memoryview(data))) == (
        f"Program(input_size={CHANNELS}, num_hidden_units={H}, dtype=float32, gradient=True, "
        f"lengths=False, platforms={PLATFORMS})"
    )


# Refusals


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda run, x, h: run(x[..., :2], h), ValueError, r"input_size = 3 channels, got shape"),
    (lambda run, x, h: run(x.swapaxes(1, 2), h), ValueError, r"channels-first"),
    (lambda run, x, h: run(x[0, 0], h), ValueError, r"at least 2 axes"),
    (lambda run, x, h: run(x, h[:, :4]), ValueError, r"h0 must have shape \(2, 5\)"),
    (lambda run, x, h: run(x, h[:1]), ValueError, r"h0 must have shape \(2, 5\)"),
    (lambda run, x, h: run(x[:, :0], h), ValueError, r"at least one sequence and one step"),
    (lambda run, x, h: run(x[:0], h[:0]), ValueError, r"at least one sequence and one step"),
    (lambda run, x, h: run(x.astype("float64"), h), TypeError, r"x must be float32.*got float64"),
    (lambda run, x, h: run(x.astype("int32"), h), TypeError, r"floating-point"),
    (lambda run, x, h: run(x, h.astype("int32")), TypeError, r"floating-point"),
    (lambda run, x, h: run("x", h), TypeError, r"floating-point"),
    (lambda run, x, h: run(x, h, np.array([1, 2])), ValueError, r"to_stablehlo\(params, lengths="),
    (lambda run, x, h: jax.grad(partial(loss, run))(x, h), ValueError, r"gradient=True"),
])  # fmt: skip
def test_arguments_of_a_loaded_program(call, error, message):
    params, x, h0 = problem(dtype="float32")
    run = from_stablehlo(to_stablehlo(params))
    with pytest.raises(error, match=message):
        call(run, x, h0)


def test_the_second_derivative_is_refused(artefact):
    run, (_, x, h0) = from_stablehlo(artefact[1]), problem(dtype="float32")
    slope = jax.grad(partial(loss, run))
    with pytest.raises(ValueError, match=r"serves one derivative"):
        jax.grad(lambda x: slope(x, h0).sum())(x)


@pytest.mark.parametrize(("lengths", "error", "message"), [
    ([5, 1], ValueError, r"0\.\.4"), ([1], ValueError, r"shape \(\*batch,\) = \(2,\)"),
    ([1.0, 2.0], TypeError, r"integers"),
])  # fmt: skip
def test_lengths_of_a_loaded_program(lengths, error, message):
    params, x, h0 = problem()
    run = from_stablehlo(to_stablehlo(params, lengths=True))
    with pytest.raises(error, match=message):
        run(x, h0, lengths)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"platforms": "cpu"}, ValueError, r"platforms must be some of .*got 'cpu'"),
    ({"platforms": ()}, ValueError, r"platforms must be some of"),
    ({"platforms": ("gpu",)}, ValueError, r"a GPU is 'cuda' or 'rocm'"),
    ({"gradient": 2}, TypeError, r"gradient must be True or False"),
    ({"lengths": "yes"}, TypeError, r"lengths must be True or False"),
    ({"reverse": "yes"}, TypeError, r"reverse must be True or False"),
    ({"output_mode": "first"}, ValueError, r"output_mode must be"),
    ({"precision": "best"}, ValueError, r"precision must be"),
])  # fmt: skip
def test_options_that_do_not_exist(options, error, message):
    with pytest.raises(error, match=message):
        to_stablehlo(problem()[0], **options)


def test_parameters_that_cannot_be_exported():
    params, *_ = problem()
    with pytest.raises(TypeError, match=r"must be a gru_jax\.GRUParams"):
        to_stablehlo(params.arrays())
    with pytest.raises(ValueError, match="bias must have shape"):
        to_stablehlo(params.replace(bias=params.bias[:6]))
    with pytest.raises(TypeError, match="bias must be an array of"):
        to_stablehlo(params.replace(bias=jax.ShapeDtypeStruct(params.bias.shape, jnp.float64)))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda p: to_stablehlo(p))(params)


def test_float64_is_never_rounded_in_silence():
    params, x, _ = problem()
    numpy_params = jax.tree.map(np.asarray, params)
    run = from_stablehlo(to_stablehlo(numpy_params))
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"params are float64.*jax_enable_x64"):
            to_stablehlo(numpy_params)
        with pytest.raises(ValueError, match=r"this program is float64.*jax_enable_x64"):
            run(np.asarray(x))
    assert run(x)[0].dtype == jnp.float64


class _Runs:
    """Something whose pickle runs a function when it is read."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize(("data", "error"), [
    (b"", ValueError), (MARK, ValueError), (b"\x00" * 48, ValueError),
    (pickle.dumps(_Runs()), ValueError), (pickle.dumps(_Runs()) + MARK, ValueError),
    ("model.bin", TypeError), (None, TypeError), (np.zeros(3), TypeError),
])  # fmt: skip
def test_what_is_no_artefact(data, error, monkeypatch):
    monkeypatch.setattr(_stablehlo.jax_export, "deserialize", partial(pytest.fail, "it was read"))
    with pytest.raises(error, match=r"^data (must be the bytes|is no artefact|is damaged)"):
        from_stablehlo(data)


def test_what_jax_serialised_by_itself_is_told_apart(artefact):
    with pytest.raises(ValueError, match=r"loads with jax\.export\.deserialize"):
        from_stablehlo(artefact[1][:-FOOTER])


def test_damage_is_found_before_anything_is_read(artefact, monkeypatch):
    _, data = artefact
    monkeypatch.setattr(_stablehlo.jax_export, "deserialize", partial(pytest.fail, "it was read"))
    rng = random.Random(5)
    for n in range(300):
        damaged, at = bytearray(data), rng.randrange(len(data))
        if n % 3 == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif n % 3 == 1:
            damaged = damaged[:at]
        else:
            damaged = damaged[:at] + rng.randbytes(rng.randrange(1, 9)) + damaged[at:]
        with pytest.raises(ValueError, match=r"^data is (no artefact|damaged)"):
            from_stablehlo(bytes(damaged))


@pytest.mark.parametrize("payload", [b"", b"\x04\x00\x00\x00" * 9, b"\xff" * 200])
def test_whole_but_unreadable(payload):
    with pytest.raises(ValueError, match=r"could not be read by JAX .*six months back"):
        from_stablehlo(_stablehlo._sealed(payload))


@pytest.mark.parametrize("order", [0, 1])
def test_a_program_that_this_jax_cannot_read_is_refused_at_once(artefact, order):
    exported = jax_export.deserialize(bytearray(artefact[1]))
    unreadable = dataclasses.replace(exported, mlir_module_serialized=b"of another time")
    if order:
        unreadable = dataclasses.replace(exported, _get_vjp=lambda _, u=unreadable: u)
    with pytest.raises(ValueError, match=r"could not be read by JAX"):
        from_stablehlo(_stablehlo._sealed(bytes(unreadable.serialize(vjp_order=order))))


@pytest.mark.parametrize("call", [
    lambda data: from_stablehlo(data), lambda data: to_stablehlo(problem()[0]),
])  # fmt: skip
def test_without_flatbuffers(call, artefact, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r'pip install "gru_jax\[export\]"'):
        call(artefact[1])
