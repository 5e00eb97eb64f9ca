"""What bad input gets: one table, tried through the core, linen and nnx, which say the same."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import MODES

import gru_jax
import gru_jax.linen
import gru_jax.nnx

H, I = 5, 3  # noqa: E741
B, T = 2, 4
KEY = jax.random.key(0)
programs = []  # names of what was traced or compiled
jax.monitoring.register_event_duration_secs_listener(
    lambda _, __, **about: programs.append(str(about.get("fun_name")))
)


def runs_of_the_core():
    """How often the core was traced or compiled so far; staging of host arrays does not count."""
    return sum("gru" in name for name in programs)


class Case(NamedTuple):
    """One mistake: options of a layer, arguments of a call, or learnables of a wrong kind."""

    name: str
    error: type
    words: tuple[str, ...]  # what was expected, what came, what to do
    options: Mapping[str, Any] = MappingProxyType({})
    call: Mapping[str, Any] = MappingProxyType({})
    leaves: Mapping[str, Any] = MappingProxyType({})


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def wrong_shape(key, shape, dtype):
    return jnp.zeros((*shape, 1), dtype)


X = zeros(B, T, I)
POSITIVE = "must be a positive integer"
NONNEGATIVE = "must be a nonnegative number"
SIX = ("'glorot', 'he', 'orthogonal', 'narrow-normal', 'zeros', 'ones'",)
PORT = {"has_state_inputs": True}
DOUBLE = {"reset_gate_mode": MODES[2]}

CASES = [
    # options of the layer and of the parameters
    Case("H 0", ValueError, ("num_hidden_units", POSITIVE, "got 0"), {"num_hidden_units": 0}),
    Case("H -3", ValueError, ("num_hidden_units", POSITIVE, "got -3"), {"num_hidden_units": -3}),
    Case("H 2.5", TypeError, ("num_hidden_units", POSITIVE, "2.5"), {"num_hidden_units": 2.5}),
    Case("H str", TypeError, ("num_hidden_units", POSITIVE, "'5'"), {"num_hidden_units": "5"}),
    Case("H True", TypeError, ("num_hidden_units", POSITIVE, "True"), {"num_hidden_units": True}),
    Case("H None", TypeError, ("num_hidden_units", POSITIVE, "None"), {"num_hidden_units": None}),
    Case("I 0", ValueError, ("input_size", POSITIVE, "got 0"), {"input_size": 0}),
    Case("I str", TypeError, ("input_size", POSITIVE, "'3'"), {"input_size": "3"}),
    Case("P_i 0", ValueError, ("input_projector_size", "got 0"), {"input_projector_size": 0}),
    Case("P_o 1.5", TypeError, ("output_projector_size", "1.5"), {"output_projector_size": 1.5}),
    Case("output mode", ValueError, ("output_mode", "'sequence', 'last'", "got 'final'"),
         {"output_mode": "final"}),
    Case("output mode type", ValueError, ("output_mode", "'sequence', 'last'", "got 1"),
         {"output_mode": 1}),
    Case("reset mode", ValueError, ("reset_gate_mode", *map(repr, MODES), "got 'after'"),
         {"reset_gate_mode": "after"}),
    Case("state function", ValueError, ("state_activation_function", "'tanh', 'softsign'",
         "or a function", "got 'relu'"), {"state_activation_function": "relu"}),
    Case("gate function", ValueError, ("gate_activation_function", "'sigmoid', 'hard-sigmoid'",
         "got 'hard_sigmoid'"), {"gate_activation_function": "hard_sigmoid"}),
    Case("gate for state", ValueError, ("state_activation_function", "'tanh'", "got 'sigmoid'"),
         {"state_activation_function": "sigmoid"}),
    Case("not elementwise", ValueError, ("gate_activation_function", "each element by itself",
         "softmax"), {"gate_activation_function": jax.nn.softmax}),
    Case("sum", ValueError, ("state_activation_function", "argument's shape", "float32 ()"),
         {"state_activation_function": jnp.sum}),
    Case("other dtype", ValueError, ("state_activation_function", "argument's shape and dtype",
         "bool"), {"state_activation_function": jnp.isfinite}),
    Case("unhashable", TypeError, ("state_activation_function", "hashable", "Unhashable",
         "Pass a function defined once"), {"state_activation_function": Unhashable()}),
    Case("initializer", ValueError, ("input_weights_initializer", *SIX, "got 'xavier'"),
         {"input_weights_initializer": "xavier"}),
    Case("bias initializer", ValueError, ("bias_initializer", "'zeros', 'narrow-normal', 'ones'",
         "got 'glorot'"), {"bias_initializer": "glorot"}),
    Case("initializer type", ValueError, ("recurrent_weights_initializer", *SIX, "got 3"),
         {"recurrent_weights_initializer": 3}),
    Case("projector initializer", ValueError, ("output_projector_initializer", *SIX, "'random'"),
         {"output_projector_initializer": "random", "output_projector_size": 2}),
    Case("initializer's shape", ValueError, ("wrong_shape", "(15, 3)", "got (15, 3, 1)"),
         {"input_weights_initializer": wrong_shape}),
    Case("param_dtype", TypeError, ("param_dtype", "floating-point", "int32"),
         {"param_dtype": "int32"}),
    Case("dtype", TypeError, ("dtype", "floating-point", "int8"), {"dtype": jnp.int8}),
    Case("no dtype", TypeError, ("dtype", "floating-point", "'float33'"), {"dtype": "float33"}),
    Case("complex dtype", TypeError, ("dtype", "floating-point", "complex64"),
         {"dtype": "complex64"}),
    # options of the loop
    Case("reverse", TypeError, ("reverse", "True or False", "'yes'"), {"reverse": "yes"}),
    Case("unroll", ValueError, ("unroll", POSITIVE, "got 0"), {"unroll": 0}),
    Case("checkpoint 0", ValueError, ("checkpoint", POSITIVE, "got 0"), {"checkpoint": 0}),
    Case("checkpoint", ValueError, ("checkpoint", "'sqrt'", "got 'all'"), {"checkpoint": "all"}),
    Case("checkpoint 2.5", TypeError, ("checkpoint", POSITIVE, "2.5"), {"checkpoint": 2.5}),
    Case("precision", ValueError, ("precision", "'highest'", "got 'hi'"), {"precision": "hi"}),
    Case("implementation", ValueError, ("implementation", "'scan'", "got 'cudnn'"),
         {"implementation": "cudnn"}),
    # options that only layers have
    Case("hidden_state size", ValueError, ("hidden_state", "5 finite numbers", "shape (2,)"),
         {"hidden_state": [0.0, 1.0]}),
    Case("hidden_state NaN", ValueError, ("hidden_state", "5 finite numbers", "nan"),
         {"hidden_state": [np.nan] * H}),
    Case("hidden_state type", TypeError, ("hidden_state", "5 finite numbers", "'zeros'"),
         {"hidden_state": "zeros"}),
    Case("hidden_state number", ValueError, ("hidden_state", "5 finite numbers", "got 0.5"),
         {"hidden_state": 0.5}),
    Case("hidden_state digits", TypeError, ("hidden_state", "5 finite numbers", "'12345'"),
         {"hidden_state": "12345"}),
    Case("hidden_state complex", TypeError, ("hidden_state", "5 finite numbers", "1j"),
         {"hidden_state": [1j] * H}),
    Case("hidden_state matrix", ValueError, ("hidden_state", "shape (5, 5)"),
         {"hidden_state": np.ones((H, H))}),
    Case("hidden_state and port", ValueError, ("hidden_state must be None", "has_state_inputs",
         "second argument"), {"hidden_state": [0.0] * H, **PORT}),
    Case("letters", ValueError, ("data_format", "S (spatial), C (channel)", "got 'NTC'"),
         {"data_format": "NTC"}),
    Case("lower case", ValueError, ("data_format", "'btc'"), {"data_format": "btc"}),
    Case("no letters", ValueError, ("data_format", "letters S", "got ''"), {"data_format": ""}),
    Case("twice B", ValueError, ("data_format", "at most once", "'BBTC'", "repeats B"),
         {"data_format": "BBTC"}),
    Case("twice C, T", ValueError, ("data_format", "at most once", "repeats C, T"),
         {"data_format": "CTCT"}),
    Case("format type", TypeError, ("data_format", "a string such as 'BTC'", "3"),
         {"data_format": 3}),
    Case("flag 2", TypeError, ("has_state_outputs", "True or False", "got 2"),
         {"has_state_outputs": 2}),
    Case("flag str", TypeError, ("has_state_inputs", "True or False", "'on'"),
         {"has_state_inputs": "on"}),
    Case("stateful", TypeError, ("stateful", "True or False", "None"), {"stateful": None}),
    Case("factor -1", ValueError, ("bias_l2_factor", NONNEGATIVE, "got -1"),
         {"bias_l2_factor": -1}),
    Case("factor NaN", ValueError, ("input_weights_learn_rate_factor", NONNEGATIVE, "nan"),
         {"input_weights_learn_rate_factor": float("nan")}),
    Case("factor inf", ValueError, ("recurrent_weights_l2_factor", NONNEGATIVE, "inf"),
         {"recurrent_weights_l2_factor": np.inf}),
    Case("factor pair", ValueError, ("bias_learn_rate_factor", "reset, update, candidate",
         "(1, 2)"), {"bias_learn_rate_factor": (1, 2)}),
    Case("factor in triple", ValueError, ("input_weights_l2_factor", NONNEGATIVE, "[1, -1, 1]"),
         {"input_weights_l2_factor": [1, -1, 1]}),
    Case("projector triple", ValueError, ("input_projector_l2_factor", "takes no triple",
         "(1, 2, 1)"), {"input_projector_l2_factor": (1, 2, 1)}),
    Case("projector rate", ValueError, ("output_projector_learn_rate_factor", "takes no triple"),
         {"output_projector_learn_rate_factor": [1, 2, 1]}),
    Case("factor type", TypeError, ("bias_l2_factor", NONNEGATIVE, "'two'"),
         {"bias_l2_factor": "two"}),
    Case("factor True", TypeError, ("bias_l2_factor", NONNEGATIVE, "True"),
         {"bias_l2_factor": True}),
    Case("factor of texts", TypeError, ("bias_l2_factor", NONNEGATIVE, "'2'"),
         {"bias_l2_factor": ["1", "2", "3"]}),
    Case("factor of booleans", TypeError, ("bias_l2_factor", NONNEGATIVE, "False"),
         {"bias_l2_factor": [True, True, False]}),
    Case("complex factor", TypeError, ("bias_l2_factor", NONNEGATIVE, "2j"),
         {"bias_l2_factor": [1, 2j, 3]}),
    Case("factor matrix", ValueError, ("bias_l2_factor", NONNEGATIVE),
         {"bias_l2_factor": np.ones((3, 3))}),
    Case("metadata", TypeError, ("bias_metadata", "mapping", "3"), {"bias_metadata": 3}),
    # the input of a call
    Case("x int", TypeError, ("x must be of a floating-point type", "int32", ".astype("), {},
         {"x": zeros(B, T, I, dtype="int32")}),
    Case("x bool", TypeError, ("x must be of a floating-point type", "bool"), {},
         {"x": zeros(B, T, I, dtype=bool)}),
    Case("x complex", TypeError, ("x must be of a floating-point type", "complex64"), {},
         {"x": zeros(B, T, I, dtype="complex64")}),
    Case("x None", TypeError, ("x must be", "None"), {}, {"x": None}),
    Case("x text", TypeError, ("x must be", "str"), {}, {"x": "abc"}),
    Case("x vector", ValueError, ("x must have at least 2 axes", "(*batch, time, channels)",
         "(3,)"), {}, {"x": zeros(I)}),
    Case("x scalar", ValueError, ("x must have at least 2 axes", "shape ()"), {},
         {"x": np.float32(1)}),
    Case("width", ValueError, ("x must end in input_size = 3 channels", "(2, 4, 7)",
         "data of another width"), {}, {"x": zeros(B, T, 7)}),
    Case("BCT", ValueError, ("input_size = 3 channels", "(2, 3, 4)", "channels-first",
         'data_format="BCT"'), {}, {"x": zeros(B, I, T)}),
    Case("CBT", ValueError, ("input_size = 3 channels", "(3, 2, 4)", "MATLAB",
         'data_format="CBT"'), {}, {"x": zeros(I, B, T)}),
    Case("CT", ValueError, ("input_size = 3 channels", "(3, 4)", 'data_format="CT"'), {},
         {"x": zeros(I, T)}),
    Case("axes", ValueError, ("x must have 4 axes", "'SCBT'", "(2, 4, 3)"),
         {"data_format": "SCBT"}, {"x": X}),
    Case("U axis", ValueError, ("U axis must have size 1", "got 2", "'UTC'", "Name the axis S"),
         {"data_format": "UTC"}, {"x": X}),
    Case("flattened", ValueError, ("input_size = 3 channels", "(2, 4, 6)"),
         {"data_format": "BTSC"}, {"x": zeros(B, T, 2, I)}),
    # lengths, mask, resets
    Case("lengths float", TypeError, ("lengths must be integers", "float32"), {},
         {"lengths": zeros(B)}),
    Case("lengths bool", TypeError, ("lengths must be integers", "bool"), {},
         {"lengths": zeros(B, dtype=bool)}),
    Case("lengths shape", ValueError, ("lengths must have shape (*batch,) = (2,)", "got (3,)"), {},
         {"lengths": zeros(3, dtype=int)}),
    Case("lengths scalar", ValueError, ("lengths must have shape (*batch,) = (2,)", "got ()"), {},
         {"lengths": 3}),
    Case("lengths -1", ValueError, ("lengths must lie in 0..4", "got -1..4"), {},
         {"lengths": [-1, 4]}),
    Case("lengths 5", ValueError, ("lengths must lie in 0..4", "got 2..5"), {},
         {"lengths": jnp.array([2, 5])}),
    Case("lengths and mask", ValueError, ("lengths and mask exclude each other", "both", "Fold"),
         {}, {"lengths": [1, 2], "mask": np.ones((B, T), bool)}),
    Case("mask int", TypeError, ("mask must be booleans", "int64", "mask != 0"), {},
         {"mask": zeros(B, T, dtype="int64")}),
    Case("mask shape", ValueError, ("mask must have shape (*batch, time) = (2, 4)", "got (4, 2)"),
         {}, {"mask": np.ones((T, B), bool)}),
    Case("resets float", TypeError, ("resets must be booleans", "float32", "resets != 0"), {},
         {"resets": zeros(B, T)}),
    Case("resets shape", ValueError, ("resets must have shape (*batch, time) = (2, 4)", "(4,)"),
         {}, {"resets": np.ones(T, bool)}),
    Case("flags keep their axes", ValueError, ("mask must have shape (*batch, time) = (2, 4)",),
         {"data_format": "CBT"}, {"x": zeros(I, B, T), "mask": np.ones((T, B), bool)}),
    # the state port
    Case("hidden shape", ValueError, ("hidden must have shape (2, 5)", "(5,), one for all",
         "got (2, 4)"), PORT, {"hidden": zeros(B, 4)}),
    Case("hidden batch", ValueError, ("hidden must have shape (2, 5)", "got (3, 5)"), PORT,
         {"hidden": zeros(3, H)}),
    Case("hidden int", TypeError, ("hidden must be of a floating-point type", "int32"), PORT,
         {"hidden": zeros(B, H, dtype="int32")}),
    Case("hidden missing", ValueError, ("hidden is missing", "has_state_inputs is True",
         "layer(x, hidden)"), PORT, {"x": X}),
    Case("hidden too many", ValueError, ("hidden was given", "has_state_inputs is False"),
         {"has_state_outputs": True}, {"hidden": zeros(B, H)}),
    Case("hidden's letters", ValueError, ("hidden must have shape (5, 2)", "got (2, 5)"),
         {"data_format": "CBT", **PORT}, {"x": zeros(I, B, T), "hidden": zeros(B, H)}),
    # learnables
    Case("weights axes", ValueError, ("input_weights", "got", "shape (15,)"),
         leaves={"input_weights": zeros(15)}),
    Case("stacked", ValueError, ("recurrent_weights", "(2, 15, 5)"),
         leaves={"recurrent_weights": zeros(2, 15, 5)}),
    Case("weights rows", ValueError, ("input_weights must have shape (15, 3)", "got (12, 3)"),
         leaves={"input_weights": zeros(12, I)}),
    Case("transposed", ValueError, ("input_weights must have shape (15, 15)", "got (3, 15)"),
         leaves={"input_weights": zeros(I, 15)}),
    Case("not 3H rows", ValueError, ("recurrent_weights must have", "got", "(16, 5)"),
         leaves={"recurrent_weights": zeros(16, H)}),
    Case("R columns", ValueError, ("recurrent_weights must have shape (15, 5)", "got (15, 4)"),
         leaves={"recurrent_weights": zeros(15, 4)}),
    Case("bias 3H", ValueError, ("bias must have shape (30,)", "got (15,)",
         "Append the recurrent bias"), DOUBLE, leaves={"bias": zeros(15)}),
    Case("bias 6H", ValueError, ("bias must have shape (15,)", "got (30,)",
         "recurrent-bias-after-multiplication"), leaves={"bias": zeros(30)}),
    Case("bias matrix", ValueError, ("bias", "(15, 1)"), leaves={"bias": zeros(15, 1)}),
    Case("weights int", TypeError, ("input_weights must be of a floating-point type", "int64"),
         leaves={"input_weights": zeros(15, I, dtype="int64")}),
    Case("projector rows", ValueError, ("output_projector must have shape (5, 2)", "got (4, 2)"),
         leaves={"recurrent_weights": zeros(15, 2), "output_projector": zeros(4, 2)}),
    Case("projector columns", ValueError, ("recurrent_weights must have shape (15, 2)",
         "got (15, 5)"), leaves={"output_projector": zeros(5, 2)}),
]  # fmt: skip
LAYERS_ADD_A_HINT = ("x vector", "x scalar")
INIT = inspect.signature(gru_jax.init_params).parameters
GRU = inspect.signature(gru_jax.gru).parameters
GOOD = {"input_weights": zeros(15, I), "recurrent_weights": zeros(15, H), "bias": zeros(15)}
NAMES = {"param_dtype": "dtype", "hidden": "h0"}


def through_core(case):
    """The core's message, or None where the core has no such option."""
    if not case.options.keys() - PORT.keys() <= (INIT.keys() | GRU.keys()) - {"dtype"}:
        return None
    if "has_state_inputs" in case.options and "hidden" not in case.call:
        return None
    options = {k: v for k, v in case.options.items() if k in GRU}
    chosen = {k: v for k, v in case.options.items() if k in INIT}
    sizes = {"num_hidden_units": H, "input_size": I} | chosen
    if chosen and not case.leaves:
        return lambda: gru_jax.init_params(KEY, **sizes)
    params = gru_jax.GRUParams(**GOOD | case.leaves, **chosen)
    call = {NAMES.get(name, name): value for name, value in case.call.items()}
    x = call.pop("x", X)
    return lambda: gru_jax.gru(params, x, **call, **options)


