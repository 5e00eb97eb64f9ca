"""Projection of whole models in both Flax APIs."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import as_dict
from flax import nnx
from reference import MODES, plan, step

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import linen, optim, projection

H, I, B, T = 6, 4, 4, 5  # noqa: E741
RNG = np.random.default_rng(4)
X = jnp.asarray(RNG.normal(size=(B, T, I)) + 0.5)
LENGTHS = np.array([5, 2, 4, 3])
FULL = {"input_projector_size": None, "output_projector_size": H}
CUT = {"input_projector_size": 2, "output_projector_size": 3}
F64 = {"param_dtype": jnp.float64}


def gru(units=H, **options):
    return linen.GRULayer(units, bias_initializer="narrow-normal", **F64, **options)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x, **options):
        x = nn.Dense(5, **F64)(x)
        return nn.Dense(3, **F64)(gru()(nn.tanh(x), **options))


class Setup(nn.Module):
    def setup(self):
        self.first, self.others = gru(), [gru(), gru()]

    def __call__(self, x):
        x = self.first(x)
        for layer in self.others:
            x = layer(x)
        return self.others[1](x)  # called twice


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return gru(reverse=True, output_mode="last")(Setup(name="inner")(Compact()(x)))


LINEN = {
    "root": (gru, [()]),
    "projected": (lambda: nn.Sequential([gru(), linen.GRUProjectedLayer(H, 2, 2, **F64)]), None),
    "sequential": (
        lambda: nn.Sequential([gru(), nn.Dense(5, **F64), gru()]),
        ["layers_0", "layers_2"],
    ),
    "compact": (Compact, ["GRULayer_0"]),
    "setup": (Setup, ["first", "others_0", "others_1"]),
    "nested": (
        Nested,
        ["Compact_0/GRULayer_0", "inner/first", "inner/others_0", "inner/others_1", "GRULayer_0"],
    ),
    "bidirectional": (
        lambda: nn.Sequential([linen.BidirectionalGRULayer(H, **F64), gru()]),
        ["layers_0/forward", "layers_0/backward", "layers_1"],
    ),
}


def layer(inputs=I, seed=0, kind=gru_jax.nnx.GRULayer, **options):
    return kind(
        H, input_size=inputs, rngs=nnx.Rngs(seed), bias_initializer="ones", **F64, **options
    )


class Chain(nnx.Module):
    """Layers in some container, called in order."""

    def __init__(self, *layers, hold=nnx.List):
        self.layers = hold(layers)

    def __call__(self, x):
        layers = self.layers
        for one in layers.values() if hasattr(layers, "values") else layers:
            x = one(x)
        return x


class Attributes(nnx.Module):
    def __init__(self):
        self.head, self.body = layer(), Chain(Chain(layer(H, 1)), layer(H, 2))

    def __call__(self, x):
        return self.body(self.head(x))


class Doubled(gru_jax.nnx.GRULayer):
    """A layer of somebody's own, with a variable more and another signature."""

    def __init__(self, inputs):
        super().__init__(H, input_size=inputs, rngs=nnx.Rngs(3), **F64)
        self.scale = nnx.Param(jnp.full((), 2.0))

    def __call__(self, x):
        return super().__call__(x) * self.scale[...]


def dictionary(layers):
    return nnx.Dict({"ab"[n]: one for n, one in enumerate(layers)})


def shared():
    one = layer(H, 1)
    return Chain(layer(), one, Chain(one))


