"""`gru_jax.optim` finds every GRU of a whole model: factors on the right rows of the right leaves.

The learnables themselves say what is expected: initialisers write into every row of every leaf
which layer and which gate it belongs to, and stacks, boxes and transformations carry that along.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import MODES

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import linen, optim
from gru_jax._params import LEAF_NAMES, LEAVES

H, I, B, T = 2, 3, 2, 4  # noqa: E741
WIDE = I  # units of layers that feed one another
LEARN_RATE = {
    "input_weights": ((1.0, 0.5, 2.0), 0.125),
    "recurrent_weights": ((0.0, 1.0, 3.0), (5.0, 6.0, 7.0)),
    "bias": ((4.0, 0.25, 1.0), (8.0, 9.0, 0.0)),
    "input_projector": (0.5, 0.0),
    "output_projector": (0.0, 11.0),
}
L2 = {
    "input_weights": ((0.5, 0.0, 2.0), (1.0, 3.0, 4.0)),
    "recurrent_weights": (0.75, (6.0, 5.0, 0.0)),
    "bias": ((0.0, 0.25, 7.0), 2.0),
    "input_projector": (0.25, 3.0),
    "output_projector": (8.0, 0.0),
}
TABLES = {"learn_rate_factor": LEARN_RATE, "l2_factor": L2}
FUNCTIONS = {"learn_rate_factor": optim.learn_rate_factors, "l2_factor": optim.l2_factors}
RANKS = {
    "kernel": 2,
    "bias": 1,
    "scale": 1,
    "scalar": 0,
    "gain": 1,
    "cube": 3,
    "embedding": 2,
}  # in one layer
strict_off = functools.partial(jax.numpy_dtype_promotion, "standard")  # for Flax's own, Optax's own


def told(which, units):
    """An initialiser that writes 3 · layer + gate into the rows of each gate."""

    def init(key, shape, dtype):
        rows = np.arange(shape[0]) // units % 3 + 3 * which
        return jnp.asarray(np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape), dtype)

    return init


@functools.cache  # one function, one compiled program
def _initializers(which, units):
    return {f"{leaf.name}_initializer": told(which, units) for leaf in LEAVES}


def options(which=0, units=H):
    """The options of a layer that has the factors of a row of the tables, and tells so."""
    factors = {
        f"{name}_{kind}": values[which]
        for kind, table in TABLES.items()
        for name, values in table.items()
    }
    return factors | _initializers(which, units)


def gru(which=0, units=H, cls=linen.GRULayer, **others):
    return cls(units, **options(which, units), **others)


def flat(tree):
    """A tree of dicts, lists and boxes as one dict of tuples of names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")  # noqa: E731
    return {tuple(path(k).removesuffix("/value").split("/")): leaf for k, leaf in leaves}


def by_gate(value, leaf):
    """The factor of every number of a leaf that tells its layer and gate."""
    which, gate = np.divmod(np.asarray(leaf, np.float64).astype(int), 3)
    return np.array([np.broadcast_to(v, 3) for v in value])[which, gate]


def assert_factors(params, factors, kind, layers, ranks=None):
    """Every factor against what the leaves tell; `layers` GRUs; ranks of other leaves by name."""
    assert jax.tree.structure(factors) == jax.tree.structure(params)
    leaves, found, own = flat(params), flat(factors), set()
    assert leaves.keys() == found.keys()
    for path, leaf in leaves.items():
        factor = found[path]
        assert type(factor) is np.ndarray
        assert factor.dtype == np.float64
        if path[-1] in LEAF_NAMES and (*path[:-1], "recurrent_weights") in leaves:
            own.add(path[:-1])
            expected = by_gate(TABLES[kind][path[-1]], leaf)
        else:
            rank = (RANKS | (ranks or {}))[path[-1]]
            expected = np.full(leaf.shape, float(kind == "learn_rate_factor" or rank >= 2))
        np.testing.assert_array_equal(np.broadcast_to(factor, leaf.shape), expected, str(path))
    assert len(own) == layers


# linen

Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.ones)  # Flax's own is not strict
X = jnp.ones((B, T, I), "float32")


def ones(key, shape):
    return jnp.ones(shape, "float32")


MANY = ones(None, (6, B, T, I))


class Middle(nn.Module):
    """Layers between others, made where they are called."""

    @nn.compact
    def __call__(self, x):
        x = gru(0)(Dense(4)(x))
        return Dense(2)(gru(1, 3)(Dense(1)(x)))


class Setup(nn.Module):
    def setup(self):
        self.first, self.layers = gru(1), [gru(0, 4), Dense(2), gru(1, 3)]
        self.by_name = {"a": gru(0), "b": Dense(3)}
        self.unused = gru(0)

    def __call__(self, x):
        for layer in (self.first, *self.layers, *self.by_name.values()):
            x = layer(x)
        return x


class Nested(nn.Module):
    given: nn.Module
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        x = Nested(gru(0), self.depth - 1)(x) if self.depth else x
        return Dense(I)(self.given(x))


class Twice(nn.Module):
    """One layer called twice, by itself and in another module."""

    @nn.compact
    def __call__(self, x):
        layer = gru(1, WIDE)
        return Nested(layer, 0)(layer(layer(x)))


class Rnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        cells = [nn.RNN(gru(k, cls=linen.GRUCell)) for k in range(2)]
        x = nn.Bidirectional(*cells)(x)
        return nn.RNN(gru(0, cls=linen.GRUCell))(x)


class Gained(linen.GRULayer, kw_only=True):
    """A user's own layer, with learnables and a layer of its own."""

    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", ones, (x.shape[-1],))
        self.param("kernel", ones, (2, 2))
        self.param("scalar", ones, ())
        return gru(1)(Dense(I)(super().__call__(x * gain[None, None])))


class Block(nn.Module):
    """What stacks are made of: a matrix and vectors of others too."""

    which: int = 0
    projected: bool = False
    boxed: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        cls, more = linen.GRULayer, {}
        if self.projected:
            cls, more = linen.GRUProjectedLayer, {"output_projector_size": 2}
            more["input_projector_size"] = 1
        if self.boxed:
            more["recurrent_weights_metadata"] = {"out_sharding": ("rows", None)}
        x = gru(self.which, WIDE, cls, name="gru", **more)(x)
        self.param("scale", ones, (WIDE,))
        self.param("cube", ones, (1, 1, 1))
        return Dense(WIDE)(x), None


def scanned(target, length, axis=0):
    axes = {"variable_broadcast": "params"} if axis is None else {"variable_axes": {"params": axis}}
    others = {"metadata_params": {nn.PARTITION_NAME: "stack"}} if axis is not None else {}
    return nn.scan(target, length=length, split_rngs={"params": axis is not None}, **axes, **others)


def vmapped(target, axis=0, **others):
    return nn.vmap(target, variable_axes={"params": axis}, split_rngs={"params": True}, **others)


class Scan(nn.Module):
    """A stack beside a layer that is none; its own block, or another target."""

    length: int
    axis: int | None = 0
    target: type = Block
    others: tuple = ()

    @nn.compact
    def __call__(self, x):
        stack = scanned(self.target, self.length, self.axis)(**dict(self.others), name="stack")
        return gru(1)(stack(x, None)[0])


class Inner(nn.Module):
    """A stack in a stack."""

    length: int = 2
    axis: int = 1

    @nn.compact
    def __call__(self, x, _=None):
        return scanned(Block, self.length, self.axis)(name="inner")(x, None)[0], None