def through_linen(case):
    """Options and learnables in linen, where learnables come with the variables."""
    options = {"num_hidden_units": H} | case.options
    call = {"x": X} | case.call
    variables = {"params": GOOD | case.leaves}

    def run():
        layer = gru_jax.linen.GRULayer(**options)
        if any(callable(value) for value in case.options.values()):
            return layer.init(KEY, **call)
        return layer.apply(variables, **call)

    return run


def through_nnx(case):
    """Options, arguments and given learnables in nnx."""
    options = {"num_hidden_units": H} | case.options
    call = {"x": X} | case.call
    given = GOOD | case.leaves
    if "input_weights_initializer" in options or "input_size" in options:
        given = {"recurrent_weights": GOOD["recurrent_weights"], "bias": GOOD["bias"]}
        options = {"input_size": I, "rngs": nnx.Rngs(0)} | options
    return lambda: gru_jax.nnx.GRULayer(**given, **options)(**call)


def through_linen_given(case):
    """Given learnables in linen."""
    options = {"num_hidden_units": H} | case.options
    return lambda: gru_jax.linen.GRULayer(**GOOD | case.leaves, **options)


def message(run, case):
    """What the mistake gets, after checking its type and words and that nothing was compiled."""
    before = runs_of_the_core()
    with pytest.raises(case.error) as caught:
        run()
    assert type(caught.value) is case.error
    assert runs_of_the_core() == before
    return str(caught.value)


