"""What the core is under JAX's transformations, read from jaxprs and from compiled programs."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_params, assert_close, random_params
from jax import export, lax
from jax.sharding import AxisType

import gru_jax
from gru_jax import _linear
from gru_jax._params import RESET_MODES

B, T, INPUTS, H = 4, 6, 3, 5
OPTIONS = [
    {},
    {"lengths": np.array([6, 0, 3, 1])},
    {"resets": np.arange(B * T).reshape(B, T) % 4 == 1},
    {"output_mode": "last"},
    {"reverse": True},
    {"checkpoint": 1},
]


def problem(mode="after-multiplication", dtype="float64", **sizes):
    rng = np.random.default_rng(7)
    params = as_params(random_params(rng, H, INPUTS, mode, dtype=dtype, **sizes), mode)
    x = jnp.asarray(rng.normal(size=(B, T, INPUTS)), dtype)
    return params, x, jnp.asarray(rng.normal(size=(B, H)), dtype)


def loss(params, x, h0, **options):
    y, hidden = gru_jax.gru(params, x, h0, **options)
    return jnp.sum(jnp.sin(y)) + jnp.sum(hidden**2)


def leaves(tree):
    return dict(enumerate(jax.tree.leaves(tree)))


def equations(jaxpr):
    """Every equation of a jaxpr, at any depth, the programs of linear maps included."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "gru_linear":
            program = partial(_linear._run, **equation.params)
            avals = [v.aval for v in equation.invars]
            yield from equations(jax.make_jaxpr(program)(*avals).jaxpr)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def loops(function, *arguments):
    """For every loop of a function: the shapes it carries, and those it emits at each step."""
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "while":
            yield [v.aval.shape for v in equation.outvars], []
        if equation.primitive.name == "scan":
            body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
            shapes = [
                (inside.aval.shape, outside.aval.shape)
                for inside, outside in zip(body.outvars, equation.outvars, strict=True)
            ]
            yield (
                [inside for inside, outside in shapes if inside == outside],
                [outside for inside, outside in shapes if inside != outside],
            )


def carried_shapes(function, *arguments):
    return {shape for carried, _ in loops(function, *arguments) for shape in carried}


@pytest.mark.parametrize("mode", RESET_MODES)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_loop_carries_the_gradient_of_a_weight(mode, projected, options):
    params, x, h0 = problem(mode, **({"P_i": 2, "P_o": 4} if projected else {}))
    grad = jax.grad(partial(loss, **options), argnums=(0, 1, 2))
    jvp_of_grad = lambda *a: jax.jvp(grad, a, a)  # noqa: E731
    for function in (grad, jvp_of_grad):
        carried = carried_shapes(function, params, x, h0)
        assert (B, H) in carried
        # States; and sequences, into which loops write in place, of P_o = 4 numbers a step too.
        assert carried <= {(), (B, H), (B, T, H), (B, T, 4)}, "a weight or a bias is carried"


@pytest.mark.parametrize(("checkpoint", "n"), [(2, 2), ("sqrt", 3)])
def test_segments_add_up_weight_gradients_once_per_segment(checkpoint, n):
    grad = jax.grad(partial(loss, checkpoint=checkpoint))
    carried = [set(shapes) for shapes, _ in loops(grad, *problem())]
    assert sum((3 * H, H) in shapes for shapes in carried) == 1
    assert sum({(B, H)} <= shapes <= {(), (B, H), (B, n, H)} for shapes in carried) >= 3


def test_the_reader_of_jaxprs_sees_what_autodiff_of_a_plain_scan_carries():
    def plain(params, x, h0):
        step = lambda h, x_t: (gru_jax.gru_cell(params, h, x_t),) * 2  # noqa: E731
        return jnp.sum(lax.scan(step, h0, jnp.moveaxis(x, 1, 0))[1])

    assert (3 * H, H) in carried_shapes(jax.grad(plain), *problem())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lowers_for_tpu_and_cuda(options):
    arguments = problem(dtype="float32")
    value_and_grad = jax.value_and_grad(partial(loss, **options), argnums=(0, 1, 2))
    lowered = jax.jit(value_and_grad).trace(*arguments).lower(lowering_platforms=("tpu", "cuda"))
    assert "stablehlo.while" in lowered.as_text()