NNX = {
    "root": (layer, [""]),
    "attributes": (Attributes, ["body/layers/0/layers/0", "body/layers/1", "head"]),
    "list": (lambda: Chain(layer(), layer(H, 1)), ["layers/0", "layers/1"]),
    "dict": (lambda: Chain(layer(), layer(H), hold=dictionary), ["layers/a", "layers/b"]),
    "plain": (
        lambda: Chain(layer(), layer(H), hold=lambda layers: nnx.data(list(layers))),
        ["layers/0", "layers/1"],
    ),
    "sequential": (lambda: nnx.Sequential(layer(), nnx.tanh, layer(H)), ["layers/0", "layers/2"]),
    "shared": (shared, ["layers/0", "layers/1"]),
    "bidirectional": (
        lambda: Chain(layer(kind=gru_jax.nnx.BidirectionalGRULayer), layer(2 * H)),
        ["layers/0/backward", "layers/0/forward", "layers/1"],
    ),
    "subclass": (lambda: Chain(Doubled(I), layer(H)), ["layers/0", "layers/1"]),
}


def made(face, name):
    """(model, params, output of either, names of its layers)."""
    build, names = (LINEN if face == "linen" else NNX)[name]
    model = build()
    if face == "nnx":
        return model, None, lambda model, _, *x: model(*x), sorted(names)
    params = model.init(jax.random.key(0), X)["params"]
    names = sorted("/".join(name) if name == () else name for name in names or ())
    return model, params, lambda model, params, *x: model.apply({"params": params}, *x), names


def learnables(model, params):
    return gru_jax.num_learnables(params if params is not None else nnx.state(model, nnx.Param))


def values_of(leaf):
    keys = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if keys else leaf)


def unchanged(model, params):
    """A check that neither was touched."""
    state = params if params is not None else nnx.state(model)
    before = jax.tree.map(values_of, state)
    kinds = [type(m) for _, m in nnx.iter_modules(model)] if params is None else []

    def check():
        now = params if params is not None else nnx.state(model)
        assert jax.tree.structure(now) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(values_of, now), before)
        if params is None:
            assert kinds == [type(m) for _, m in nnx.iter_modules(model)]

    return check


WHOLE = [("linen", name) for name in LINEN if name != "projected"] + [("nnx", name) for name in NNX]


@pytest.mark.parametrize(("face", "name"), WHOLE)
def test_whole_models(face, name):
    model, params, run, names = made(face, name)
    check, y = unchanged(model, params), run(model, params, X)
    pca = projection.neuron_pca_of(model, params, iter([X[:1], (X[1:],)]))
    assert sorted("/".join(path) for path in pca) == names
    whole = projection.neuron_pca_of(model, params, [X])
    for path, one in pca.items():
        np.testing.assert_allclose(one.states.covariance, whole[path].states.covariance, atol=1e-12)

    full, leaves, info = projection.project_model(model, params, pca, **FULL)
    assert sorted(info.layer_names) == names
    np.testing.assert_allclose(run(full, leaves, X), y, rtol=0, atol=1e-11)
    dense, back = projection.unproject_model(full, leaves)
    assert learnables(dense, back) == learnables(model, params) == info.learnables[0]
    np.testing.assert_allclose(run(dense, back, X), y, rtol=0, atol=1e-11)

    small, leaves, info = projection.project_model(model, params, pca, **CUT)
    assert learnables(small, leaves) == info.learnables[1] < info.learnables[0]
    assert info.learnables_reduction == 1 - info.learnables[1] / info.learnables[0]
    assert np.abs(run(small, leaves, X) - y).max() > 1e-6
    dense, back = projection.unproject_model(small, leaves)
    np.testing.assert_allclose(run(dense, back, X), run(small, leaves, X), rtol=0, atol=1e-12)
    lines = projection.summary(info).splitlines()
    assert len(lines) == 1 + len(names) + (info.layers[0].learnables != info.learnables)
    assert sorted(line.split()[0] for line in lines[1 : 1 + len(names)]) == [
        n or "GRU" for n in names
    ]
    check()


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_a_common_goal_for_all_layers(face):
    model, params, _, _ = made(face, "bidirectional")
    pca = projection.neuron_pca_of(model, params, [X])
    curves = [m.explained_variance for one in pca.values() for m in (one.inputs, one.states)]
    tried = []
    for goal in np.unique(np.concatenate(curves)):
        _, _, info = projection.project_model(model, params, pca, min(max(goal, 1e-9), 1 - 1e-9))
        tried.append((goal, info))
    for bound in (0.2, 0.4, 0.55):
        _, _, info = projection.project_model(model, params, pca, None, bound)
        enough = [tight for _, tight in tried if tight.learnables_reduction >= bound]
        assert info.learnables_reduction == enough[-1].learnables_reduction >= bound
        assert info.layers == enough[-1].layers
    with pytest.raises(ValueError, match=r"= 0\.95 cannot be reached"):
        projection.project_model(model, params, pca, None, 0.95)


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_sizes_of_the_pages(face):
    x = jnp.asarray(RNG.normal(size=(4, 3, 12)), "float32")
    if face == "linen":
        model = nn.Sequential([linen.GRULayer(100), nn.Dense(9)])
        params = model.init(jax.random.key(0), x)["params"]
    else:
        one = gru_jax.nnx.GRULayer(100, input_size=12, rngs=nnx.Rngs(0))
        model, params = nnx.Sequential(one, nnx.Linear(100, 9, rngs=nnx.Rngs(1))), None
    pca = projection.neuron_pca_of(model, params, [x])
    sizes = {"input_projector_size": 9, "output_projector_size": 25}
    model, params, info = projection.project_model(model, params, pca, **sizes)
    assert info.learnables == (34809, 14017)
    assert info.layers[0].learnables == (33900, 13108)
    assert learnables(model, params) == 14017
    assert f"{info.learnables_reduction:.1%}" == "59.7%"
    assert "whole model" in projection.summary(info)