def assert_words(text, case):
    missing = [word for word in case.words if word not in text]
    assert not missing, f"{missing} are not in: {text}"


@pytest.mark.parametrize("case", [c for c in CASES if not c.leaves], ids=lambda case: case.name)
def test_bad_options_and_arguments(case):
    texts = {}
    for through in (through_core, through_linen, through_nnx):
        run = through(case)
        if run is not None:
            texts[through.__name__] = message(run, case)
    core = texts.pop("through_core", None)
    assert texts["through_linen"] == texts["through_nnx"]
    assert_words(texts["through_linen"], case)
    if core is None:
        return
    assert_words(core.replace("h0", "hidden", 1), case)
    if not case.name.startswith(LAYERS_ADD_A_HINT):
        assert core.replace("h0", "hidden", 1) == texts["through_linen"]


@pytest.mark.parametrize("case", [c for c in CASES if c.leaves], ids=lambda case: case.name)
def test_bad_learnables(case):
    core, linen = (message(run(case), case) for run in (through_core, through_linen))
    assert core == linen
    assert_words(core, case)
    given, nnx_given = (message(run(case), case) for run in (through_linen_given, through_nnx))
    assert given == nnx_given
    name = case.words[0].split()[0]
    assert name in given
    if "bias must" in case.words[0]:  # here the remedy is not obvious
        assert_words(given, case)