def test_the_second_eager_call_compiles_nothing():
    params, x, h0 = problem()
    calls = [
        partial(gru_jax.gru, params, x, h0, lengths=np.array([6, 0, 3, 1]), output_mode="last"),
        lambda: jax.grad(loss)(params, x, h0, reverse=True),
        lambda: gru_jax.gru_cell(params, h0, x[:, 0]),
        lambda: gru_jax.gru(params.replace(bias=params.bias + 1.0), x),
    ]
    compiled = []
    for call in calls:
        jax.block_until_ready(call())
    count = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for call in calls:
            jax.block_until_ready(call())
        assert not [event for event in compiled if "compile" in event]
        jax.block_until_ready(gru_jax.gru(params, x[:, : T - 1]))  # and the counter counts
        assert [event for event in compiled if "compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_one_trace_serves_other_values_of_every_array():
    params, x, h0 = problem()
    traced = chex.assert_max_traces(gru_jax.gru, n=1)
    run = jax.jit(traced)
    for lengths in ([6, 6, 6, 6], [1, 2, 3, 0]):
        scaled = jax.tree.map(lambda a: 2.0 * a, params)
        out = run(scaled, x + 1.0, h0, lengths=jnp.array(lengths))
        chex.assert_tree_all_finite(out)


def test_vmap_over_parameters_equals_a_loop_over_them():
    params, x, h0 = problem("before-multiplication")
    stack = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, -a]), params)
    mapped = jax.vmap(jax.value_and_grad(loss), (0, None, None))(stack, x, h0)
    each = [
        jax.value_and_grad(loss)(jax.tree.map(lambda a, i=i: a[i], stack), x, h0) for i in range(3)
    ]
    assert_close(leaves(mapped), leaves(jax.tree.map(lambda *a: jnp.stack(a), *each)), 1e-13)


@pytest.mark.parametrize("options", [{}, {"lengths": np.array([6, 2, 3, 1])}, {"checkpoint": 2},
                                     {"output_mode": "last", "reverse": True}])  # fmt: skip
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_data_parallel_over_a_mesh(axis_type, options):
    params, x, h0 = problem()
    grad = jax.jit(jax.value_and_grad(partial(loss, **options), argnums=(0, 1)))
    expected = grad(params, x, h0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("data"))
        everywhere = jax.NamedSharding(mesh, jax.P())
        x, h0 = jax.device_put((x, h0), rows)
        actual = grad(jax.device_put(params, everywhere), x, h0)
        without_state = gru_jax.gru(params, x, **options)[1]
    assert_close(leaves(actual), leaves(expected), 1e-12)
    assert without_state.sharding.spec[0] == "data"


def test_shard_map_with_and_without_an_initial_state():
    params, x, h0 = problem()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.P("data")
    mapped = partial(jax.shard_map, mesh=mesh, out_specs=rows)
    run = mapped(lambda p, x, h: gru_jax.gru(p, x, h), in_specs=(jax.P(), rows, rows))
    zero = mapped(lambda p, x: gru_jax.gru(p, x, checkpoint=2), in_specs=(jax.P(), rows))
    assert_close(leaves(jax.jit(run)(params, x, h0)), leaves(gru_jax.gru(params, x, h0)), 1e-13)
    assert_close(leaves(jax.jit(zero)(params, x)), leaves(gru_jax.gru(params, x)), 1e-13)

    def summed(params, x):
        return lax.psum(jnp.sum(gru_jax.gru(params, x)[0] ** 2), "data")

    grad = jax.shard_map(jax.grad(summed), mesh=mesh, in_specs=(jax.P(), rows), out_specs=jax.P())
    plain = jax.grad(lambda p, x: jnp.sum(gru_jax.gru(p, x)[0] ** 2))
    assert_close(leaves(jax.jit(grad)(params, x)), leaves(plain(params, x)), 1e-12)


