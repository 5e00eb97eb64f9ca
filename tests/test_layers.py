"""One battery over core, linen and nnx: three layers, three modes, every property."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_params, random_params
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from reference import MODES

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax._params import LEAVES

H, I, P_O, P_I = 5, 3, 4, 2  # noqa: E741
B, T = 2, 6
FACES = ("linen", "nnx")
ARGUMENTS = {
    "GRULayer": (H,),
    "GRUProjectedLayer": (H, P_O, P_I),
    "BidirectionalGRULayer": (H,),
}
KINDS = tuple(ARGUMENTS)
LENGTHS = np.array([T, 3])
HIDDEN = (0.5, -0.25, 0.125, 1.0, -2.0)


def inputs(seed=1, dtype="float32", shape=(B, T, I)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def own_params(kind, mode=MODES[0], dtype="float32"):
    """Parameters of the core; a pair of them for a bidirectional layer."""
    rng = np.random.default_rng(0)
    sizes = (P_I, P_O) if kind == "GRUProjectedLayer" else ()
    one, two = (as_params(random_params(rng, H, I, mode, *sizes, dtype=dtype), mode) for _ in "ab")
    return (one, two) if kind == "BidirectionalGRULayer" else one


class Linen:
    """A linen layer with its variables, called as a layer of nnx is."""

    def __init__(self, kind, params, **options):
        self.layer = getattr(gru_jax.linen, kind)(*ARGUMENTS[kind], **options)
        pair = dict(zip(("forward", "backward"), params, strict=True)) if _paired(params) else None
        leaves = {k: p.arrays() for k, p in pair.items()} if pair else params.arrays()
        self.variables = {"params": leaves}

    def __call__(self, x, *args, **options):
        y, updated = self.layer.apply(self.variables, x, *args, mutable=["state"], **options)
        self.variables = {**self.variables, **updated}
        return y

    def reset_state(self):
        self.variables = gru_jax.linen.reset_state(self.variables)


class NNX:
    """A layer of nnx with the same arrays."""

    def __init__(self, kind, params, **options):
        cls = getattr(gru_jax.nnx, kind)
        options = {"param_dtype": jax.tree.leaves(params)[0].dtype} | options
        if not _paired(params):
            self.layer = cls(*ARGUMENTS[kind], **params.arrays(), **options)
            return
        self.layer = cls(*ARGUMENTS[kind], input_size=I, rngs=nnx.Rngs(0), **options)
        for layer, one in zip((self.layer.forward, self.layer.backward), params, strict=True):
            for name, value in one.arrays().items():
                setattr(layer, name, value)

    def __call__(self, x, *args, **options):
        return self.layer(x, *args, **options)

    def reset_state(self):
        self.layer.reset_state()


@pytest.fixture(autouse=True)
def _count_traces_anew():
    chex.clear_trace_counter()


def _paired(params):
    return isinstance(params, tuple)


def build(face, kind="GRULayer", params=None, **options):
    params = (
        own_params(kind, options.get("reset_gate_mode", MODES[0])) if params is None else params
    )
    return (Linen if face == "linen" else NNX)(kind, params, **options)


def core(params, x, h0=None, **options):
    """(y, hidden) of the functional core, both directions joined where there are two."""
    if not _paired(params):
        return gru_jax.gru(params, x, h0, **options)
    h0 = (None, None) if h0 is None else h0
    first, h1 = gru_jax.gru(params[0], x, h0[0], **options)
    second, h2 = gru_jax.gru(params[1], x, h0[1], reverse=True, **options)
    return jnp.concatenate([first, second], axis=-1), (h1, h2)


def assert_same(actual, expected):
    """Bitwise equality, dtypes and structure included."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


# The faces give the core's numbers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("face", FACES)
def test_faces_are_bitwise_the_core(face, kind, mode):
    params, x = own_params(kind, mode), inputs()
    width = H * (2 if _paired(params) else 1)
    flags = np.random.default_rng(3).random((B, T)) < 0.5
    states = tuple(inputs(seed, shape=(B, H)) for seed in (5, 6))
    h0 = states if _paired(params) else states[0]

    y = build(face, kind, params, reset_gate_mode=mode)(x)
    assert y.shape == (B, T, width)
    assert_same(y, core(params, x)[0])

    ports = {"has_state_inputs": True, "has_state_outputs": True}
    layer = build(face, kind, params, reset_gate_mode=mode, output_mode="last", **ports)
    y, hidden = layer(x, h0, lengths=LENGTHS)
    assert y.shape == (B, width)
    assert_same((y, hidden), core(params, x, h0, lengths=LENGTHS, output_mode="last"))
    assert_same(y, jnp.concatenate(hidden, axis=-1) if _paired(params) else hidden)

    layer = build(face, kind, params, reset_gate_mode=mode, **ports)
    resets = np.arange(T) % 2 == np.arange(B)[:, None]
    assert (flags & resets).any()
    got = layer(x, h0, mask=flags, resets=resets)
    assert_same(got, core(params, x, h0, mask=flags, resets=resets))