class OfVmap(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        pair = vmapped(Block, 1, in_axes=(0, None))(name="pair")(jnp.stack([x, x]), None)
        return pair[0].sum(0), None


class OfRnn(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        both = linen.BidirectionalGRULayer(WIDE, merge="sum", name="both", **options(1, WIDE))
        return both(nn.RNN(gru(0, WIDE, linen.GRUCell))(x)), None


class ByFunction(nn.Module):
    """A stack made of a function instead of a class, with learnables of its own."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            module.param("scale", ones, (WIDE,))
            if not self.axis:
                module.param("scalar", ones, ())
            return gru(0, WIDE, name="gru")(x), None

        return scanned(body, 9, self.axis)(self, x, None)[0]


class Lifted(nn.Module):
    """A block behind one of linen's transformations."""

    lift: str

    @nn.compact
    def __call__(self, x):
        transform = {"remat": nn.remat, "jit": nn.jit, "add_metadata": _with_axis}[self.lift]
        return gru(1)(transform(Block)(name="block")(x)[0])


def _with_axis(target):
    return nn.add_metadata_axis(
        target, variable_axes={"params": 0}, metadata_params={nn.PARTITION_NAME: "x"}
    )


class RematScan(nn.Module):
    """Linen's nest of stacks, checkpointed at every level."""

    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(linen.GRULayer, lengths=(2, 9))(WIDE, **options(1, WIDE))(x)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens, hidden):
        x = nn.Embed(5, I, embedding_init=lambda key, shape, _: ones(key, shape))(tokens)
        return gru(0, has_state_inputs=True)(x, hidden)


class Transposed(nn.Module):
    """Leaves that are stored with their axes turned, which no shape and no name could tell."""

    @nn.compact
    def __call__(self, x):
        turn = functools.partial(jax.tree.map, jnp.transpose)
        made = nn.map_variables(linen.GRULayer, "params", turn, turn, init=True, mutable=True)
        return made(3, **options(1, 3), name="turned")(x)


class Busy(nn.Module):
    """Other collections, random numbers of other streams, statistics, static arguments."""

    @nn.compact
    def __call__(self, inputs, train, how, scale=None):
        x, extra = inputs["x"], inputs["extra"][0]
        with strict_off():
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x + jax.random.normal(self.make_rng("noise"), x.shape, x.dtype)
        self.variable("cache", "steps", lambda: jnp.zeros((3,), int))
        self.sow("intermediates", "x", x)
        x = gru(0, stateful=how == "stateful")(x) if how else x
        return x + extra[:, None] + (0 if scale is None else scale)


class SharedScope(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = gru(1)
        nn.share_scope(self, layer)
        self.param("gain", ones, (3,))
        return layer(x)


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        one, two = gru(0), gru(1)
        if self.is_initializing():
            one(x), two(x)
        return nn.cond(True, lambda m, x: one(x), lambda m, x: two(x), self, x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        with strict_off():
            return nn.WeightNorm(gru(1))(x)


CASES = {  # model, number of its GRUs, inputs
    "layer": (lambda: gru(0), 1),
    "6H bias": (lambda: gru(0, reset_gate_mode=MODES[2]), 1),
    "one unit": (lambda: gru(1, 1), 1),
    "bfloat16": (lambda: gru(0, param_dtype=jnp.bfloat16), 1),
    "projected": (lambda: gru(0, 4, linen.GRUProjectedLayer, output_projector_size=2,
                              input_projector_size=1), 1),
    "one projector": (lambda: gru(1, 4, output_projector_size=2), 1),
    "sequential": (lambda: nn.Sequential([gru(0), Dense(5), gru(1, 3), nn.relu]), 2),
    "compact": (Middle, 2),
    "setup": (Setup, 4),
    "nested": (lambda: Nested(gru(1)), 3),
    "twice": (Twice, 1),
    "rnn": (Rnn, 3),
    "bidirectional": (lambda: linen.BidirectionalGRULayer(H, **options(1)), 2),
    "sub-class": (lambda: Gained(H, **options(0)), 2),
    "scan 0": (lambda: Scan(4), 2),
    "scan 1": (lambda: Scan(4, 1), 2),
    "scan -1": (lambda: Scan(4, -1), 2),
    "scan broadcast": (lambda: Scan(4, None), 2),
    "scan 0 of 3H": (lambda: Scan(9), 2),
    "scan 1 of 3H": (lambda: Scan(9, 1), 2),
    "scan -1 of 3H": (lambda: Scan(9, -1), 2),
    "scan 1 of H": (lambda: Scan(WIDE, 1), 2),
    "scan 1 of 1": (lambda: Scan(1, 1), 2),
    "scan of projected": (lambda: Scan(9, 1, Block, (("projected", True), ("which", 1))), 2),
    "scan of boxed": (lambda: Scan(3, 0, Block, (("boxed", True),)), 2),
    "scan of scan": (lambda: Scan(9, 0, Inner), 2),
    "scan 1 of scan -1": (lambda: Scan(9, 1, Inner, (("length", 9), ("axis", -1))), 2),
    "scan of vmap": (lambda: Scan(9, 1, OfVmap), 2),
    "scan of rnn and bidirectional": (lambda: Scan(9, 1, OfRnn), 4),
    "scan 0 by function": (lambda: ByFunction(0), 1),
    "scan 1 by function": (lambda: ByFunction(1), 1),
    "vmap 0": (lambda: vmapped(linen.GRULayer)(H, **options(1)), 1, MANY),
    "vmap 1": (lambda: vmapped(linen.GRULayer, 1)(H, **options(0)), 1, MANY),
    "vmap -1": (lambda: vmapped(linen.GRULayer, -1)(H, **options(0)), 1, MANY),
    "vmap of others": (lambda: vmapped(Block, 1)(), 1, ones(None, (9, B, T, I))),
    "remat": (lambda: Lifted("remat"), 2),
    "remat_scan": (RematScan, 1),
    "jit": (lambda: Lifted("jit"), 2),
    "tokens": (Tokens, 1, jnp.ones((B, T), "int32"), X[:, 0, :H]),
    "metadata axis": (lambda: Lifted("add_metadata"), 2),
    "map_variables": (Transposed, 1),
    "share_scope": (SharedScope, 1),
    "cond": (Branches, 2),
    "weight norm": (Normed, 1),
    "busy": (Busy, 1, {"x": X, "extra": (X[:, 0, :1],)}, True, "yes"),
    "stateful, four inputs": (Busy, 1, {"x": X, "extra": [X[:, 0, :1]]}, False, "stateful",
                              X[:1, :, :1]),
    "no GRU": (Busy, 0, {"x": X, "extra": (X[:, 0, :1],)}, True, None),
    "no parameters": (lambda: nn.Sequential([nn.relu]), 0),
}  # fmt: skip


def linen_case(name):
    make, layers, *inputs = CASES[name]
    model, inputs = make(), inputs or [X]
    params = _init(model, inputs)
    return model, params, inputs, layers


def _init(model, inputs):
    """The parameters; compiled, so that nothing but the initialisers runs."""
    arrays = {n: x for n, x in enumerate(inputs) if not isinstance(x, bool | str | None)}

    def init(key, arrays):
        filled = [arrays.get(n, x) for n, x in enumerate(inputs)]
        return model.init(key, *filled).get("params", {})

    return jax.jit(init)(jax.random.key(0), arrays)


@pytest.mark.parametrize("name", CASES)
def test_linen(name):
    model, params, inputs, layers = linen_case(name)
    for kind, factors_of in FUNCTIONS.items():
        assert_factors(params, factors_of(model, params, *inputs), kind, layers)


@pytest.mark.parametrize("name", ["scan 1 of 3H", "busy", "scan of boxed"])
def test_shapes_do_as_well_as_arrays(name):
    model, params, inputs, _ = linen_case(name)
    shapes = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: a if isinstance(a, bool | str) else jax.ShapeDtypeStruct(a.shape, a.dtype), tree
    )
    for factors_of in FUNCTIONS.values():
        expected = factors_of(model, params, *inputs)
        for given in ((params, shapes(inputs)), (shapes(params), inputs)):
            got = factors_of(model, given[0], *given[1])
            assert jax.tree.structure(got) == jax.tree.structure(expected)
            jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_frozen_dicts():
    model, params, inputs, layers = linen_case("compact")
    frozen = FrozenDict(params)
    factors = optim.learn_rate_factors(model, frozen, *inputs)
    assert isinstance(factors, FrozenDict)
    assert_factors(frozen, factors, "learn_rate_factor", layers)


def test_boxes_stay():
    model, params, inputs, _ = linen_case("scan of boxed")
    box = params["stack"]["gru"]["recurrent_weights"]
    assert isinstance(box, nn.Partitioned)
    assert box.names == ("stack", "rows", None)
    boxed = optim.learn_rate_factors(model, params, *inputs)
    bare = optim.learn_rate_factors(model, nn.meta.unbox(params), *inputs)
    assert isinstance(boxed["stack"]["gru"]["recurrent_weights"], nn.Partitioned)
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(boxed), bare)
    # either tree of factors serves either tree of parameters
    ones = lambda tree: jax.tree.map(jnp.ones_like, tree)  # noqa: E731
    for factors in (boxed, bare):
        tx = optim.scale_by_learn_rate_factors(factors)
        one, two = (tx.update(ones(t), tx.init(t))[0] for t in (params, nn.meta.unbox(params)))
        jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(one), two)
        for u, f in zip(jax.tree.leaves(two), jax.tree.leaves(bare), strict=True):
            np.testing.assert_array_equal(u, np.broadcast_to(f, u.shape))