def test_derivatives_of_vmap_over_an_axis_of_an_explicit_mesh():
    params, x, _ = problem()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    one = lambda p, x: jnp.sum(gru_jax.gru(p, x)[0] ** 2)  # noqa: E731
    every = jax.vmap(one, in_axes=(None, 0))
    whole = jax.grad(lambda p, x: jnp.sum(every(p, x)), (0, 1))
    each = jax.vmap(jax.grad(one), in_axes=(None, 0))
    along = lambda p, x: jax.jvp(every, (p, x), (p, x))  # noqa: E731
    expected = [f(params, x) for f in (whole, each, along)]
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        actual = [jax.jit(f)(params, x) for f in (whole, each, along)]
    assert_close(leaves(actual), leaves(expected), 1e-12)


@pytest.mark.parametrize("options", [{}, {"checkpoint": 4}, {"implementation": "parallel"}])
def test_shard_map_where_resets_alone_vary(options):
    params, x, _ = problem()
    resets = jnp.arange(2 * B * T).reshape(2 * B, T) % 4 == 1
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def run(params, x, resets):
        return gru_jax.gru(params, x, resets=resets, **options)[0]

    rows = jax.P("data")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(jax.P(), jax.P(), rows), out_specs=rows)
    plain = lambda p, x, r: jnp.concatenate([run(p, x, r[:B]), run(p, x, r[B:])])  # noqa: E731
    results = []
    for f in (mapped, plain):
        y, back = jax.vjp(lambda p, x, f=f: f(p, x, resets), params, x)
        results.append(leaves((y, back(jnp.sin(y)))))
    assert_close(*results, 1e-12)