@pytest.mark.parametrize("face", FACES)
def test_options_of_the_loop_reach_the_core(face):
    params, x = own_params("GRULayer"), inputs()
    for options in ({"reverse": True}, {"unroll": 3}, {"checkpoint": 2}, {"precision": "highest"}):
        assert_same(build(face, **options)(x), gru_jax.gru(params, x, **options)[0])
    for options, word in (
        ({"unroll": 3}, "unroll=3"),
        ({"checkpoint": 2}, "checkpoint["),
        ({"precision": "highest"}, "HIGHEST"),
    ):  # what changes no number shows in the program
        program = str(jax.make_jaxpr(lambda x, o=options: build(face, **o)(x))(x))
        assert word in program.replace("remat2[", "checkpoint[")
        assert word not in str(jax.make_jaxpr(lambda x: build(face)(x))(x))
    functions = {
        "state_activation_function": "softsign",
        "gate_activation_function": "hard-sigmoid",
    }
    y = build(face, **functions)(x)
    assert_same(y, gru_jax.gru(params.replace(**functions), x)[0])
    assert np.abs(y - gru_jax.gru(params, x)[0]).max() > 1e-3


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("shape", [(T, I), (2, 3, T, I)])
def test_any_number_of_batch_axes(face, shape):
    x = inputs(shape=shape)
    y = build(face)(x)
    assert y.shape == (*shape[:-1], H)
    assert_same(y, gru_jax.gru(own_params("GRULayer"), x)[0])


@pytest.mark.parametrize("face", FACES)
def test_the_gradients_of_the_faces_are_the_core_s(face):
    params, x = own_params("GRUProjectedLayer"), inputs()
    want = jax.jit(jax.grad(lambda p: (gru_jax.gru(p, x)[0] ** 2).sum()))(params).arrays()
    model = build(face, "GRUProjectedLayer", params)
    if face == "linen":
        loss = jax.jit(jax.grad(lambda v: (model.layer.apply({"params": v}, x) ** 2).sum()))
        got = loss(params.arrays())
    else:
        grads = nnx.jit(nnx.grad(lambda m: (m(x) ** 2).sum()))(model.layer)
        got = {name: grads[name][...] for name in want}
    assert_same(got, want)


# dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("face", FACES)
def test_dtypes_promote_and_the_state_is_wide(face, kind):
    for x_type, p_type, y_type, h_type in (
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("float64", "float32", "float64", "float64"),
        ("bfloat16", "float32", "float32", "float32"),
    ):
        params, x = own_params(kind, dtype=p_type), inputs(dtype=x_type)
        model = build(face, kind, params, has_state_outputs=True)
        y, hidden = model(x)
        assert y.dtype == y_type
        assert {h.dtype for h in jax.tree.leaves(hidden)} == {jnp.dtype(h_type)}
        assert_same((y, hidden), core(params, x))