# What a layer is called with


def loops(params, x, h0, back, *, mask, resets, reverse):
    """Rows (x_t, h_t, h_{t-1}, r_t) of all steps that count, by plain loops."""
    leaves, rows = as_dict(params), []
    for b in range(len(x)):
        h = h0[b]
        for t, reset in plan(b, x.shape[1], None, mask, resets, reverse):
            before = back[b] if reset else h
            h, saved = step(leaves, before, x[b, t], params.reset_gate_mode)
            rows.append((x[b, t], h, before, saved.r))
    return [np.stack(column) for column in zip(*rows, strict=True)]


STATE = (0.5, -1.0, 2.0, 0.25, 1.5, -0.5)
ZEROS, STORED = np.zeros((B, H)), np.tile(STATE, (B, 1))
GIVEN = RNG.normal(size=(B, H))
RESETS = RNG.random((B, T)) < 0.4
MASK = np.arange(T) < LENGTHS[:, None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind", ["reverse", "resets", "hidden_state", "port", "left", "CBT", "stateful", "last"]
)
@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_analysis_of_a_call(face, kind, mode):
    options, call, mask, start, back, x = {}, {}, None, ZEROS, ZEROS, X
    if kind == "reverse":
        options, call, mask = {"reverse": True}, {"lengths": LENGTHS, "resets": RESETS}, MASK
    elif kind == "resets":
        options, call = {"hidden_state": STATE}, {"resets": RESETS}
        start = back = STORED
    elif kind == "hidden_state":
        options, call, mask, start = {"hidden_state": STATE}, {"lengths": LENGTHS}, MASK, STORED
    elif kind == "port":
        options, call = {"has_state_inputs": True}, {"hidden": GIVEN, "resets": RESETS}
        start = back = GIVEN
    elif kind == "left":
        mask = MASK[:, ::-1]
        x, call = jnp.where(mask[..., None], X, jnp.nan), {"mask": mask}
    elif kind == "CBT":
        options, call, mask = {"data_format": "CBT"}, {"lengths": LENGTHS}, MASK
        x = jnp.moveaxis(X, -1, 0)
    elif kind == "stateful":
        options, call = {"stateful": True, "hidden_state": STATE}, {"resets": RESETS}
        start, back = GIVEN, STORED
    elif kind == "last":
        options = {"output_mode": "last", "has_state_outputs": True}
    arrays = as_dict(gru_jax.init_params(jax.random.key(0), H, I, reset_gate_mode=mode, **FLOAT))
    params = gru_jax.GRUParams(**arrays, reset_gate_mode=mode)
    if face == "linen":
        model = linen.GRULayer(H, reset_gate_mode=mode, **options)
        state = {"state": {"hidden_state": jnp.asarray(GIVEN)}} if kind == "stateful" else {}

        def run(model, params, x):
            return model.apply({"params": params} | state, x, **call)
    else:
        model = gru_jax.nnx.GRULayer(H, reset_gate_mode=mode, **arrays, **F64, **options)
        if kind == "stateful":
            model.state.set_value(jnp.asarray(GIVEN))

        def run(model, _, x):
            return model(x, **call)

    check = unchanged(model, None if face == "nnx" else arrays)
    pca = projection.neuron_pca_of(model, arrays, [x], call=run, key=jax.random.key(0))[()]
    check()
    how = {"mask": mask, "resets": call.get("resets"), "reverse": kind == "reverse"}
    inputs, states, before, r = loops(params, np.asarray(X), start, back, **how)
    for found, rows in ((pca.inputs, inputs), (pca.states, states), (pca.before, before)):
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T, ddof=0), rtol=0, atol=1e-12)
    gated = np.mean(r[:, :, None] * before[:, None, :], axis=0)
    np.testing.assert_allclose(pca.gated, gated, rtol=0, atol=1e-12)
    assert all(np.isfinite(G).all() and np.trace(G) > 0 for G in pca.sensitivity)
    _, _, info = projection.project_model(model, arrays, {(): pca}, method="output", **CUT)
    assert info.layers[0].sizes[1].output_projector_size == 3