def test_there_are_enough_cases():
    before = runs_of_the_core()
    gru_jax.gru(gru_jax.GRUParams(**GOOD), X)
    assert runs_of_the_core() > before  # a good call is counted
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
    shared = [case for case in CASES if through_core(case) is not None]
    assert len(shared) >= 40


def test_core_refuses_what_is_no_params():
    with pytest.raises(TypeError, match=r"must be a gru_jax.GRUParams, got dict.*GRUParams\(\*\*"):
        gru_jax.gru(GOOD, X)
    with pytest.raises(ValueError, match="must have input_weights, recurrent_weights and bias"):
        gru_jax.gru(gru_jax.GRUParams(GOOD["input_weights"], GOOD["recurrent_weights"], None), X)
    with pytest.raises(TypeError, match="input_weights must be an array, got list"):
        gru_jax.gru(gru_jax.GRUParams(**GOOD | {"input_weights": [[1.0]]}), X)
    with pytest.raises(TypeError, match=r"^dtype must be of a floating-point type, got int32"):
        gru_jax.init_params(KEY, H, I, dtype="int32")


def test_the_cell_checks_its_arguments():
    params = gru_jax.GRUParams(**GOOD)
    h, x = zeros(B, H), zeros(B, I)
    for args, error, words in (
        ((h, zeros(B, 4)), ValueError, r"input_size = 3 channels, got shape \(2, 4\)"),
        ((zeros(B, 4), x), ValueError, r"h must have shape \(2, 5\).*got \(2, 4\)"),
        ((h, zeros()), ValueError, r"at least 1 axes, \(\*batch, channels\), got shape \(\)"),
        ((h, zeros(B, I, dtype="int32")), TypeError, "x must be of a floating-point type, got int"),
        ((zeros(B, H, dtype="int32"), x), TypeError, "h must be of a floating-point type, got int"),
    ):
        with pytest.raises(error, match=words) as core:
            gru_jax.gru_cell(params, *args)
        with pytest.raises(error) as linen:
            gru_jax.linen.GRUCell(H).apply({"params": GOOD}, *args)
        with pytest.raises(error) as other:
            gru_jax.nnx.GRUCell(H, **GOOD)(*args)
        assert str(linen.value) == str(other.value) == str(core.value)