@pytest.mark.parametrize("stacked", [False, True])
def test_projected_by_hand(stacked):
    """Projectors among the parameters of a model whose options know none."""
    model = Scan(9, 1) if stacked else nn.Sequential([gru(0, WIDE)])
    params = _init(model, [X])
    where = ("stack", "gru") if stacked else ("layers_0",)
    layer = functools.reduce(dict.__getitem__, where, params)
    stack = (9,) * stacked
    gates = np.arange(3).repeat(WIDE).reshape(-1, *[1] * len(stack), 1)
    layer |= {
        "recurrent_weights": gates + np.zeros((3 * WIDE, *stack, 2)),
        "input_weights": gates + np.zeros((3 * WIDE, *stack, 1)),
        "output_projector": np.zeros((WIDE, *stack, 2)),
        "input_projector": np.zeros((I, *stack, 1)),
    }
    for kind, factors_of in FUNCTIONS.items():
        assert_factors(params, factors_of(model, params, X), kind, 1 + stacked)


def test_parameters_of_the_core_in_a_linen_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            mine = self.param("mine", lambda key: gru_jax.init_params(key, H, I))
            return gru(1)(gru_jax.gru(mine, x)[0])

    params = _init(Model(), [X])
    assert isinstance(params["mine"], gru_jax.GRUParams)
    rates, l2 = (f(Model(), params, X) for f in FUNCTIONS.values())
    assert rates["mine"].arrays() == {"input_weights": 1.0, "recurrent_weights": 1.0, "bias": 1.0}
    assert l2["mine"].arrays() == {"input_weights": 1.0, "recurrent_weights": 1.0, "bias": 0.0}
    rest = [{"GRULayer_0": tree["GRULayer_0"]} for tree in (params, rates, l2)]
    assert_factors(rest[0], rest[1], "learn_rate_factor", 1)
    assert_factors(rest[0], rest[2], "l2_factor", 1)


def test_names_alone_are_no_gru():
    """A foreign module with two of the three names, and projectors of its own."""

    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("bias", "input_weights", "input_projector"):
                self.param(name, ones, (9,) if name == "bias" else (9, 3))
            return gru(1)(x)

    model = Foreign()
    params = _init(model, [X])
    ranks = {"bias": 1, "input_weights": 2, "input_projector": 2}
    for kind, factors_of in FUNCTIONS.items():
        assert_factors(params, factors_of(model, params, X), kind, 1, ranks)


def test_others():
    model, params, inputs, layers = linen_case("scan 1")
    seen = {}

    def others(path, leaf):
        seen[path] = leaf
        return np.float32(0.25) if path[-1] == "kernel" else 3

    for kind, factors_of in FUNCTIONS.items():
        factors = factors_of(model, params, *inputs, others=others)
        got = {path: np.unique(f).tolist() for path, f in flat(factors).items()}
        assert {p: got[p] for p in seen} == {p: [0.25 if "kernel" in p else 3.0] for p in seen}
        own = {"stack": {"gru": factors["stack"]["gru"]}}
        assert_factors({"stack": {"gru": params["stack"]["gru"]}}, own, kind, layers - 1)
    dense = [("stack", "Dense_0", name) for name in ("bias", "kernel")]
    assert sorted(seen) == [*dense, *(("stack", n) for n in ("cube", "scale"))]
    assert all(seen[path] is flat(params)[path] for path in seen)


programs = []  # names of what was compiled or run by XLA
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: programs.append(name) if "backend_compile" in name else None
)