FLOAT = {"dtype": jnp.float64, "bias_initializer": "narrow-normal"}


def test_lengths_that_a_model_hands_on():
    model, x = Compact(), jnp.where(MASK[..., None], X, jnp.nan)
    params = model.init(jax.random.key(0), X)["params"]

    def run(model, params, x, lengths):
        return model.apply({"params": params}, x, lengths=lengths)

    batches = [(x, LENGTHS), [x[:2], LENGTHS[:2]]]
    found = projection.neuron_pca_of(model, params, batches, call=run)["GRULayer_0",]
    dense = jax.tree.map(np.asarray, params["Dense_0"])
    inner = np.tanh(
        np.concatenate([np.asarray(X)[MASK], X[:2][MASK[:2]]]) @ dense["kernel"] + dense["bias"]
    )
    assert (found.inputs.count, found.observations, found.longest) == (len(inner), B + 2, T)
    np.testing.assert_allclose(found.inputs.covariance, np.cov(inner.T, ddof=0), atol=1e-12)


# What else a model may have


@pytest.fixture
def standard():
    """For those of Flax and Optax that promote."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Regular(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, **F64)(x)
        return nn.Dropout(0.5, deterministic=not train)(gru()(x))


@pytest.mark.usefixtures("standard")
@pytest.mark.parametrize("train", [False, True])
def test_other_collections(train):
    model, keys = Regular(), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(keys, X, train=True)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}

    def run(model, params, x):
        variables = {"params": params, **rest}
        return model.apply(variables, x, train, rngs=keys, mutable=["batch_stats"])[0]

    pca = projection.neuron_pca_of(model, params, [X], call=run)
    _, full, info = projection.project_model(model, params, pca, **FULL)
    assert info.layer_names == ("GRULayer_0",)
    y = run(model, params, X)
    np.testing.assert_allclose(run(model, full, X), y, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("standard")
def test_statistics_and_states_of_the_given_model_stay():
    x, rngs = X.astype("float32"), nnx.Rngs(0)
    options = {"stateful": True, "hidden_state": STATE}
    one = gru_jax.nnx.GRULayer(H, input_size=I, rngs=rngs, **options)
    model = Chain(nnx.BatchNorm(I, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), one)
    model(x)
    check = unchanged(model, None)
    pca = projection.neuron_pca_of(model, None, [x, x])
    full, _, _ = projection.project_model(model, None, pca, **FULL)
    check()
    np.testing.assert_array_equal(full.layers[2].state[...], one.state[...])
    np.testing.assert_allclose(full(x), model(x), rtol=0, atol=1e-5)


def test_one_layer_in_two_places():
    model = shared()
    pca = projection.neuron_pca_of(model, None, [X])
    assert pca["layers", "1"].observations == 2 * B
    x = model.layers[0](X)
    one = model.layers[1]
    states = np.concatenate([one(x), one(one(x))]).reshape(-1, H)
    np.testing.assert_allclose(pca["layers", "1"].states.mean, states.mean(0), rtol=0, atol=1e-12)
    small, _, _ = projection.project_model(model, None, pca, **CUT)
    assert small.layers[1] is small.layers[2].layers[0]
    assert small.layers[1].output_projector.shape == (H, 3)


def test_what_an_nnx_layer_keeps():
    factors = {"input_weights_learn_rate_factor": (1, 0, 2), "output_projector_l2_factor": 3.0}
    model = layer(reset_gate_mode=MODES[1], reverse=True, name="one", **factors)
    sizes = [(2, 3), (None, 3), (2, None), (None, None)]
    pca = projection.neuron_pca_of(model, None, [X])
    for P_i, P_o in sizes:
        given = {"input_projector_size": P_i, "output_projector_size": P_o}
        small, _, _ = projection.project_model(model, None, pca, **given)
        both = P_i is not None and P_o is not None
        name = "GRUProjectedLayer" if both else "GRULayer"
        assert type(small) is getattr(gru_jax.nnx, name)
        assert (small.input_projector_size, small.output_projector_size) == (P_i, P_o)
        assert (small.reset_gate_mode, small.reverse, small.name) == (MODES[1], True, "one")
        assert small.input_weights_learn_rate_factor == (1, 0, 2)
        assert small.output_projector_l2_factor == 3.0
        assert ("OutputProjector: []" in str(small)) == (P_i is not None and P_o is None)
        rebuilt = nnx.merge(*nnx.split(small))
        np.testing.assert_array_equal(rebuilt(X), small(X))
        dense, _ = projection.unproject_model(small, None)
        assert type(dense) is gru_jax.nnx.GRULayer
        assert nnx.state(dense).keys() == nnx.state(model).keys()


def test_a_subclass_keeps_its_own_variables():
    model = Doubled(I)
    model.scale.set_value(jnp.full((), 5.0))
    pca = projection.neuron_pca_of(model, None, [X])
    full, _, _ = projection.project_model(model, None, pca, **FULL)
    assert (type(full), full.scale[...]) == (Doubled, 5.0)
    np.testing.assert_allclose(full(X), model(X), rtol=0, atol=1e-12)


class Projected(gru_jax.nnx.GRUProjectedLayer):
    pass


@pytest.mark.parametrize("kind", [gru_jax.nnx.GRUProjectedLayer, Projected])
def test_unproject_nnx_layers_that_were_made_projected(kind):
    one = kind(H, 3, 2, input_size=I, rngs=nnx.Rngs(0), **F64)
    model = Chain(one, layer(H))
    dense, _ = projection.unproject_model(model, None)
    np.testing.assert_allclose(dense(X), model(X), rtol=0, atol=1e-12)
    assert dense.layers[0].input_projector is dense.layers[0].output_projector is None
    assert learnables(dense, None) == 3 * H * (I + H + 1) + 3 * H * (2 * H + 1)


def test_projected_linen_layers():
    model, params, run, _ = made("linen", "projected")
    dense, back = projection.unproject_model(model, params)
    assert sorted(back["layers_1"]) == ["bias", "input_weights", "recurrent_weights"]
    np.testing.assert_allclose(run(dense, back, X), run(model, params, X), rtol=0, atol=1e-12)
    pca = projection.neuron_pca_of(dense, back, [X])
    _, small, info = projection.project_model(model, back, pca, **CUT)
    assert info.layer_names == ("layers_0", "layers_1")
    assert run(model, small, X).shape == (B, T, H)
    with pytest.raises(ValueError, match=r"layers_1.*must be dense.*unproject"):
        projection.project_model(model, params, pca)


def test_tree_mode():
    with nnx.set_graph_mode(False):
        model = Chain(layer(), Chain(layer(H, 1)))
        pca = projection.neuron_pca_of(model, None, [X])
        full, _, info = projection.project_model(model, None, pca, **FULL)
        assert info.layer_names == ("layers/0", "layers/1/layers/0")
        assert full.layers[0].output_projector.shape == (H, H)
        np.testing.assert_allclose(full(X), model(X), rtol=0, atol=1e-12)
        dense, _ = projection.unproject_model(full, None)
        np.testing.assert_allclose(dense(X), model(X), rtol=0, atol=1e-12)


def test_frozen_and_boxed_parameters():
    metadata = {"out_sharding": ("hidden", None)}
    model = nn.Sequential([gru(recurrent_weights_metadata=metadata), nn.Dense(3, **F64)])
    params = model.init(jax.random.key(0), X)["params"]
    plain = nn.meta.unbox(params)
    expected = model.apply({"params": plain}, X)
    for tree in (params, flax.core.freeze(params)):
        pca = projection.neuron_pca_of(model, tree, [X])
        _, full, _ = projection.project_model(model, tree, pca, **FULL)
        box = full["layers_0"]["recurrent_weights"]
        assert isinstance(box, nn.Partitioned)
        assert box.names == ("hidden", None)
        assert box.value.shape == (3 * H, H)
        y = model.apply({"params": full}, X)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
        dense = nn.meta.unbox(projection.unproject_model(model, full)[1])
        assert jax.tree.structure(flax.core.unfreeze(dense)) == jax.tree.structure(plain)


# Training and storing afterwards


@pytest.mark.usefixtures("standard")
def test_linen_trains_and_is_stored():
    model, params, run, _ = made("linen", "compact")
    pca = projection.neuron_pca_of(model, params, [X])
    _, small, _ = projection.project_model(model, params, pca, **CUT)
    target = run(model, params, X)
    solver = optim.training_solver("adam", model, small, X, learning_rate=1e-3)
    state = solver.init(small)

    @jax.jit
    def update(params, state):
        def loss(params):
            return jnp.mean((run(model, params, X) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = solver.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    trained, losses = small, []
    for _ in range(20):
        trained, state, value = update(trained, state)
        losses.append(value)
    assert losses[-1] < 0.9 * losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained, small)
    assert all(jax.tree.leaves(moved))
    stored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(trained))
    np.testing.assert_array_equal(run(model, stored, X), run(model, trained, X))


@pytest.mark.usefixtures("standard")
def test_nnx_trains():
    model = Chain(layer(), layer(H, 1))
    target = model(X)
    pca = projection.neuron_pca_of(model, None, [X])
    small, _, _ = projection.project_model(model, None, pca, **CUT)
    solver = optim.training_solver("adam", small, None, learning_rate=1e-3)
    optimizer = nnx.Optimizer(small, solver, wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        value, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(X) - target) ** 2))(model)
        optimizer.update(model, gradients)
        return value

    before = np.array(small.layers[0].output_projector[...])
    losses = [float(update(small, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert (np.asarray(small.layers[0].output_projector[...]) != before).any()
    assert (model(X) == target).all()


# What cannot be seen


class Once(nn.Module):
    lift: str

    @nn.compact
    def __call__(self, x):
        kind = linen.GRULayer
        if self.lift == "scan":
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            body = nn.scan(lambda m, c, _: (m(c), None), **axes)
            return body(gru(name="layer"), x, None)[0]
        kind = {"jit": nn.jit, "remat": nn.remat}[self.lift](kind)
        return kind(H, **F64)(x)


@pytest.mark.parametrize("lift", ["scan", "jit", "remat"])
def test_layers_in_compiled_parts_of_linen(lift):
    model, x = Once(lift), jnp.ones((B, T, H))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    jax.clear_caches()
    with pytest.raises(ValueError, match="inside a loop or a compiled part of the model"):
        projection.neuron_pca_of(model, params, [x])


@pytest.mark.parametrize("lift", [nnx.jit, nnx.remat])
def test_layers_in_compiled_parts_of_nnx(lift):
    called = lift(lambda model, x: model(x))
    with pytest.raises(ValueError, match="inside a loop or a compiled part of the model"):
        projection.neuron_pca_of(layer(), None, [X], call=lambda m, _, x: called(m, x))


@dataclasses.dataclass
class Idle(nnx.Module):
    used: nnx.Module
    idle: nnx.Module

    def __call__(self, x):
        return self.used(x)


def test_layers_that_are_not_called_stay_as_they_are():
    model = Idle(layer(), layer(seed=1))
    pca = projection.neuron_pca_of(model, None, [X])
    assert list(pca) == [("used",)]
    small, _, info = projection.project_model(model, None, pca, **CUT)
    assert info.layer_names == ("used",)
    assert small.idle.output_projector is None
    assert info.learnables == (learnables(model, None), learnables(small, None))


def cells(face):
    if face == "linen":
        return nn.Sequential([nn.RNN(linen.GRUCell(H, **F64)), gru()])
    return Chain(nnx.RNN(layer(kind=gru_jax.nnx.GRUCell), rngs=nnx.Rngs(0)), layer(H))


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_cells_are_left_out(face):
    model = cells(face)
    params = model.init(jax.random.key(0), X)["params"] if face == "linen" else None
    pca = projection.neuron_pca_of(model, params, [X])
    assert len(pca) == 1
    small, leaves, info = projection.project_model(model, params, pca, **CUT)
    assert info.learnables == (learnables(model, params), learnables(small, leaves))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": Chain(jnp.tanh)}, ValueError, "no GRU layer was called"),
        ({"batches": []}, ValueError, "batches must hold at least one batch, got none"),
        ({"model": lambda x: x}, TypeError, "must be a linen or nnx module, got function"),
        ({"batches": [X[:1]]}, ValueError, "layers/0 needs at least two sequences"),
        ({"batches": [X * 0]}, ValueError, "x of layers/0 must vary in every channel"),
        ({"batches": [X * jnp.nan]}, ValueError, "x must be finite"),
        ({"call": lambda m, _, x: OTHER(m(x))}, ValueError, "not part of the model"),
    ],
)
def test_errors_of_the_analysis(change, error, words):
    arguments = {"model": Chain(layer()), "params": None, "batches": [X]} | change
    with pytest.raises(error, match=words):
        projection.neuron_pca_of(**arguments)


OTHER = layer(H)


def test_paths_may_be_written_as_they_are_shown():
    model = Chain(layer())
    pca = projection.neuron_pca_of(model, None, [X])
    shown = {"/".join(path): part for path, part in pca.items()}
    goal = {"learnables_reduction_goal": 0.3}
    one, two = (projection.project_model(model, None, p, **goal)[0] for p in (pca, shown))
    np.testing.assert_array_equal(one(X), two(X))


def test_errors_of_the_projection():
    model = Chain(layer())
    pca = projection.neuron_pca_of(model, None, [X])
    (one,) = pca.values()
    with pytest.raises(TypeError, match=r"pca must come from neuron_pca_of.*got Moments"):
        projection.project_model(model, None, {"layers/0": one.states})
    alone = gru_jax.linen.GRULayer(H)
    variables = alone.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"params must be variables\['params'\]"):
        projection.project_model(alone, variables, {(): one})
    for wrong, words in [
        ({}, "at least one layer, got none"),
        ({("layers", "7"): one}, r"no GRU layer at \['layers/7'\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            projection.project_model(model, None, wrong)
    with pytest.raises(ValueError, match="pca must be of the same GRU as the layer at 'layers/0'"):
        projection.project_model(Chain(layer(3)), None, pca)
    for function in (projection.unproject_model, lambda m, p: projection.project_model(m, p, pca)):
        with pytest.raises(TypeError, match="must be a linen or nnx module, got dict"):
            function({}, None)


def test_stacks_of_layers_are_refused():
    stack = nn.vmap(
        linen.GRUProjectedLayer, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    params = stack(H, 3, 2).init(jax.random.key(0), jnp.ones((2, B, T, I)))["params"]
    with pytest.raises(ValueError, match="Stacks of parameters"):
        projection.unproject_model(stack(H, 3, 2), params)


def test_an_input_that_is_not_mapped():
    lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.vmap(linen.GRULayer, **lifted, in_axes=None, axis_size=2)(H, **F64)
    params = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match="inside a loop or a compiled part"):
        projection.neuron_pca_of(model, params, [X])


def test_what_was_compiled_before_is_not_left_out():
    called = nnx.jit(lambda model, x: model(x))
    model = Chain(layer(), layer(H))

    def run(model, _, x):
        return called(model.layers[1], model.layers[0](x))

    run(model, None, X)
    with pytest.raises(ValueError, match="inside a loop or a compiled part"):
        projection.neuron_pca_of(model, None, [X], call=run)


def test_layers_with_a_variable_in_common():
    model = Chain(layer(H), layer(H, 1))
    model.layers[1].recurrent_weights = model.layers[0].recurrent_weights
    x = jnp.asarray(RNG.normal(size=(B, T, H)))
    pca = projection.neuron_pca_of(model, None, [x])
    with pytest.raises(ValueError, match="share their recurrent_weights"):
        projection.project_model(model, None, pca, **FULL)


def test_an_analysis_of_another_mode():
    pca = projection.neuron_pca_of(layer(), None, [X])
    with pytest.raises(ValueError, match="pca must be of the same GRU"):
        projection.project_model(layer(reset_gate_mode=MODES[1]), None, pca)


def test_frozen_parameters_keep_one_kind():
    model = nn.Sequential([gru(), nn.Dense(3, **F64)])
    params = flax.core.freeze(model.init(jax.random.key(0), X)["params"])
    pca = projection.neuron_pca_of(model, params, [X])
    _, small, _ = projection.project_model(model, params, pca, **CUT)
    assert {type(small[name]) for name in small} == {type(small)}


@pytest.mark.parametrize("face", [linen, gru_jax.nnx])
def test_pairs_for_a_layer_alone(face):
    """The second argument of a layer is its state: lengths and masks go to their own."""
    if face is linen:
        model = gru()
        params = model.init(jax.random.key(0), X)["params"]
    else:
        model, params = layer(), None
    by_length = projection.neuron_pca_of(model, params, [(X, LENGTHS)])[()]
    by_mask = projection.neuron_pca_of(model, params, [(X, MASK)])[()]
    assert by_length.states.count == MASK.sum()
    np.testing.assert_allclose(by_length.states.scatter, by_mask.states.scatter, rtol=1e-12)


@pytest.mark.parametrize("face", [linen, gru_jax.nnx])
def test_pairs_that_hold_a_state(face):
    """Only integers and booleans are lengths and masks; floats stay where they stand."""
    options = {"has_state_inputs": True}
    start = jnp.asarray(RNG.normal(size=(B, H)))
    if face is linen:
        model = gru(**options)
        params = model.init(jax.random.key(0), X, start)["params"]
    else:
        model, params = layer(**options), None
    found = projection.neuron_pca_of(model, params, [(X, start)])[()]
    zero = projection.neuron_pca_of(model, params, [(X, jnp.zeros((B, H)))])[()]
    assert found.before.count == B * T
    assert np.abs(found.states.mean - zero.states.mean).max() > 1e-3