def test_the_nnx_constructor_needs_a_size_and_a_key():
    with pytest.raises(ValueError, match=r"input_size is missing.*or be given input_weights"):
        gru_jax.nnx.GRULayer(H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rngs is missing.*input_weights: pass rngs=nnx.Rngs\(0"):
        gru_jax.nnx.GRULayer(H, input_size=I)
    with pytest.raises(ValueError, match=r"rngs is missing.*recurrent_weights"):
        gru_jax.nnx.GRUCell(H, input_weights=GOOD["input_weights"])
    with pytest.raises(ValueError, match=r"input_size is missing"):
        gru_jax.nnx.BidirectionalGRULayer(H, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_bidirectional_and_projected(face):
    module = getattr(gru_jax, face)
    options = {"input_size": I, "rngs": nnx.Rngs(0)} if face == "nnx" else {}
    for wrong, error, words in (
        ({"merge": "max"}, ValueError, "merge must be one of 'concat', 'sum', 'mul', 'ave', got"),
        ({"bias": GOOD["bias"]}, ValueError, "bias must not be given.*'forward' and 'backward'"),
        ({"hidden_state": [0.0] * H, **PORT}, ValueError, "hidden_state must be None"),
    ):
        with pytest.raises(error, match=words):
            module.BidirectionalGRULayer(H, **options, **wrong)
    layer = module.BidirectionalGRULayer(H, **options, **PORT)
    call = layer if face == "nnx" else lambda *args: layer.init(KEY, *args)
    for hidden in (zeros(B, H), (zeros(B, H),) * 3):
        with pytest.raises(ValueError, match=r"must be a pair \(forward, backward\)"):
            call(X, hidden)
    with pytest.raises(ValueError, match="hidden is missing"):
        call(X)
    for sizes in ((), (2,)):
        with pytest.raises(TypeError, match="input_projector_size"):
            module.GRUProjectedLayer(H, *sizes, **options)
    for sizes in ((None, 2), (2, None)):
        with pytest.raises((TypeError, ValueError), match=r"projector_size.*got None"):
            module.GRUProjectedLayer(H, *sizes, **options)
    with pytest.raises(TypeError):
        module.GRULayer(H, "last", **options)
    with pytest.raises(TypeError, match="outputmode"):
        module.GRULayer(H, outputmode="last", **options)


def test_single_steps_are_told_their_format():
    for x in (zeros(I), zeros()):
        with pytest.raises(ValueError, match=r"at least 2 axes.*data_format"):
            gru_jax.linen.GRULayer(H).apply({"params": GOOD}, x)


def test_linen_metadata_and_size():
    layer = gru_jax.linen.GRULayer(H, bias_metadata={"mine": 1})
    with pytest.raises(ValueError, match=r"bias_metadata may hold only 'out_sharding'.*\['mine'\]"):
        layer.init(KEY, X)
    layer = gru_jax.linen.GRULayer(H, input_size=4)
    with pytest.raises(ValueError, match=r"x must end in input_size = 4 channels.*\(2, 4, 3\)"):
        layer.init(KEY, X)


def test_lengths_are_checked_where_concrete_and_clamped_under_jit():
    params = gru_jax.init_params(KEY, H, I)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, I)), "float32")
    h0 = jnp.ones((B, H), "float32")
    run = jax.jit(lambda lengths: gru_jax.gru(params, x, h0, lengths=lengths))
    for wild, clamped in (([-3, 99], [0, T]), ([T + 1, -1], [T, 0])):
        with pytest.raises(ValueError, match=r"lengths must lie in 0\.\.4"):
            gru_jax.gru(params, x, h0, lengths=np.array(wild))
        for got, want in zip(run(jnp.array(wild)), run(jnp.array(clamped)), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "lengths", "time", "steps"),
    [
        ("int8", [100, -3], 200, [100, 0]),  # cannot count to the end
        ("uint8", [255, 1], T, [T, 1]),
        ("uint32", [2**32 - 1, 1], T, [T, 1]),
        ("int64", [2**32 + 1, -(2**33)], T, [T, 0]),
    ],
)
def test_lengths_of_any_integer_type_are_clamped_by_value(dtype, lengths, time, steps):
    with jax.enable_x64(dtype == "int64"):
        params = gru_jax.init_params(KEY, H, I, bias_initializer="ones")
        x, h0 = jnp.zeros((B, time, I), "float32"), jnp.ones((B, H), "float32")
        run = jax.jit(lambda n: gru_jax.gru(params, x, h0, lengths=n))
        y, hidden = run(jnp.array(lengths, dtype))
        assert (y != 0).any(-1).sum(-1).tolist() == steps
        np.testing.assert_array_equal(y[0, steps[0] - 1], hidden[0])