@pytest.mark.parametrize("face", FACES)
def test_dtype_option_casts_arguments_and_learnables(face):
    params = own_params("GRULayer")
    model = build(face, dtype="bfloat16", has_state_outputs=True)
    y, hidden = model(inputs(dtype="float64"))
    assert (y.dtype, hidden.dtype) == (jnp.bfloat16, jnp.float32)
    narrow = jax.tree.map(lambda a: a.astype("bfloat16"), params)
    assert_same((y, hidden), gru_jax.gru(narrow, inputs(dtype="float64").astype("bfloat16")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_param_dtype_makes_the_learnables(kind, dtype):
    args, x = ARGUMENTS[kind], inputs(dtype=dtype)
    variables = getattr(gru_jax.linen, kind)(*args, param_dtype=dtype).init(jax.random.key(0), x)
    layer = getattr(gru_jax.nnx, kind)(*args, input_size=I, param_dtype=dtype, rngs=nnx.Rngs(0))
    for tree in (variables["params"], nnx.state(layer, nnx.Param)):
        leaves = jax.tree.leaves(tree)
        assert len(leaves) == {"GRULayer": 3, "GRUProjectedLayer": 5}.get(kind, 6)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert layer(x).dtype == dtype


# State


@pytest.mark.parametrize("face", FACES)
def test_vectors_may_be_the_rows_and_columns_of_the_pages(face):
    column, row = np.array(HIDDEN).reshape(-1, 1), jnp.array([[1.0, 2.0, 3.0]])
    layer = build(face, hidden_state=column, bias_l2_factor=row).layer
    assert (layer.hidden_state, layer.bias_l2_factor) == (HIDDEN, (1.0, 2.0, 3.0))


@pytest.mark.parametrize("face", FACES)
def test_hidden_state_is_where_every_call_starts(face):
    params, x = own_params("GRULayer"), inputs()
    want = gru_jax.gru(params, x, jnp.asarray(HIDDEN, "float32"))[0]
    model = build(face, hidden_state=np.array(HIDDEN))
    assert model.layer.hidden_state == HIDDEN
    assert_same(model(x), want)
    assert_same(model(x), want)
    assert build(face, hidden_state=[]).layer.hidden_state is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("face", FACES)
def test_stateful_calls_go_on_where_the_last_one_ended(face, kind):
    params, x = own_params(kind), inputs()
    model = build(face, kind, params, stateful=True, hidden_state=HIDDEN, has_state_outputs=True)
    h0 = jnp.broadcast_to(jnp.asarray(HIDDEN, "float32"), (B, H))
    h0 = (h0, h0) if _paired(params) else h0
    want = core(params, x, h0)
    assert_same(model(x), want)
    assert_same(model(x), core(params, x, want[1]))
    with pytest.raises(ValueError, match=r"stored state has shape \(2, 5\).*\(3, 5\).*reset_state"):
        model(inputs(shape=(3, T, I)))
    model.reset_state()
    assert_same(model(x), want)
    model.reset_state()
    assert jax.tree.leaves(model(inputs(shape=(3, T, I)))[1])[0].shape == (3, H)


@pytest.mark.parametrize("face", FACES)
def test_stateful_chunks_equal_one_run(face):
    params, x = own_params("GRULayer", dtype="bfloat16"), inputs(dtype="bfloat16")
    model = build(face, params=params, stateful=True)
    parts = [model(x[:, :2]), model(x[:, 2:3]), model(x[:, 3:])]
    whole = gru_jax.gru(params, x)[0]
    assert_same(jnp.concatenate(parts, axis=1), whole)


def test_linen_state_lives_in_its_collection():
    layer, x = gru_jax.linen.GRULayer(H, stateful=True, hidden_state=HIDDEN), inputs()
    variables = layer.init(jax.random.key(0), x)
    assert set(variables) == {"params"}
    first, state = layer.apply(variables, x, mutable=["state"])
    assert jax.tree.map(jnp.shape, state) == {"state": {"hidden_state": (B, H)}}
    assert_same(layer.apply(variables, x), first)  # an immutable state is read and not written
    both = {**variables, **state}
    assert np.abs(layer.apply(both, x) - first).max() > 1e-3
    assert_same(layer.apply(both, x), layer.apply(both, x))
    other = {"counter": jnp.zeros(())}
    back = gru_jax.linen.reset_state({**both, "state": {"rnn": state["state"], "other": other}})
    assert back == {**variables, "state": {"other": other}}
    assert "state" in both  # the argument is as it was


def test_nnx_state_is_a_variable_that_can_be_set():
    params, x = own_params("GRULayer"), inputs()
    layer = NNX("GRULayer", params, stateful=True, hidden_state=HIDDEN).layer
    assert isinstance(layer.state, gru_jax.nnx.HiddenState)
    assert_same(layer.state[...], jnp.asarray(HIDDEN, "float32"))
    first = layer(x)
    assert layer.state[...].shape == (B, H)
    layer.reset_state((B,))
    assert_same(layer.state[...], jnp.broadcast_to(jnp.asarray(HIDDEN, "float32"), (B, H)))
    assert_same(layer(x), first)
    layer.hidden_state = np.ones(H)
    assert layer.hidden_state == (1.0,) * H
    assert_same(layer(x), gru_jax.gru(params, x, jnp.ones(H, "float32"))[0])
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 3
    plain = NNX("GRULayer", params).layer
    plain.hidden_state = HIDDEN
    assert_same(plain(x), first)
    assert not jax.tree.leaves(nnx.state(plain, gru_jax.nnx.HiddenState))
    with pytest.raises(ValueError, match="stateful=True"):
        plain.reset_state()


def test_nnx_bidirectional_passes_on_what_is_set():
    params, x = own_params("BidirectionalGRULayer"), inputs()
    h0 = jnp.broadcast_to(jnp.asarray(HIDDEN, "float32"), (B, H))
    layer = NNX("BidirectionalGRULayer", params, stateful=True).layer
    layer.hidden_state = HIDDEN
    want = core(params, x, (h0, h0))[0]
    assert_same(layer(x), want)
    layer.reset_state((B,))
    assert layer.forward.state[...].shape == layer.backward.state[...].shape == (B, H)
    assert_same(layer(x), want)


# Bidirectional


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("output_mode", ["sequence", "last"])
def test_merge_modes_against_two_core_calls(face, output_mode):
    params, x = own_params("BidirectionalGRULayer"), inputs()
    options = {"output_mode": output_mode, "lengths": LENGTHS}
    f, hf = gru_jax.gru(params[0], x, **options)
    b, hb = gru_jax.gru(params[1], x, reverse=True, **options)
    merged = {
        "concat": jnp.concatenate([f, b], axis=-1),
        "sum": f + b,
        "mul": f * b,
        "ave": (f + b) / 2,
    }
    for merge, want in merged.items():
        model = build(
            face, "BidirectionalGRULayer", merge=merge, output_mode=output_mode,
            has_state_outputs=True,
        )  # fmt: skip
        y, hidden = model(x, lengths=LENGTHS)
        assert_same((y, hidden), (want, (hf, hb)))
    assert model.layer.merge == "ave"
    assert float(jnp.abs(f - b).max()) > 1e-3


@pytest.mark.parametrize("face", FACES)
def test_merging_follows_the_data_format(face):
    x = inputs()
    for output_mode, axes in (("sequence", (2, 0, 1)), ("last", (1, 0))):
        kind = "BidirectionalGRULayer"
        want = build(face, kind, output_mode=output_mode)(x)
        model = build(face, kind, output_mode=output_mode, data_format="CBT")
        assert_same(model(x.transpose(2, 0, 1)), want.transpose(axes))


@pytest.mark.parametrize("face", FACES)
def test_reverse_exchanges_the_directions(face):
    one, two = own_params("BidirectionalGRULayer")
    x, kind = inputs(), "BidirectionalGRULayer"
    y = build(face, kind, (one, two), reverse=True)(x)
    want = gru_jax.gru(one, x, reverse=True)[0], gru_jax.gru(two, x)[0]
    assert_same(y, jnp.concatenate(want, axis=-1))


# Cells in the hosts' own loops


def cells(mode):
    params = own_params("GRULayer", mode)
    cell = gru_jax.nnx.GRUCell(H, **params.arrays(), reset_gate_mode=mode)
    return params, gru_jax.linen.GRUCell(H, reset_gate_mode=mode), cell


@pytest.mark.parametrize("mode", MODES)
def test_cells_run_in_the_stock_loops(mode):
    params, linen_cell, nnx_cell = cells(mode)
    x = inputs()
    want, hidden = gru_jax.gru(params, x)
    got = nn.RNN(linen_cell, return_carry=True).apply({"params": {"cell": params.arrays()}}, x)
    chex.assert_trees_all_close(got, (hidden, want), atol=1e-6)
    got = nnx.RNN(nnx_cell, return_carry=True, rngs=nnx.Rngs(0))(x)
    chex.assert_trees_all_close(got, (hidden, want), atol=1e-6)

    h = inputs(4, shape=(B, H))
    step = gru_jax.gru_cell(params, h, x[:, 0])
    assert_same(linen_cell.apply({"params": params.arrays()}, h, x[:, 0]), (step, step))
    assert_same(nnx_cell(h, x[:, 0]), (step, step))


def test_cells_run_in_the_stock_bidirectionals():
    x, (one, two) = inputs(), own_params("BidirectionalGRULayer")
    want = core((one, two), x, lengths=LENGTHS)[0]
    counts = (np.arange(T) < LENGTHS[:, None])[..., None]  # the hosts do not clear the padding
    both = nn.Bidirectional(nn.RNN(gru_jax.linen.GRUCell(H)), nn.RNN(gru_jax.linen.GRUCell(H)))
    variables = {
        "params": {
            "forward_rnn": {"cell": one.arrays()},
            "backward_rnn": {"cell": two.arrays()},
        }
    }
    made = both.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
    got = both.apply(variables, x, seq_lengths=jnp.asarray(LENGTHS))
    np.testing.assert_allclose(np.where(counts, got, 0), want, atol=1e-6)

    rnns = [
        nnx.RNN(gru_jax.nnx.GRUCell(H, **params.arrays()), rngs=nnx.Rngs(0))
        for params in (one, two)
    ]
    got = nnx.Bidirectional(*rnns, rngs=nnx.Rngs(0))(x, seq_lengths=jnp.asarray(LENGTHS))
    np.testing.assert_allclose(np.where(counts, got, 0), want, atol=1e-6)


@pytest.mark.parametrize("face", FACES)
def test_the_carry_of_a_cell_keeps_its_dtype(face):
    narrow = own_params("GRULayer", dtype="bfloat16")
    if face == "linen":
        cell = gru_jax.linen.GRUCell(H, param_dtype="bfloat16")
        carry = cell.initialize_carry(jax.random.key(0), (B, I))

        def call(carry, x):
            return cell.apply({"params": narrow.arrays()}, carry, x)
    else:
        call = gru_jax.nnx.GRUCell(H, **narrow.arrays(), param_dtype="bfloat16")
        carry = call.initialize_carry((B, I))
        drawn = call.initialize_carry((B, I), nnx.Rngs(0), jax.nn.initializers.normal())
        assert drawn.shape == (B, H)
        assert float(jnp.abs(drawn).max()) > 0
    assert_same(carry, jnp.zeros((B, H), "float32"))
    x = inputs(dtype="bfloat16", shape=(B, I))
    for dtype in ("float32", "bfloat16", "float64"):
        new, out = call(carry.astype(dtype), x)
        assert (new.dtype, out.dtype) == (jnp.dtype(dtype), jnp.bfloat16)
        want = gru_jax.gru_cell(narrow, carry.astype(dtype), x)
        assert_same((new, out), (want, want.astype("bfloat16")))
    assert call(carry, x.astype("float32"))[1].dtype == jnp.float32


# nnx


@pytest.mark.parametrize("kind", KINDS)
def test_nnx_under_its_transformations(kind):
    params, x = own_params(kind), inputs()
    want, hidden = core(params, x)

    @nnx.jit
    @chex.assert_max_traces(n=2)  # the second state has another shape
    def run(layer, x):
        return layer(x)

    layer = NNX(kind, params, stateful=True).layer
    assert_same(run(layer, x), want)
    again = core(params, x, hidden)[0]
    assert_same(run(layer, x), again)
    run(layer, x)

    graph, learnables, rest = nnx.split(NNX(kind, params).layer, nnx.Param, ...)
    assert len(jax.tree.leaves(rest)) == 0
    doubled = nnx.merge(graph, jax.tree.map(lambda a: 2 * a, learnables), rest)
    double = jax.tree.map(lambda a: 2 * a, params)
    assert_same(doubled(x), core(double, x)[0])
    assert_same(jax.jit(lambda s: nnx.merge(graph, s, rest)(x))(learnables), want)

    copy = nnx.clone(layer)
    assert_same(nnx.state(copy), nnx.state(layer))
    nnx.update(copy, jax.tree.map(jnp.zeros_like, nnx.state(copy, nnx.Param)))
    assert float(jnp.abs(jax.tree.leaves(nnx.state(layer, nnx.Param))[0]).max()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_nnx_without_graph_mode(kind):
    params, x = own_params(kind), inputs()
    with nnx.set_graph_mode(False):
        layer = NNX(kind, params, stateful=True).layer
        assert_same(nnx.jit(lambda m, x: m(x))(layer, x), core(params, x)[0])
        grads = nnx.grad(lambda m: m(x).sum())(nnx.clone(layer))
        assert len(jax.tree.leaves(nnx.state(grads, nnx.Param))) == len(jax.tree.leaves(params))


def test_nnx_learnables_can_be_assigned():
    layer, x = gru_jax.nnx.GRULayer(H, input_size=I, rngs=nnx.Rngs(0)), inputs()
    params = own_params("GRULayer")
    kept = layer.input_weights
    for name, value in params.arrays().items():
        setattr(layer, name, np.asarray(value))
    assert layer.input_weights is kept
    assert isinstance(layer.bias, nnx.Param)
    assert_same(layer(x), gru_jax.gru(params, x)[0])
    with pytest.raises(ValueError, match=r"input_weights must have shape \(15, 3\), got \(15, 4\)"):
        layer.input_weights = np.zeros((3 * H, I + 1))
    with pytest.raises(TypeError, match="bias must be of a floating-point type, got int64"):
        layer.bias = np.zeros(3 * H, int)


# linen


def test_linen_inside_transformations():
    x, key = inputs(), jax.random.key(0)
    layer = gru_jax.linen.GRULayer(H)
    variables = layer.init(key, x)
    want = layer.apply(variables, x)

    assert_same(nn.remat(gru_jax.linen.GRULayer)(H).apply(variables, x), want)

    each = nn.vmap(
        gru_jax.linen.GRULayer, variable_axes={"params": 0}, split_rngs={"params": True}
    )(H)
    xs = jnp.stack([x, x])
    made = each.init(key, xs)
    assert made["params"]["input_weights"].shape == (2, 3 * H, I)
    ys = each.apply(made, xs)
    second = jax.tree.map(lambda a: a[1], made)
    np.testing.assert_allclose(ys[1], layer.apply(second, x), atol=1e-6)
    assert float(jnp.abs(ys[0] - ys[1]).max()) > 1e-3

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return gru_jax.linen.GRULayer(I, name="gru")(x), None

    deep = nn.scan(Stack, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    made = deep.init(key, x, None)
    y = x
    for i in range(3):
        leaves = jax.tree.map(lambda a, i=i: a[i], made["params"]["gru"])
        y = gru_jax.linen.GRULayer(I).apply({"params": leaves}, y)
    np.testing.assert_allclose(deep.apply(made, x, None)[0], y, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "GRUCell"])
def test_linen_layers_are_values(kind):
    cls, args = getattr(gru_jax.linen, kind), ARGUMENTS.get(kind, (H,))
    given = {"hidden_state": HIDDEN} if kind != "GRUCell" else {}
    given |= {"input_weights_metadata": {"out_sharding": ("hidden", None)}}
    given |= {"bias_l2_factor": [1, 2, 1], "bias_initializer": jax.nn.initializers.normal()}
    one, two = cls(*args, **given), cls(*args, **given)
    assert one == two
    assert hash(one) == hash(two)
    assert one != cls(*args, **given, reset_gate_mode=MODES[1])
    assert one.clone(name="other").bias_l2_factor == (1.0, 2.0, 1.0)
    assert one.clone() == one


def test_linen_layer_as_a_static_argument():
    x, params = inputs(), own_params("GRULayer")

    @chex.assert_max_traces(n=1)
    def run(layer, variables, x):
        return layer.apply(variables, x)

    run = jax.jit(run, static_argnums=0)
    variables = {"params": params.arrays()}
    for _ in range(2):  # equal layers share the program
        layer = gru_jax.linen.GRULayer(H, input_weights=np.array(params.input_weights))
        assert_same(run(layer, variables, x), gru_jax.gru(params, x)[0])


def test_linen_is_projected_by_its_parameters_alone():
    layer, x = gru_jax.linen.GRULayer(H), inputs()
    projected = own_params("GRUProjectedLayer")
    y = layer.apply({"params": projected.arrays()}, x)
    assert_same(y, gru_jax.gru(projected, x)[0])
    one_side = projected.replace(
        output_projector=None, recurrent_weights=own_params("GRULayer").recurrent_weights
    )
    assert_same(layer.apply({"params": one_side.arrays()}, x), gru_jax.gru(one_side, x)[0])
    dense, other = own_params("GRULayer"), gru_jax.linen.GRUProjectedLayer(H, P_O, P_I)
    assert_same(other.apply({"params": dense.arrays()}, x), gru_jax.gru(dense, x)[0])
    text = str(layer.bind({"params": projected.arrays()}))
    assert f"InputProjectorSize: {P_I}\n" in text
    assert f"OutputProjector: [{H}×{P_O} float32]" in text


# Given arrays


@pytest.mark.parametrize("kind", ["GRULayer", "GRUProjectedLayer", "GRUCell"])
def test_given_arrays_are_the_initial_values(kind):
    projected = kind == "GRUProjectedLayer"
    params = own_params("GRUProjectedLayer" if projected else "GRULayer")
    args, given = ARGUMENTS.get(kind, (H,)), {k: np.asarray(v) for k, v in params.arrays().items()}
    x = (jnp.zeros((B, H), "float32"), inputs()[:, 0]) if kind == "GRUCell" else (inputs(),)
    layer = getattr(gru_jax.linen, kind)(*args, **given)
    assert layer.input_size == I
    assert_same(layer.init(jax.random.key(0), *x)["params"], params.arrays())
    other = getattr(gru_jax.nnx, kind)(*args, **given)  # no rngs: nothing is drawn
    assert other.input_size == I
    assert_same(dict(nnx.to_pure_dict(nnx.state(other))), params.arrays())
    for field in dataclasses.fields(layer):
        assert not isinstance(getattr(layer, field.name), np.ndarray | jax.Array)
    for name in given:
        assert getattr(layer, name) is None
    again = getattr(gru_jax.linen, kind)(*args, **given)
    assert layer == again
    assert hash(layer) == hash(again)
    assert layer.clone() == layer
    changed = {**given, "bias": given["bias"] + 1}
    assert layer != getattr(gru_jax.linen, kind)(*args, **changed)


def test_given_arrays_take_param_dtype_and_serve_init_only():
    x, weights = inputs(), np.full((3 * H, I), 0.5)
    layer = gru_jax.linen.GRULayer(H, input_weights=weights)
    variables = layer.init(jax.random.key(0), x)
    assert_same(variables["params"]["input_weights"], jnp.full((3 * H, I), 0.5, "float32"))
    params = own_params("GRULayer")  # other values count as soon as there are some
    assert_same(layer.apply({"params": params.arrays()}, x), gru_jax.gru(params, x)[0])
    weights[:] = 7.0
    assert float(layer.init(jax.random.key(0), x)["params"]["input_weights"].max()) == 0.5
    other = gru_jax.nnx.GRULayer(H, input_weights=weights, rngs=nnx.Rngs(0), param_dtype="bfloat16")
    assert other.input_weights[...].dtype == other.bias[...].dtype == jnp.bfloat16


@pytest.mark.parametrize("face", FACES)
def test_layers_with_given_arrays_can_be_made_inside_jit(face):
    x, params = inputs(), own_params("GRULayer")

    @jax.jit
    def run(arrays, x):
        if face == "nnx":
            return gru_jax.nnx.GRULayer(H, **arrays)(x)
        layer = gru_jax.linen.GRULayer(H, **arrays)
        hash(layer)
        return layer.init_with_output(jax.random.key(0), x)[0]

    assert_same(run(params.arrays(), x), gru_jax.gru(params, x)[0])


# Sharding metadata


def test_sharding_metadata():
    x, names = inputs(), ("hidden", None)
    layer = gru_jax.linen.GRULayer(H, input_weights_metadata={"out_sharding": names})
    variables = layer.init(jax.random.key(0), x)
    assert nn.get_partition_spec(variables)["params"]["input_weights"] == PartitionSpec(*names)
    assert nn.get_partition_spec(variables)["params"]["bias"] == PartitionSpec()
    unboxed = nn.meta.unbox(variables)
    assert_same(layer.apply(variables, x), layer.apply(unboxed, x))

    mesh = Mesh(np.array(jax.devices()[:1]), ("hidden",))
    metadata = {"out_sharding": names, "mine": 1}
    with jax.set_mesh(mesh):
        other = gru_jax.nnx.GRULayer(
            H, input_size=I, rngs=nnx.Rngs(0), input_weights_metadata=metadata
        )
    assert other.input_weights.out_sharding == names
    assert other.input_weights.mine == 1
    assert other.input_weights[...].sharding.spec == PartitionSpec(*names)


# Properties of the pages

PAGE_DEFAULTS = {
    "output_mode": "sequence",
    "has_state_inputs": False,
    "has_state_outputs": False,
    "reset_gate_mode": "after-multiplication",
    "state_activation_function": "tanh",
    "gate_activation_function": "sigmoid",
    "hidden_state": None,
    "input_weights_initializer": "glorot",
    "recurrent_weights_initializer": "orthogonal",
    "bias_initializer": "zeros",
    "input_weights_learn_rate_factor": 1.0,
    "recurrent_weights_learn_rate_factor": 1.0,
    "bias_learn_rate_factor": 1.0,
    "input_weights_l2_factor": 1.0,
    "recurrent_weights_l2_factor": 1.0,
    "bias_l2_factor": 0.0,
    "num_inputs": 1,
    "input_names": ("in",),
    "num_outputs": 1,
    "output_names": ("out",),
}
PROJECTED_DEFAULTS = {
    "input_projector_initializer": "orthogonal",
    "output_projector_initializer": "orthogonal",
    "input_projector_learn_rate_factor": 1.0,
    "output_projector_learn_rate_factor": 1.0,
    "input_projector_l2_factor": 1.0,
    "output_projector_l2_factor": 1.0,
}
READ_ONLY = {
    "num_hidden_units": 7,
    "output_projector_size": 2,
    "input_projector_size": 2,
    "output_mode": "last",
    "has_state_inputs": True,
    "has_state_outputs": True,
    "reset_gate_mode": MODES[1],
    "input_size": 4,
    "state_activation_function": "softsign",
    "gate_activation_function": "hard-sigmoid",
    "num_inputs": 2,
    "input_names": ("in", "hidden"),
    "num_outputs": 2,
    "output_names": ("out", "hidden"),
}


def plain_layer(face, kind, **options):
    if face == "nnx":
        options |= {"input_size": I, "rngs": nnx.Rngs(0)}
    return getattr(getattr(gru_jax, face), kind)(*ARGUMENTS[kind], **options)


@pytest.mark.parametrize("kind", ["GRULayer", "GRUProjectedLayer"])
@pytest.mark.parametrize("face", FACES)
def test_defaults_of_the_pages(face, kind):
    layer = plain_layer(face, kind)
    expected = PAGE_DEFAULTS | {"num_hidden_units": H}
    expected |= {"name": None, "input_size": "auto"} if face == "linen" else {"name": ""}
    expected |= {"input_size": I} if face == "nnx" else {}
    if kind == "GRUProjectedLayer":
        expected |= PROJECTED_DEFAULTS
        expected |= {"output_projector_size": P_O, "input_projector_size": P_I}
    for name, value in expected.items():
        assert getattr(layer, name) == value, name
        assert type(getattr(layer, name)) is type(value), name
    for name in ("input_weights", "recurrent_weights", "bias", "input_projector"):
        there = name != "input_projector" or kind == "GRUProjectedLayer"
        assert (getattr(layer, name) is not None) == (face == "nnx" and there)
    ports = plain_layer(face, kind, has_state_inputs=1, has_state_outputs=True)
    assert (ports.num_inputs, ports.input_names) == (2, ("in", "hidden"))
    assert (ports.num_outputs, ports.output_names) == (2, ("out", "hidden"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("face", FACES)
def test_read_only_properties_name_themselves(face, kind):
    layer = plain_layer(face, kind)
    for name, value in READ_ONLY.items():
        before = getattr(layer, name)
        with pytest.raises(AttributeError, match=f"{name} of a {kind} is read-only"):
            setattr(layer, name, value)
        assert getattr(layer, name) == before


def test_settable_properties_of_an_nnx_layer():
    layer = plain_layer("nnx", "GRUProjectedLayer")
    layer.name = "gru1"
    layer.hidden_state = list(HIDDEN)
    layer.bias_l2_factor = 2
    layer.input_weights_learn_rate_factor = np.array([1, 2, 1])
    layer.output_projector_learn_rate_factor = 0
    layer.recurrent_weights_initializer = "narrownormal"
    layer.input_projector = np.ones((I, P_I))
    assert (layer.name, layer.hidden_state, layer.bias_l2_factor) == ("gru1", HIDDEN, 2.0)
    assert layer.input_weights_learn_rate_factor == (1.0, 2.0, 1.0)
    assert layer.output_projector_learn_rate_factor == 0.0
    assert layer.recurrent_weights_initializer == "narrow-normal"
    assert_same(layer.input_projector[...], jnp.ones((I, P_I), "float32"))
    with pytest.raises(ValueError, match="bias_l2_factor must be a nonnegative number"):
        layer.bias_l2_factor = -1
    assert layer.bias_l2_factor == 2.0


@pytest.mark.parametrize("face", FACES)
def test_spellings_of_the_pages(face):
    layer = plain_layer(
        face, "GRULayer", reset_gate_mode="recurrentbiasaftermultiplication",
        gate_activation_function="hardsigmoid", input_weights_initializer="narrownormal",
    )  # fmt: skip
    assert layer.reset_gate_mode == "recurrent-bias-after-multiplication"
    assert layer.gate_activation_function == "hard-sigmoid"
    assert layer.input_weights_initializer == "narrow-normal"
    for size in (np.int8(H), np.uint64(H), float(H), np.float32(H)):
        options = {"input_size": I, "rngs": nnx.Rngs(0)} if face == "nnx" else {}
        layer = getattr(gru_jax, face).GRULayer(size, **options)
        assert layer.num_hidden_units == H
        assert type(layer.num_hidden_units) is int


# The display of the pages

PAGE = """\
GRULayer with properties:

                       Name: 'gru1'
                 InputNames: {'in'}
                OutputNames: {'out'}
                  NumInputs: 1
                 NumOutputs: 1
             HasStateInputs: 0
            HasStateOutputs: 0

  Hyperparameters
                  InputSize: 'auto'
             NumHiddenUnits: 100
                 OutputMode: 'sequence'
    StateActivationFunction: 'tanh'
     GateActivationFunction: 'sigmoid'
              ResetGateMode: 'after-multiplication'

  Learnable Parameters
               InputWeights: []
           RecurrentWeights: []
                       Bias: []

  State Parameters
                HiddenState: []"""
PROJECTED_PAGE = (
    PAGE.replace("GRULayer", "GRUProjectedLayer")
    .replace("'gru1'", "'grup'")
    .replace(
        "NumHiddenUnits: 100\n",
        "NumHiddenUnits: 100\n         InputProjectorSize: 16\n        OutputProjectorSize: 30\n",
    )
    .replace(
        "Bias: []\n",
        "Bias: []\n             InputProjector: []\n            OutputProjector: []\n",
    )
)


def test_display_of_the_page_examples():
    assert str(gru_jax.linen.GRULayer(100, name="gru1")) == PAGE
    assert str(gru_jax.linen.GRUProjectedLayer(100, 30, 16, name="grup")) == PROJECTED_PAGE


def test_display_once_sizes_are_known():
    known = PROJECTED_PAGE.replace("'auto'", "12").replace("{'out'}", "{'out'  'hidden'}")
    known = known.replace("NumOutputs: 1", "NumOutputs: 2").replace("Outputs: 0", "Outputs: 1")
    for name, size in {
        "InputWeights": "300×16",
        "RecurrentWeights": "300×30",
        "Bias": "300×1",
        "InputProjector": "12×16",
        "OutputProjector": "100×30",
    }.items():
        known = known.replace(f" {name}: []", f" {name}: [{size} float32]")
    options = {"name": "grup", "has_state_outputs": True}
    layer = gru_jax.linen.GRUProjectedLayer(100, 30, 16, **options)
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 1, 12), "float32"))
    assert str(layer.bind(variables)) == known
    made = nnx.eval_shape(
        lambda: gru_jax.nnx.GRUProjectedLayer(
            100, 30, 16, **options, input_size=12, rngs=nnx.Rngs(0)
        )
    )
    assert str(made) == known
    assert "HiddenState: [5×1]" in str(plain_layer("nnx", "GRULayer", hidden_state=HIDDEN))


@pytest.mark.parametrize("face", FACES)
def test_display_of_the_other_kinds(face):
    text = str(plain_layer(face, "BidirectionalGRULayer", output_mode="last"))
    assert text.startswith("BidirectionalGRULayer with properties:")
    assert "OutputMode: 'last'" in text
    model = build(face, "BidirectionalGRULayer")
    bound = model.layer.bind(model.variables) if face == "linen" else model.layer
    assert f"InputSize: {I}\n" in str(bound)
    options = {"input_size": I, "rngs": nnx.Rngs(0)} if face == "nnx" else {}
    text = str(getattr(gru_jax, face).GRUCell(H, **options))
    assert text.startswith("GRUCell with properties:")
    assert "OutputMode" not in text


def test_defaults_are_those_of_the_table_of_leaves():
    fields = {f.name: f.default for f in dataclasses.fields(gru_jax.linen.GRULayer)}
    for leaf in LEAVES:
        assert fields[f"{leaf.name}_initializer"] == leaf.initializer
        assert fields[f"{leaf.name}_l2_factor"] == leaf.l2_factor
        assert fields[f"{leaf.name}_learn_rate_factor"] == leaf.learn_rate_factor


def test_same_options_in_both_faces():
    own = {"linen": {"parent", "name"}, "nnx": {"name"}}
    for kind in (*KINDS, "GRUCell"):
        fields = [
            {f.name: f.default for f in dataclasses.fields(getattr(getattr(gru_jax, face), kind))}
            for face in FACES
        ]
        for face, names in zip(FACES, fields, strict=True):
            for name in own[face]:
                names.pop(name)
        assert fields[0] == fields[1]