def test_a_huge_linen_model_is_never_made():
    """Factors of a terabyte of learnables, without a compiled program and without an array."""
    units, length = 2**14, 100

    class Huge(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return linen.GRULayer(units, bias_learn_rate_factor=(1, 0, 1), name="g")(x), None

    model = scanned(Huge, length, 1)()
    x = jax.ShapeDtypeStruct((4, 1000, units), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    shapes = jax.eval_shape(model.init, key, x)["params"]
    assert gru_jax.num_learnables(shapes) > 1e11
    before, held = len(programs), len(jax.live_arrays())
    factors = optim.learn_rate_factors(model, shapes, x)
    l2 = optim.l2_factors(model, shapes, x)
    assert len(programs) == before
    assert len(jax.live_arrays()) <= held
    assert factors["g"]["bias"].shape == (3 * units, 1)
    assert factors["g"]["bias"][units : 2 * units].max() == 0
    assert max(a.size for a in jax.tree.leaves((factors, l2))) == 3 * units


# nnx


class Deep(nnx.Module):
    """Layers in lists, dicts, sequences and modules."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        make = lambda which: nnx_gru(which)  # noqa: E731
        self.list = nnx.List([make(0), nnx.Linear(2, 2, rngs=rngs), nnx.List([make(1)])])
        self.dict = nnx.Dict(a=make(1), b=nnx.Dict(c=make(0)))
        self.sequence = nnx.Sequential(make(0), nnx.relu, nnx.BatchNorm(H, rngs=rngs))
        self.rnn = nnx.RNN(nnx_gru(1, gru_jax.nnx.GRUCell), rngs=rngs)
        cells = [nnx.RNN(nnx_gru(k, gru_jax.nnx.GRUCell), rngs=rngs) for k in range(2)]
        self.both = nnx.Bidirectional(*cells, rngs=rngs)
        self.own = gru_jax.nnx.BidirectionalGRULayer(H, input_size=I, rngs=rngs, **options(1))


class Shared(nnx.Module):
    """One layer in three places, of which the state knows one."""

    def __init__(self):
        self.z = nnx.Dict(deep=nnx_gru(1))
        self.a = nnx.Dict(deep=nnx.List([self.z["deep"]]))
        self.b = self.z["deep"]


class Tied(nnx.Module):
    """Two layers with one learnable in common."""

    def __init__(self):
        self.a, self.b = nnx_gru(0), nnx_gru(0)
        self.b.bias = self.a.bias


class Gain(gru_jax.nnx.GRULayer):
    """A user's own layer."""

    def __post_init__(self, rngs):
        super().__post_init__(rngs)
        self.gain, self.inner = nnx.Param(jnp.ones(3)), nnx_gru(1)


def nnx_gru(which=0, cls=gru_jax.nnx.GRULayer, units=H, **others):
    rngs = nnx.Rngs(0)
    return cls(units, input_size=I, rngs=rngs, **options(which, units), **others)


def projected(which, **others):
    sizes = {"output_projector_size": 2, "input_projector_size": 1}
    return nnx_gru(which, gru_jax.nnx.GRUProjectedLayer, 4, **sizes, **others)


def nnx_stack(length, axis, make=nnx_gru):
    return nnx.vmap(
        lambda n: make(1), in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0})
    )(jnp.arange(length))


def by_assignment():
    """A dense layer that was projected by hand."""
    layer = nnx_gru(0, units=4)
    layer.recurrent_weights = nnx.Param(layer.recurrent_weights[..., :2])
    layer.output_projector = jnp.zeros((4, 2))
    return layer


NNX_CASES = {
    "layer": (nnx_gru, 1),
    "6H bias": (lambda: nnx_gru(1, reset_gate_mode=MODES[2]), 1),
    "projected": (lambda: projected(0), 1),
    "projected by hand": (by_assignment, 1),
    "list": (lambda: nnx.List([nnx_gru(0), nnx_gru(1)]), 2),
    "dict": (lambda: nnx.Dict(a=nnx_gru(0)), 1),
    "deep": (Deep, 10),
    "shared": (Shared, 1),
    "tied": (Tied, 2),
    "sub-class": (lambda: Gain(H, input_size=I, rngs=nnx.Rngs(0), **options(0)), 2),
    "no GRU": (lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 0),
    "stack 0": (lambda: nnx_stack(4, 0), 1),
    "stack 0 of 3H": (lambda: nnx_stack(6, 0), 1),
    "stack 0 of H": (lambda: nnx_stack(H, 0), 1),
    "stack 1": (lambda: nnx_stack(4, 1), 1),
    "stack 1 of H": (lambda: nnx_stack(H, 1), 1),
    "stack -1": (lambda: nnx_stack(4, -1), 1),
    "stack of projected": (lambda: nnx_stack(4, 1, projected), 1),
    "stack of 6H": (lambda: nnx_stack(6, 0, lambda k: nnx_gru(k, reset_gate_mode=MODES[2])), 1),
    "stack of shared": (lambda: nnx_stack(6, 0, lambda _: Shared()), 1),
}


def made(name):
    with strict_off():
        return NNX_CASES[name][0]()


@pytest.mark.parametrize("name", NNX_CASES)
def test_nnx(name):
    model, layers = made(name), NNX_CASES[name][1]
    state = nnx.state(model, nnx.Param)
    for kind, factors_of in FUNCTIONS.items():
        for params in (None, state):
            assert_factors(state, factors_of(model, params), kind, layers)


@pytest.mark.parametrize("name", ["deep", "stack 1"])
def test_nnx_state_in_other_forms(name):
    model, layers = made(name), NNX_CASES[name][1]
    _, split, _ = nnx.split(model, nnx.Param, ...)
    pure = nnx.to_pure_dict(split)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), pure)
    assert_factors(split, optim.l2_factors(model, split), "l2_factor", layers)
    for tree in (pure, shapes):
        factors = optim.l2_factors(model, tree)
        assert_factors(pure, factors, "l2_factor", layers)
    abstract = nnx.eval_shape(NNX_CASES[name][0]) if name == "deep" else model
    assert_factors(split, optim.l2_factors(abstract, None), "l2_factor", layers)


def test_nnx_in_tree_mode():
    with nnx.set_graph_mode(False):
        model = nnx.Sequential(nnx_gru(0), nnx.List([nnx_gru(1), projected(0)]))
        state = nnx.state(model, nnx.Param)
        for kind, factors_of in FUNCTIONS.items():
            assert_factors(state, factors_of(model, None), kind, 3)


def test_tied_learnables_of_nnx_are_counted_once():
    state = nnx.state(made("tied"), nnx.Param)
    assert sorted(map("/".join, flat(state))) == [
        "a/bias", "a/input_weights", "a/recurrent_weights", "b/input_weights", "b/recurrent_weights"
    ]  # fmt: skip
    tx = optim.scale_by_learn_rate_factors(optim.learn_rate_factors(made("tied"), None))
    with pytest.raises(ValueError, match="no factor for the leaf 'b/bias'"):
        tx.update({"b": {"bias": jnp.ones(6)}}, None)


# GRUParams


def core(units=H, mode=MODES[2], **others):
    return gru_jax.init_params(jax.random.key(0), units, I, reset_gate_mode=mode, **others)


def blocks(value, shape, axis, units):
    """A factor array of full shape, by explicit blocks of rows."""
    if np.ndim(value) == 0:
        return np.full(shape, value)
    array = np.full(shape, np.nan)
    for block in range(shape[axis] // units):
        rows = [slice(None)] * len(shape)
        rows[axis] = slice(block * units, (block + 1) * units)
        array[tuple(rows)] = value[block % 3]
    assert not np.isnan(array).any()
    return array


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stack", [(), (6,), (9, 2)])
def test_gate_factors(stack, mode):
    params = core(mode=mode, input_projector_size=2, output_projector_size=1)
    params = jax.tree.map(lambda a: jnp.broadcast_to(a, (*stack, *a.shape)), params)
    given = {name: values[0] for name, values in LEARN_RATE.items()}
    given["bias"] = np.asarray(given["bias"], np.float32)  # arrays and lists are triples too
    given["input_weights"] = list(given["input_weights"])
    factors = optim.gate_factors(params, **given)
    assert jax.tree.structure(factors) == jax.tree.structure(params)
    for leaf in LEAVES:
        factor, array = getattr(factors, leaf.name), getattr(params, leaf.name)
        assert factor.dtype == np.float64
        axis = array.ndim - (1 if leaf.name == "bias" else 2)
        expected = blocks(given[leaf.name], array.shape, axis, H)
        np.testing.assert_array_equal(np.broadcast_to(factor, array.shape), expected)
    ones = optim.gate_factors(params)
    assert all(f.shape == () and f == 1 for f in jax.tree.leaves(ones))


@pytest.mark.parametrize("wrap", [
    lambda p: p,
    lambda p: {"a": p, "b": [p, (p, {"c": p})], "n": None},
    lambda p: jax.vmap(lambda k: core(output_projector_size=1))(jnp.arange(6)),
    lambda p: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), p),
])  # fmt: skip
def test_trees_of_the_core(wrap):
    tree = wrap(core(output_projector_size=1))
    rates, l2 = (f(None, tree) for f in FUNCTIONS.values())
    assert jax.tree.structure(rates) == jax.tree.structure(l2) == jax.tree.structure(tree)
    assert all(f == 1 for f in jax.tree.leaves(rates))
    assert {p[-1]: float(f) for p, f in flat(l2).items()} == {
        "input_weights": 1.0, "recurrent_weights": 1.0, "bias": 0.0, "output_projector": 1.0
    }  # fmt: skip