def test_static_shapes_fail_under_jit_with_the_same_words():
    params = gru_jax.GRUParams(**GOOD)
    with pytest.raises(ValueError, match=r"channels-first.*BCT"):
        jax.jit(gru_jax.gru)(params, zeros(B, I, T))
    with pytest.raises(ValueError, match=r"lengths must have shape"):
        jax.eval_shape(lambda n: gru_jax.gru(params, X, lengths=n), zeros(3, dtype=int))


@pytest.mark.parametrize("data_format", ["NTC", "CC", "", None])
def test_formats_refuse_what_is_no_format(data_format):
    error = TypeError if data_format is None else ValueError
    for function in (gru_jax.formats.check, gru_jax.formats.output_format):
        with pytest.raises(error, match=r"data_format (must|may)"):
            function(data_format)
    with pytest.raises(ValueError, match="output_mode must be one of 'sequence', 'last'"):
        gru_jax.formats.output_format("BTC", "first")


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(">f4", "got >f4, in which JAX does not compute; convert"),
     (np.longdouble, f"got {np.dtype(np.longdouble)}, in which"),
     ("float8_e4m3fn", "got float8_e4m3fn, in which"), ("complex64", r"got complex64\.$")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x", "h0", "bias"])
def test_types_that_jax_does_not_compute_in_are_named(name, dtype, words):
    params, x = gru_jax.GRUParams(**GOOD), np.asarray(X)
    gru_jax.gru(jax.tree.map(np.asarray, params), x)  # after this JAX itself takes them, swapped
    odd = {"x": x, "h0": np.ones(H, "float32"), "bias": np.asarray(params.bias)}[name].astype(
        jnp.dtype(dtype)
    )
    arguments = {"params": params, "x": x} | (
        {"params": params.replace(bias=odd)} if name == "bias" else {name: odd}
    )
    with pytest.raises(TypeError, match=f"{name} must be of a floating-point type, {words}"):
        gru_jax.gru(**arguments)