def test_derivatives_of_no_sequences_at_all():
    params, _, _ = problem()
    x, mask = jnp.zeros((0, T, B, INPUTS)), jnp.ones((0, T, B), bool)
    run = lambda p, x, m: gru_jax.gru(p, x, mask=m, checkpoint=4)[0]  # noqa: E731
    run = jax.vmap(run, in_axes=(None, 2, 2), out_axes=2)
    y, dy = jax.jvp(lambda p, x: run(p, x, mask), (params, x), (params, x))
    assert y.shape == dy.shape == (0, T, B, H)
    gradient = jax.grad(lambda p: jnp.sum(run(p, x, mask)))(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("options", [{}, {"output_mode": "last"}, {"checkpoint": 1}], ids=str)
def test_export_with_symbolic_batch_and_time(options):
    params, x, _ = problem(dtype="float32")
    b, t = export.symbolic_shape("b, t")
    shapes = (
        jax.ShapeDtypeStruct((b, t, INPUTS), jnp.float32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    run = jax.jit(lambda x, lengths: gru_jax.gru(params, x, lengths=lengths, **options))
    exported = export.export(run, platforms=("cpu", "cuda", "tpu"))(*shapes)
    again = export.deserialize(exported.serialize(vjp_order=1))
    lengths = jnp.array([6, 0, 3, 1], jnp.int32)
    assert_close(leaves(again.call(x, lengths)), leaves(run(x, lengths)), 1e-6)
    assert_close(
        leaves(again.call(x[:2, :3], lengths[1:3])), leaves(run(x[:2, :3], lengths[1:3])), 1e-6
    )
    squares = lambda f: jax.grad(lambda x: jnp.sum(f(x, lengths)[1] ** 2))(x)  # noqa: E731
    assert_close({0: squares(again.call)}, {0: squares(run)}, 1e-6)


@pytest.mark.parametrize("options", [{"checkpoint": 2}, {"checkpoint": "sqrt"}, {"unroll": 2}])
def test_symbolic_time_refuses_what_needs_a_number_of_steps(options):
    params, _, _ = problem(dtype="float32")
    (t,) = export.symbolic_shape("t")
    with pytest.raises(ValueError, match="time axis is symbolic"):
        export.export(jax.jit(lambda x: gru_jax.gru(params, x, **options)))(
            jax.ShapeDtypeStruct((2, t, INPUTS), jnp.float32)
        )


@pytest.mark.parametrize("mode", RESET_MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_the_state_and_the_sums_in_float32(mode, dtype):
    params, x, h0 = problem(mode, "float32")
    rounded = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    y, hidden = gru_jax.gru(*rounded, h0)
    wide = jax.tree.map(lambda a: a.astype("float32"), rounded)
    expected, expected_hidden = gru_jax.gru(*wide, h0)
    assert (y.dtype, hidden.dtype) == (jnp.dtype(dtype), jnp.float32)
    np.testing.assert_array_equal(y, expected.astype(dtype))
    np.testing.assert_array_equal(hidden, expected_hidden)
    grads = jax.grad(lambda p, x: jnp.sum(gru_jax.gru(p, x)[1]), (0, 1))(*rounded)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_arguments_of_mixed_dtypes():
    params, x, h0 = problem()
    mixed = params.replace(bias=params.bias.astype("float32"))
    y, hidden = gru_jax.gru(mixed, x.astype("bfloat16"), h0.astype("float16"))
    assert (y.dtype, hidden.dtype) == (jnp.float64, jnp.float64)
    wide = jax.tree.map(lambda a: a.astype("float64"), mixed)
    expected = gru_jax.gru(
        wide, x.astype("bfloat16").astype("float64"), h0.astype("float16").astype("float64")
    )
    assert_close(leaves((y, hidden)), leaves(expected), 0.0)


@pytest.mark.parametrize("mode", RESET_MODES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_empty_time_and_empty_batch(mode, options):
    params, x, h0 = problem(mode)
    options = {k: v[:, :0] if k == "resets" else v * 0 if k == "lengths" else v
               for k, v in options.items()}  # fmt: skip
    y, hidden = gru_jax.gru(params, x[:, :0], h0, **options)
    np.testing.assert_array_equal(hidden, h0)
    assert y.shape == ((B, H) if "output_mode" in options else (B, 0, H))
    none = {k: v[:0] if hasattr(v, "shape") else v for k, v in options.items()}
    if "resets" in none:
        none["resets"] = np.zeros((0, T), bool)
    y, hidden = gru_jax.gru(params, x[:0], h0[:0], **none)
    assert hidden.shape == (0, H)
    assert y.shape == ((0, H) if "output_mode" in options else (0, T, H))
    grad = jax.grad(partial(loss, **none))(params, x[:0], h0[:0])
    chex.assert_trees_all_equal(grad, jax.tree.map(jnp.zeros_like, params))


def test_last_keeps_no_sequence():
    params, x, h0 = problem()
    for mode, written in (("sequence", True), ("last", False)):
        run = lambda x, mode=mode: gru_jax.gru(params, x, h0, output_mode=mode)[0]  # noqa: E731
        programs = list(loops(run, x))
        assert len(programs) == 2  # for CUDA, and for every other platform
        for carried, emitted in programs:
            assert set(emitted) <= ({(B, T, H)} if written else set())
            assert set(carried) - {()} <= {(B, H)} | ({(B, T, H)} if written else set())


def test_checkpointing_keeps_less_for_the_backward_pass():
    params = gru_jax.init_params(jax.random.key(0), 32, 16)
    x = jnp.ones((8, 64, 16), jnp.float32)

    def kept(checkpoint):
        run = lambda p, x: gru_jax.gru(p, x, checkpoint=checkpoint)[0]  # noqa: E731
        _, pullback = jax.eval_shape(partial(jax.vjp, run), params, x)
        return gru_jax.num_learnables(pullback)

    everything, states, segments = kept(None), kept(1), kept("sqrt")
    sequence = 8 * 64 * 32
    assert states < everything / 2
    assert segments < states
    assert segments < sequence + gru_jax.num_learnables((params, x)) + 8 * 8 * 32