def test_others_beside_the_core():
    tree = {"p": core(), "w": jnp.ones((2, 2)), "v": jnp.ones(2), "s": jnp.ones(()), "e": {}}
    l2 = optim.l2_factors(None, tree)
    assert (l2["w"], l2["v"], l2["s"], l2["e"]) == (1, 0, 0, {})
    assert l2["p"].bias == 0
    assert optim.learn_rate_factors(None, tree, others=lambda p, a: 7 * len(p))["v"] == 7
    for empty in ({}, [], None):
        assert optim.learn_rate_factors(None, empty) == empty


# Training


def frozen_by_table(before, after, kind="learn_rate_factor"):
    """Asserts that what has learn-rate factor 0 kept its bits, and that all else moved."""
    for path, old in flat(before).items():
        new = np.asarray(flat(after)[path])
        is_gru = path[-1] in LEAF_NAMES and (*path[:-1], "recurrent_weights") in flat(before)
        rate = by_gate(TABLES[kind][path[-1]], old) if is_gru else np.ones(np.shape(old))
        moved = new.view(f"i{new.dtype.itemsize}") != np.asarray(old).view(f"i{new.dtype.itemsize}")
        np.testing.assert_array_equal(moved, rate != 0, str(path))


def noisy(tree, seed=3):
    """Gradients like a tree of parameters, none of them 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(1, 2, np.shape(a)), a.dtype), tree)


@pytest.mark.parametrize("solver", ["sgdm", "adam", "rmsprop"])
@pytest.mark.parametrize("name", ["compact", "scan 1 of 3H", "scan of boxed", "map_variables"])
def test_train_state_keeps_frozen_rows(name, solver):
    """Under jit, with parameters as a dict; one program serves every step."""
    model, params, inputs, _ = linen_case(name)
    traces = []

    @jax.jit
    def step(state, g):
        traces.append(0)
        return state.apply_gradients(grads=g)

    with strict_off():
        tx = optim.training_solver(
            solver, model, params, *inputs, learning_rate=0.1, gradient_threshold=1.0
        )
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        for n in range(3):
            state = step(state, noisy(params, n))
    assert len(traces) == 1
    frozen_by_table(params, state.params)


@pytest.mark.parametrize("solver", ["sgdm", "adam"])
@pytest.mark.parametrize("name", ["deep", "shared", "tied", "stack 1", "projected"])
def test_nnx_optimizer_keeps_frozen_rows(name, solver):
    model = made(name)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    tx = optim.training_solver(solver, model, None, learning_rate=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, g):
        traces.append(0)
        optimizer.update(model, g)

    with strict_off():
        for n in range(3):
            step(model, optimizer, noisy(before, n))
    assert len(traces) <= 2  # the optimiser's own step counter may lose its weak type
    frozen_by_table(before, nnx.state(model, nnx.Param))


def test_nnx_gradients_of_a_loss():
    """What nnx.grad returns goes straight into the solver; NaN in frozen rows stays out."""
    model = nnx.Sequential(nnx_gru(0, units=I), nnx_gru(1))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    with strict_off():
        optimizer = nnx.Optimizer(model, optim.training_solver("adam", model, None), wrt=nnx.Param)
        gradients = nnx.jit(nnx.grad(lambda m: m(X).sum()))(model)
        bad = jnp.where(
            by_gate(LEARN_RATE["recurrent_weights"], before["layers"][0]["recurrent_weights"][...])
            == 0,
            jnp.nan,
            1.0,
        )
        gradients["layers"][0]["recurrent_weights"][...] = bad.astype("float32")
        nnx.jit(lambda o, m, g: o.update(m, g))(optimizer, model, gradients)
    after = nnx.state(model, nnx.Param)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(after))
    old, new = (flat(t)["layers", "0", "recurrent_weights"] for t in (before, after))
    np.testing.assert_array_equal(new[:I], old[:I])
    assert (new[I:] != old[I:]).all()


def scaling(name="compact"):
    """Random gradients of a model, its factors and the product that is expected."""
    model, params, inputs, _ = linen_case(name)
    factors = optim.learn_rate_factors(model, params, *inputs)
    g = noisy(params)
    return params, factors, g, jax.tree.map(lambda a, f: np.asarray(a) * f.astype("f"), g, factors)


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=3e-7), tree, expected)


def test_masked_and_partitioned_trees_of_a_model():
    _, factors, g, scaled = scaling()
    tx = optim.scale_by_learn_rate_factors(factors)
    mask = {name: "GRU" in name for name in g}
    expected = {name: (scaled if mask[name] else g)[name] for name in g}
    assert_equal(optax.masked(tx, mask).update(g, optax.masked(tx, mask).init(g))[0], expected)

    labels = {name: "gru" if mask[name] else "rest" for name in g}
    split = optax.partition({"gru": tx, "rest": optax.set_to_zero()}, labels)
    zeros = jax.tree.map(np.zeros_like, g)
    expected = {name: (scaled if mask[name] else zeros)[name] for name in g}
    assert_equal(split.update(g, split.init(g))[0], expected)


@pytest.mark.parametrize("solver", ["sgdm", "adam", "rmsprop"])
def test_states_pass_through_trees_and_maps(solver):
    """As checkpoints and shardings of optimiser states do it."""
    model, params, inputs, _ = linen_case("compact")
    with strict_off():
        tx = optim.training_solver(solver, model, params, *inputs, gradient_threshold=1.0)
        state = tx.init(params)
        tracked = optax.tree.map_params(tx, lambda leaf: "param", state)
        leaves, structure = jax.tree.flatten(state)
        copy = jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])
        update = jax.jit(tx.update)
        one, two = (update(noisy(params), s, params)[0] for s in (state, copy))
    copies = 2 if solver == "adam" else 1
    found = [leaf for leaf in jax.tree.leaves(tracked) if isinstance(leaf, str)]
    assert len(found) == copies * len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    ids = {id(leaf) for leaf in jax.tree.leaves(state)}
    assert not ids & {id(leaf) for leaf in jax.tree.leaves(params)}


def test_every_few_steps_of_a_model():
    """Accumulated gradients: only the last of three steps moves, and freezes what it must."""
    model, params, inputs, _ = linen_case("compact")
    with strict_off():
        tx = optax.MultiSteps(optim.training_solver("adam", model, params, *inputs), 3)
        state, moved, update = tx.init(params), params, jax.jit(tx.update)
        for n in range(3):
            updates, state = update(noisy(params, n), state, moved)
            assert any(u.any() for u in jax.tree.leaves(updates)) == (n == 2)
            moved = optax.apply_updates(moved, updates)
    frozen_by_table(params, moved)


def test_ensembles():
    """One solver for all members, by `jax.vmap` over its update."""
    model, params, inputs, _ = linen_case("scan 1 of 3H")
    stack = lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)  # noqa: E731
    members = [noisy(params, n) for n in range(2)]
    with strict_off():
        tx = optim.training_solver("adam", model, params, *inputs, gradient_threshold=1.0)
        step = lambda g, p: tx.update(g, tx.init(p), p)[0]  # noqa: E731
        together = jax.jit(jax.vmap(step))(stack(*members[::-1]), stack(*members))
        alone = [jax.jit(step)(g, p) for g, p in zip(members[::-1], members, strict=True)]
    assert_equal(together, stack(*alone))


def test_derivatives_by_learn_rate_factors():
    """Factors may be traced: how the loss after a step depends on each gate's factor."""
    params, g = core(mode=MODES[0]), noisy(core(mode=MODES[0]))

    def after(per_gate):
        rows = jnp.repeat(per_gate, H)
        factors = jax.tree.map(jnp.ones_like, params).replace(recurrent_weights=rows[:, None])
        tx = optim.training_solver(
            "sgdm", None, params, learning_rate=0.5, l2_regularization=0.0,
            learn_rate_factors=factors,
        )  # fmt: skip
        updates, _ = tx.update(g, tx.init(params), params)
        return optax.apply_updates(params, updates).recurrent_weights.sum()

    triple = jnp.asarray([0.5, 2.0, 1.0], jnp.float32)
    sums = np.asarray(g.recurrent_weights).reshape(3, -1).sum(1)
    for gradient in (jax.grad(after)(triple), jax.jit(jax.grad(after))(triple)):
        np.testing.assert_allclose(gradient, -0.5 * sums, rtol=1e-6)
    moved = jax.vmap(after)(jnp.stack([triple, triple * 0]))
    np.testing.assert_allclose(moved[1], params.recurrent_weights.sum(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moved[0] - moved[1], -0.5 * triple @ sums, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("method", ["l2norm", "global-l2norm", "absolute-value"])
def test_sharded_parameters(method, kind):
    """Four devices give what one gives, and every update lies where its parameter lies."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    params = core(4)
    g = noisy(params)
    tx = optim.training_solver(
        "rmsprop", None, params, gradient_threshold=0.5, gradient_threshold_method=method,
        learn_rate_factors=optim.gate_factors(params, recurrent_weights=(0, 1, 2), bias=(1, 0, 3)),
    )  # fmt: skip
    put = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("rows"))), tree
    )
    with strict_off():
        expected, _ = jax.jit(tx.update)(g, tx.init(params), params)
        with jax.set_mesh(mesh):
            state = tx.init(put(params))
            updates, state = jax.jit(tx.update)(put(g), state, put(params))
    assert all(u.sharding.spec[0] == "rows" for u in jax.tree.leaves(updates))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), updates, expected)
    assert not np.asarray(updates.recurrent_weights)[:4].any()


# Hostile values


def clipped(g, threshold=1.0):
    tx = optim.clip_by_l2_norm(threshold)
    one, two = tx.update(g, tx.init(g))[0], jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g)
    return [np.asarray(a) for a in (one, two)]


@pytest.mark.parametrize("value", [1e-30, 1e25, 4e37])
def test_clip_of_extreme_gradients(value):
    g = jnp.full(4, value, jnp.float32)
    for got in clipped(g):
        np.testing.assert_allclose(got, 0.5 if value > 1 else g, rtol=1e-6)


@pytest.mark.parametrize(("value", "size"), [(1e38, 4), (3e38, 90000)])
def test_clip_of_the_largest_gradients(value, size):
    for got in clipped(jnp.full(size, value, jnp.float32)):
        np.testing.assert_allclose(got, size**-0.5, rtol=1e-5)


def test_clip_of_complex_gradients():
    for got in clipped(jnp.asarray([3.0, 4.0j], jnp.complex64)):
        np.testing.assert_allclose(got, [0.6, 0.8j], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_clip_of_nothing_and_of_numbers(shape):
    for got in clipped(jnp.full(shape, 3.0)):
        np.testing.assert_array_equal(got, np.ones(shape))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_clip_keeps_the_type(dtype):
    g = {"a": jnp.full(4, 6e4, dtype), "b": jnp.full(4, 0.125, dtype)}
    tx = optim.clip_by_l2_norm(1)
    got, _ = tx.update(g, tx.init(g))
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in g.items()}
    np.testing.assert_array_equal(got["a"], np.full(4, 0.5))
    np.testing.assert_array_equal(got["b"], g["b"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_gradients_stay_visible_and_alone(value):
    """One array's NaN is no other's, and is not clipped away."""
    g = {"a": jnp.asarray([value, 1.0]), "b": jnp.asarray([3.0, 4.0])}
    tx = optim.clip_by_l2_norm(1.0)
    got, _ = tx.update(g, tx.init(g))
    assert not np.isfinite(got["a"]).all()
    np.testing.assert_allclose(got["b"], [0.6, 0.8])


def test_none_and_masked_leaves_pass():
    tree = {"a": jnp.ones(2), "none": None, "masked": optax.MaskedNode(), "empty": {}}
    for tx in (
        optim.scale_by_learn_rate_factors({"a": np.asarray([0.5, 0.0])}),
        optim.add_l2_regularization(1.0, {"a": np.asarray([0.5, 0.0])}),
        optim.clip_by_l2_norm(0.1),
        optim.sgdm(0.1),
    ):
        got, _ = tx.update(tree, tx.init(tree), tree)
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        assert got["a"].shape == (2,)
        assert (got["a"] != tree["a"]).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_factors_take_the_type_of_the_leaf(dtype):
    one, bad = (jnp.asarray([3.0, -0.0, last], dtype) for last in (5.0, np.nan))
    factors = np.asarray([0.5, 1.0, 0.0])
    scale = optim.scale_by_learn_rate_factors(factors)
    got, _ = scale.update(bad, scale.init(one))
    assert got.dtype == one.dtype
    np.testing.assert_array_equal(got, np.asarray([1.5, 0, 0]))
    decay = optim.add_l2_regularization(2.0, factors)
    got, _ = decay.update(one, decay.init(one), bad)
    assert got.dtype == one.dtype
    np.testing.assert_array_equal(got, np.asarray([6.0, 0, 5.0]))


def test_integer_leaves_have_factors():
    tree = {"p": core(), "steps": jnp.arange(3), "key": jax.random.key(0)}
    rates, l2 = (f(None, tree) for f in FUNCTIONS.values())
    assert (rates["steps"], l2["steps"], rates["key"], l2["key"]) == (1, 0, 1, 0)


# Mistakes


def of(model, params, *inputs, **others):
    return lambda: optim.learn_rate_factors(model, params, *inputs, **others)


def gates(**factors):
    return lambda: optim.gate_factors(core(), **factors)


def scale(factors, update=None):
    def run():
        tx = optim.scale_by_learn_rate_factors(factors)
        g = {"a": jnp.ones((6, 3))} if update is None else update
        return tx.update(g, tx.init(g))

    return run


def l2_without_params():
    tx = optim.add_l2_regularization(0.1, 1.0)
    return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def leaves(units=H, lead=(), **others):
    """Parameters of a layer as a dict."""
    arrays = {
        "input_weights": ones(None, (*lead, 3 * units, I)),
        "recurrent_weights": ones(None, (*lead, 3 * units, units)),
        "bias": ones(None, (*lead, 3 * units)),
    }
    return arrays | others


class Lookalike(nn.Module):
    """No GRU of this library, with all the names of its leaves."""

    @nn.compact
    def __call__(self, x):
        for name, array in leaves().items():
            self.param(name, ones, array.shape)
        return x


class ForeignNNX(nnx.Module):
    def __init__(self):
        for name, array in leaves().items():
            setattr(self, name, nnx.Param(array))


layer = linen.GRULayer(H)
NONNEGATIVE = "must be a nonnegative number or three of them (reset, update, candidate), got "
PROJECTOR = "a projector serves all three gates, so it takes no triple, got "
UNOWNED = "but no layer of this model owns them"
NUMBER = "must be a nonnegative number"
MISTAKES = {
    "no inputs": (of(layer, leaves()), ValueError, "inputs are missing", "model.init", "Shape"),
    "a class": (of(linen.GRULayer, {}), TypeError, "model must be a linen or nnx module", "type"),
    "a function": (of(len, {}), TypeError, "or None for a tree that holds GRUParams, got builtin"),
    "params in model's place": (of(core(), None), TypeError, "got GRUParams"),
    "variables": (of(layer, {"params": leaves()}, X), ValueError, "lack ['bias', 'input_weights'",
                  "have ['params/bias'", "Pass variables['params']"),
    "no params in linen": (of(layer, None, X), ValueError, "do not belong", "lack ['bias'"),
    "a missing leaf": (of(Middle(), {"GRULayer_0": leaves()}, X), ValueError, "Dense_0/bias"),
    "an unknown leaf": (of(layer, leaves(weight=jnp.ones(1)), X), ValueError, "have ['weight']"),
    "another size": (of(linen.GRULayer(3), leaves(), X), ValueError, "'bias' must have shape (9,)",
                     "for these inputs, got (6,)"),
    "another mode": (of(layer, leaves(bias=jnp.ones(12)), X), ValueError, "do not belong",
                     "'bias' must have shape (6,) for these inputs, got (12,)"),
    "no stack": (lambda: of(Scan(4), {"stack": _init(Block(), [X]), "GRULayer_0": leaves()}, X)(),
                 ValueError, "'stack/Dense_0/bias' must have shape (4, 3) for these inputs, got"),
    "nnx of another size": (lambda: of(nnx_gru(units=3), leaves())(), ValueError,
                            "must have 9 rows"),
    "a look-alike in linen": (of(Lookalike(), leaves(), X), ValueError, "the parameters at ''",
                              UNOWNED, "must be called by model.init"),
    "a look-alike in nnx": (lambda: of(nnx.Dict(a=ForeignNNX()), None)(), ValueError, "at 'a'",
                            UNOWNED),
    "a look-alike without a model": (of(None, {"a": leaves()}), ValueError, "at 'a'",
                                     "give GRUParams, not a dict"),
    "nnx of another path": (lambda: of(nnx_gru(), {"a": leaves()})(), ValueError, "do not belong",
                            "have ['a/bias'", "nnx.state(model, nnx.Param)"),
    "gate_factors of a dict": (lambda: optim.gate_factors(leaves()), TypeError,
                               "params must be a gru_jax.GRUParams, got dict"),
    "negative": (gates(bias=-1), ValueError, f"bias {NONNEGATIVE}-1"),
    "negative in a triple": (gates(bias=(1, -1, 1)), ValueError, f"bias {NONNEGATIVE}(1, -1, 1)"),
    "NaN": (gates(input_weights=np.nan), ValueError, f"input_weights {NONNEGATIVE}nan"),
    "infinite": (gates(input_weights=(1, 1, np.inf)), ValueError, NONNEGATIVE, "inf"),
    "two": (gates(recurrent_weights=(1, 2)), ValueError, f"recurrent_weights {NONNEGATIVE}(1, 2)"),
    "nested": (gates(bias=[[1, 2, 3]] * 2), ValueError, f"bias {NONNEGATIVE}[[1, 2, 3], [1,"),
    "a word": (gates(bias="frozen"), TypeError, f"bias {NONNEGATIVE}'frozen'"),
    "a flag": (gates(bias=True), TypeError, f"bias {NONNEGATIVE}True"),
    "none": (gates(bias=None), TypeError, f"bias {NONNEGATIVE}None"),
    "a triple for a projector": (gates(input_projector=(1, 1, 1)), ValueError, PROJECTOR),
    "an absent projector": (gates(output_projector=0.5), ValueError,
                            "output_projector is absent in params, so it takes no factor: 0.5"),
    "others negative": (of(None, {"a": {"b": X}}, others=lambda *_: -1), ValueError,
                        f"others(('a', 'b'), ...) {NUMBER}, got -1"),
    "others NaN": (of(None, [X], others=lambda *_: np.nan), ValueError, NUMBER, "got nan"),
    "others without result": (of(None, [X], others=lambda *_: None), TypeError, NUMBER, "None"),
    "others with a triple": (of(None, [X], others=lambda *_: (1, 2, 3)), TypeError, "(1, 2, 3)"),
    "no factor": (scale({"b": 1.0}), ValueError, "no factor for the leaf 'a'", "'b'"),
    "no factors": (scale({}), ValueError, "no factor for the leaf 'a'"),
    "factor negative": (scale({"a": -1.0}), ValueError, "the factor of 'a' must be finite and non",
                        "-1."),
    "factor NaN": (scale({"a": np.asarray([[1], [np.nan]])}), ValueError, "finite and nonnegative"),
    "factor of a wrong shape": (scale({"a": np.ones((5, 1))}), ValueError, "the factor of 'a' must",
                                "broadcast against shape (6, 3), got shape (5, 1)"),
    "factor of too many axes": (scale({"a": np.ones((1, 6, 3))}), ValueError, "shape (1, 6, 3)"),
    "factor of words": (scale({"a": "frozen"}), TypeError, "must be an array, got 'frozen'"),
    "l2 negative": (lambda: optim.add_l2_regularization(-1, 1.0), ValueError, f"l2 {NUMBER}, got"),
    "l2 of words": (lambda: optim.add_l2_regularization("1", 1.0), TypeError, f"l2 {NUMBER}, got"),
    "l2 without params": (l2_without_params, ValueError, "params are missing: call update("),
    "threshold 0": (lambda: optim.clip_by_l2_norm(0), ValueError, "threshold must be a positive"),
    "threshold NaN": (lambda: optim.clip_by_l2_norm(np.nan), ValueError, "positive number", "nan"),
    "threshold None": (lambda: optim.clip_by_l2_norm(None), TypeError, "positive number", "None"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, error, *words = MISTAKES[name]
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    for word in words:
        assert word in str(caught.value)


def test_what_nn_jit_has_traced_is_no_silent_one():
    """The layer in it is either found, with its factors, or missed with an error that says so."""
    model = nn.jit(linen.GRULayer)(H, bias_learn_rate_factor=(1, 0, 2))
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]

    def found():
        try:
            return optim.learn_rate_factors(model, params, X)["bias"].tolist()
        except ValueError as error:
            return re.findall(r"nn\.jit|jax\.clear_caches\(\)", str(error))

    assert found() in ([1, 1, 0, 0, 2, 2], ["nn.jit", "jax.clear_caches()"])


# Rarer models and values


def test_looking_leaves_nothing_behind():
    model = nn.jit(linen.GRULayer)(5)
    shapes = leaves(5)
    optim.learn_rate_factors(model, shapes, X)
    made = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    assert flat(made).keys() == flat(shapes).keys()


def test_training_solver_of_an_nn_jit_model():
    model = nn.jit(linen.GRULayer)(4, bias_learn_rate_factor=(0, 1, 1))
    tx = optim.training_solver("sgdm", model, leaves(4), X)
    updates, _ = tx.update(leaves(4), tx.init(leaves(4)), leaves(4))
    np.testing.assert_array_equal(np.asarray(updates["bias"] == 0).reshape(3, 4).all(1), [1, 0, 0])


class WithHelper(nn.Module):
    """Asks a module that is bound to nothing."""

    def width(self):
        return 3

    @nn.compact
    def __call__(self, x):
        return gru(0, WithHelper(parent=None).width())(x)


class Hyper(nn.Module):
    """Learnables of one GRU made by another layer."""

    @nn.compact
    def __call__(self, x):
        numbers = gru(0)(x).sum()
        made = jax.tree.map(lambda a: a * numbers, leaves())
        made = jax.tree.map(lambda a: a.astype(x.dtype), made)
        return linen.GRULayer(H, parent=None).apply({"params": made}, x)


@pytest.mark.parametrize("model", [WithHelper, Hyper])
def test_modules_outside_the_model(model):
    params = _init(model(), [X])
    factors = optim.learn_rate_factors(model(), params, X)
    assert_factors(params, factors, "learn_rate_factor", 1)


class InnerInit(nn.Module):
    """A GRU that no layer of the model calls, only `init` of another."""

    @nn.compact
    def __call__(self, x):
        self.param("own", lambda key: linen.GRULayer(H, parent=None).init(key, x)["params"])
        return x


def test_init_inside_init():
    params = _init(InnerInit(), [X])
    with pytest.raises(ValueError, match="the parameters at 'own' look like those of a GRU"):
        optim.learn_rate_factors(InnerInit(), params, X)


def test_weight_norm_of_all_leaves():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            with strict_off():
                return nn.WeightNorm(gru(1), variable_filter=None)(x)

    params = _init(Model(), [X])
    factors = optim.learn_rate_factors(Model(), params, X)
    own = [f for path, f in flat(factors).items() if path[-2:] == ("GRULayer_0", "bias")]
    assert np.array_equal(own, [[8, 8, 9, 9, 0, 0]])


class DtypeOf(nn.Module):
    @nn.compact
    def __call__(self, x, dtype):
        return gru(0)(x.astype(dtype))


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.float32])
def test_static_arguments_with_a_shape(dtype):
    params = jax.eval_shape(lambda key: DtypeOf().init(key, X, dtype), jax.random.key(0))["params"]
    assert optim.learn_rate_factors(DtypeOf(), params, X, dtype)["GRULayer_0"]["bias"].size == 6


def test_parameters_of_many_models_are_not_those_of_one():
    model = gru(0)
    params = leaves(lead=(3 * H,))
    with pytest.raises(ValueError, match="bias"):
        optim.learn_rate_factors(model, params, X)


def test_parameters_of_one_layer_are_not_those_of_a_stack():
    params = {"stack": _init(Block(), [X]), "GRULayer_0": leaves()}
    with pytest.raises(ValueError, match="stack"):
        optim.learn_rate_factors(Scan(4, 1), params, X)


def test_a_stack_of_nnx_has_one_axis():
    """Stacks of 3H layers on axis 1: matrices (3H, 3H, H) leave it open, the bias (6H, 3H) not."""
    model = nnx_stack(3 * H, 1, lambda which: nnx_gru(which, reset_gate_mode=MODES[2]))
    state = nnx.state(model, nnx.Param)
    assert_factors(state, optim.learn_rate_factors(model, state), "learn_rate_factor", 1)


def test_no_tracer_outlives_the_look():
    model, params, inputs, _ = linen_case("sequential")
    with jax.checking_leaks():
        jax.eval_shape(model.init, jax.random.key(0), *inputs)  # linen's own leaks nothing
        optim.learn_rate_factors(model, params, *inputs)


def test_parameters_of_another_nnx_model():
    foreign = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="do not belong"):
        optim.learn_rate_factors(nnx.Dict(a=nnx_gru()), foreign)


class HoldsTuple(nnx.Module):
    def __init__(self):
        self.mine = nnx.Param(core())


def test_parameters_of_the_core_in_an_nnx_model():
    l2 = flat(optim.l2_factors(HoldsTuple(), None))
    assert {path[-1]: float(f) for path, f in l2.items()} == {
        "input_weights": 1.0, "recurrent_weights": 1.0, "bias": 0.0
    }  # fmt: skip


def test_boxed_parameters_of_the_core():
    tree = {"gru": nn.Partitioned(core(), (None,))}
    assert sorted(map(float, jax.tree.leaves(optim.l2_factors(None, tree)))) == [0, 1, 1]


@pytest.mark.parametrize("transform", [
    optim.scale_by_learn_rate_factors(0.5), optim.add_l2_regularization(0.5, 1.0),
    optim.clip_by_l2_norm(1.0),
])  # fmt: skip
def test_integers_pass(transform):
    """Nothing learns integers: neither numbers nor the gradients that JAX gives for them."""
    leaves = [jnp.asarray([4, 2]), np.zeros(2, jax.dtypes.float0)]
    got, _ = transform.update(leaves, transform.init(leaves), leaves)
    assert got[0].tolist() == [4, 2]
    assert got[1].dtype == jax.dtypes.float0


def test_threshold_above_the_type():
    for got in clipped(jnp.ones(4, jnp.float32), 1e39):
        np.testing.assert_array_equal(got, np.ones(4))


@pytest.mark.parametrize("matrix", [jnp.ones(6), None])
def test_gate_factors_of_malformed_parameters(matrix):
    params = gru_jax.GRUParams(jnp.ones((6, 3)), matrix, jnp.ones(6))
    with pytest.raises((TypeError, ValueError), match="recurrent_weights"):
        optim.gate_factors(params)


def test_others_must_be_a_function():
    with pytest.raises(TypeError, match="others must be"):
        optim.l2_factors(None, {"a": X}, others=0.5)


def test_widths_of_the_model():
    """Other input sizes and other layers' widths are other models; projected columns are free."""
    params = _init(Middle(), [X])
    wide = jnp.ones((*X.shape[:-1], X.shape[-1] + 1), X.dtype)
    with pytest.raises(ValueError, match=r"do not belong to this model.*input_weights"):
        optim.learn_rate_factors(linen.GRULayer(H), leaves(), wide)
    changed = params | {"Dense_0": {name: a[..., :1] for name, a in params["Dense_0"].items()}}
    with pytest.raises(ValueError, match=r"'Dense_0/.*must have shape"):
        optim.learn_rate_factors(Middle(), changed, X)


def test_clip_at_zero_has_a_derivative():
    jacobian = jax.jacobian(lambda g: optim.clip_by_l2_norm(100.0).update(g, None)[0])
    np.testing.assert_array_equal(jacobian(jnp.zeros(3)), np.eye(3))
    g = jnp.asarray([300.0, 400.0])
    unit = g / 500.0
    expected = 100.0 * (np.eye(2) - np.outer(unit, unit)) / 500.0
    np.testing.assert_allclose(jacobian(g), expected, rtol=0, atol=1e-15)
