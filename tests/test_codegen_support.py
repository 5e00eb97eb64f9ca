"""The table of code generation: the pages' statements by hand, and what the exporters do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_params, random_params
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax.export._c import to_c
from gru_jax.export._codegen_support import TARGETS, codegen_support
from gru_jax.export._onnx import to_onnx
from gru_jax.export._onnx_model import model_to_onnx
from gru_jax.export._stablehlo import to_stablehlo

H, CHANNELS = 2, 3
GENERIC, MKL, ARM, CUDA, CPU, TPU, NODE, MODEL = (target.name for target in TARGETS)
OPTIONS = [
    {}, {"reset_gate_mode": "before-multiplication"},
    {"state_activation_function": "softsign", "gate_activation_function": "hard-sigmoid"},
    {"state_activation_function": jnp.arctan}, {"gate_activation_function": jax.nn.relu6},
    {"stateful": True}, {"has_state_inputs": True, "has_state_outputs": True},
    {"has_state_outputs": True, "output_mode": "last"}, {"hidden_state": (0.1, 0.2)},
    {"data_format": "CBT"}, {"data_format": "SCB"}, {"reverse": True},
    {"param_dtype": "float64"}, {"param_dtype": "float16"}, {"param_dtype": "bfloat16"},
    {"input_projector_size": 2, "output_projector_size": 1}, {"output_projector_size": 1},
]  # fmt: skip
KINDS = ("GRULayer", "BidirectionalGRULayer", "GRUCell")


def nnx_layer(kind="GRULayer", **options):
    """A layer, or None where this kind lacks an option."""
    make = getattr(gru_jax.nnx, kind)
    try:
        return make(H, input_size=CHANNELS, rngs=flax_nnx.Rngs(0), **options)
    except TypeError:
        return None


def params_of(layer):
    """The parameters of each direction."""
    parts = [layer.forward, layer.backward] if hasattr(layer, "backward") else [layer]
    options = {name: getattr(layer, name) for name in (
        "reset_gate_mode", "state_activation_function", "gate_activation_function",
    )}  # fmt: skip
    return [gru_jax.GRUParams(**part.known_leaves(), **options) for part in parts]


def by_target(layer):
    return {row.target: row for row in codegen_support(layer)}


def works(function):
    """Whether an exporter makes something; what it refuses, it refuses with a reason."""
    try:
        assert function()
    except (TypeError, ValueError) as error:
        return len(str(error)) < 40  # a refusal has a reason
    return True


# The pages


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state_activation", STATE_ACTIVATIONS)
@pytest.mark.parametrize("gate_activation", GATE_ACTIVATIONS)
@pytest.mark.parametrize("ports", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_what_the_page_of_the_gru_layer_says(mode, state_activation, gate_activation, ports):
    layer = gru_jax.linen.GRULayer(
        H, reset_gate_mode=mode, state_activation_function=state_activation,
        gate_activation_function=gate_activation,
        has_state_inputs=ports[0], has_state_outputs=ports[1],
    )  # fmt: skip
    pages = {row.target: row.pages for row in codegen_support(layer)}
    closed = ports == (0, 0)
    library = (state_activation, gate_activation) == ("tanh", "sigmoid") and mode in (
        "after-multiplication", "recurrent-bias-after-multiplication"
    )  # fmt: skip
    assert pages == {
        GENERIC: closed, MKL: closed and library, ARM: closed and library, CUDA: closed and library,
        CPU: None, TPU: None, NODE: None, MODEL: None,
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_what_the_page_of_the_projected_layer_says(mode):
    layer = gru_jax.linen.GRUProjectedLayer(H, 2, 1, reset_gate_mode=mode, has_state_inputs=True)
    pages = {row.target: row.pages for row in codegen_support(layer) if row.pages is not None}
    assert pages == {GENERIC: True, MKL: False, ARM: False, CUDA: False}
    assert "generic C and C++ only" in by_target(layer)[CUDA].reason


@pytest.mark.parametrize("options", [{"reverse": True}, {"state_activation_function": jnp.arctan}])
def test_what_the_pages_do_not_have(options):
    rows = codegen_support(gru_jax.linen.GRULayer(H, **options))
    assert not any(row.pages for row in rows)
    assert all(row.pages is not None for row in rows[:4])


# The exporters


@pytest.mark.parametrize("options", OPTIONS, ids=",".join)
@pytest.mark.parametrize("kind", KINDS)
def test_the_exporters_of_parameters_agree_with_the_table(kind, options):
    layer = nnx_layer(kind, **options)
    if layer is None:
        assert kind == "GRUCell"
        return
    rows, params = by_target(layer), params_of(layer)
    reverse = getattr(layer, "reverse", False) and len(params) == 1
    pair = tuple(params) if len(params) == 2 else params[0]
    assert rows[GENERIC].here is all(works(lambda p=p: to_c(p)) for p in params)
    assert rows[NODE].here is works(lambda: to_onnx(pair, reverse=reverse))
    for target, platform in ((CUDA, "cuda"), (CPU, "cpu"), (TPU, "tpu")):
        assert rows[target].here is True
        made = works(lambda p=platform: to_stablehlo(params[0], platforms=[p], reverse=reverse))
        assert made is True
    assert not rows[MKL].here
    assert not rows[ARM].here


@pytest.mark.parametrize("options", OPTIONS, ids=",".join)
@pytest.mark.parametrize("kind", KINDS)
def test_the_exporter_of_models_agrees_with_the_table(kind, options):
    layer = nnx_layer(kind, **options)
    if layer is None:
        assert kind == "GRUCell"
        return
    sizes = {"B": 4, "T": 5, "C": CHANNELS, "S": 1}
    letters = "BC" if kind == "GRUCell" else layer.data_format
    x = jnp.ones([sizes[letter] for letter in letters], layer.param_dtype)
    hidden = jnp.zeros(H, x.dtype)
    arguments = (x,)
    if kind == "GRUCell":
        arguments = (jnp.zeros((4, H), x.dtype), x)
    elif layer.has_state_inputs:
        arguments = (x, hidden if kind == "GRULayer" else (hidden, hidden))
    row = by_target(layer)[MODEL]
    assert row.here is works(lambda: model_to_onnx(layer, None, arguments))
    assert row.here or row.reason


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", [("float64",), ("float32", "float64"), ("bfloat16",)])
def test_parameters_without_a_layer(mode, dtypes):
    arrays = random_params(np.random.default_rng(1), H, CHANNELS, mode, P_o=1, dtype=dtypes[0])
    params = as_params(arrays, mode)
    params = params.replace(bias=params.bias.astype(dtypes[-1]))
    rows = by_target(params)
    assert rows[GENERIC].here is works(lambda: to_c(params)) is True
    assert rows[NODE].here is works(lambda: to_onnx(params)) is (len(dtypes) == 1)
    assert rows[CPU].here is works(lambda: to_stablehlo(params)) is True
    assert (
        rows[MODEL].here is works(lambda: model_to_onnx(params, None, jnp.ones((2, 4, 3)))) is False
    )
    assert rows[GENERIC].pages is True


# The table


@pytest.mark.parametrize("options", OPTIONS, ids=",".join)
@pytest.mark.parametrize("kind", KINDS)
def test_both_faces_have_one_table(kind, options):
    layer = nnx_layer(kind, **options)
    if layer is not None:
        linen = getattr(gru_jax.linen, kind)(H, **options)
        assert codegen_support(linen) == codegen_support(layer)
    if kind == "GRULayer" and not options.keys() - {"reset_gate_mode", "output_projector_size"}:
        rows = zip(codegen_support(layer), codegen_support(*params_of(layer)), strict=True)
        assert all(one == other for one, other in rows if one.target != MODEL)


@pytest.mark.parametrize(("target", "option", "reason"), [
    (GENERIC, {"has_state_inputs": True}, "pages: needs has_state_inputs=False"),
    (GENERIC, {"state_activation_function": jnp.arctan},
     "pages: needs state_activation_function='tanh' or 'softsign'; "
     "here: needs state_activation_function='tanh' or 'softsign'"),
    (GENERIC, {"param_dtype": "float16"}, "here: numbers become float or double"),
    (MKL, {}, "here: no code for this library is made"),
    (CUDA, {"reset_gate_mode": "before-multiplication"},
     "pages: needs reset_gate_mode='after-multiplication' or "
     "'recurrent-bias-after-multiplication'"),
    (CPU, {"param_dtype": "float64"}, "here: needs JAX's 64-bit mode"),
    (CPU, {"data_format": "CBT", "stateful": True},
     "here: x is (batch, time, channels) there, the caller keeps the state"),
    (MODEL, {"stateful": True}, "here: make it with has_state_inputs and has_state_outputs"),
    (NODE, {}, ""),
])  # fmt: skip
def test_reasons(target, option, reason):
    assert by_target(gru_jax.linen.GRULayer(H, **option))[target].reason == reason


def test_prints_as_an_aligned_table():
    layer = gru_jax.linen.BidirectionalGRULayer(H, state_activation_function="softsign")
    table = codegen_support(layer)
    lines = str(table).splitlines()
    assert repr(table) == str(table)
    head = lines[0]
    assert head.split() == ["target", "function", "pages", "here", "reason"]
    starts = [head.index(word) for word in head.split()]
    cells = [
        [line[a:b].strip() for a, b in itertools.pairwise([*starts, None])] for line in lines[1:]
    ]
    named = [row for row in cells if row[0]]
    assert [row[0] for row in named] == [target.name for target in TARGETS]
    words = {None: "", True: "yes", False: "no"}
    assert [row[1:4] for row in named] == [
        [r.function, words[r.pages], words[r.here]] for r in table
    ]
    assert max(map(len, lines)) < 120
    assert " ".join(row[4] for row in cells).split() == [
        word for row in table for word in row.reason.replace("; ", " ").split()
    ]


def test_of_what_there_is_no_table():
    with pytest.raises(TypeError, match=r"layer must be a layer or cell of .*, got Dense"):
        codegen_support(flax_linen.Dense(3))
    params = as_params(random_params(np.random.default_rng(1), H, CHANNELS, MODES[0]), MODES[0])
    with pytest.raises(ValueError, match="bias must have shape"):
        codegen_support(params.replace(bias=params.bias[1:]))