def test_byte_order_of_lengths_makes_no_difference():
    params, lengths = gru_jax.GRUParams(**GOOD), np.array([T, 1], ">i4")
    swapped, native = (gru_jax.gru(params, X + 1, lengths=n)[0] for n in (lengths, [T, 1]))
    np.testing.assert_array_equal(swapped, native)


def test_masked_arrays_are_refused():
    params, hidden = gru_jax.GRUParams(**GOOD), np.ma.masked_array([T, 1], [False, True])
    odd = params.replace(bias=np.ma.masked_array(params.bias, np.asarray(params.bias) > 0))
    calls = {
        "x": lambda: gru_jax.gru(params, np.ma.masked_array(X, np.asarray(X) > 0)),
        "lengths": lambda: gru_jax.gru(params, X, lengths=hidden),
        "bias": lambda: gru_jax.gru(odd, X),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} must be a plain array, got a masked one"):
            call()


def test_a_traced_tolerance_is_named():
    run = lambda t: gru_jax.gru_parallel(gru_jax.GRUParams(**GOOD), X, tolerance=t)  # noqa: E731
    with pytest.raises(TypeError, match="tolerance must be a number that is known when tracing"):
        jax.jit(run)(1e-5)


def test_functions_over_data_take_lists_and_name_what_is_missing():
    assert [piece.shape for piece in gru_jax.ragged.chunks([[1.0], [2.0], [3.0]], 2)] == [
        (2, 1), (1, 1),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="output_mode must be one of"):
        gru_jax.formats.from_core(X, "BTC", "first")
    with pytest.raises(TypeError, match="info must come from project or project_model, got None"):
        gru_jax.projection.summary(None)
    with pytest.raises(TypeError, match=r"solver must be.*call it, with its learning rate"):
        gru_jax.optim.training_solver(optax.adam, None, gru_jax.GRUParams(**GOOD))
