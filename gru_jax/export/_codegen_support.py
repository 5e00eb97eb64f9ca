"""What code a GRU can become: what the two source pages say, and which function does it here."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gru_jax import _arguments
from gru_jax._layer import BidirectionalOptions
from gru_jax._options import CellOptions, LayerOptions
from gru_jax._params import AFTER, OPTION_CHECKS, RECURRENT_BIAS, GRUParams
from gru_jax.convert._arrays import FLOATS
from gru_jax.convert._onnx import GATE_ACTIVATIONS, STATE_ACTIVATIONS
from gru_jax.export import _c_weights

WIDTH = 60  # of the reasons


class Support(NamedTuple):
    """One target of code generation, for one GRU: a row of `codegen_support`.

    Example:
      >>> import gru_jax
      >>> from gru_jax import export
      >>> layer = gru_jax.LayerOptions(100, reset_gate_mode="before-multiplication")
      >>> export.codegen_support(layer)[0]
      Support(target='C/C++, generic', function='to_c', pages=True, here=True, reason='')
    """

    target: str
    function: str  # of gru_jax.export; "" where there is none
    pages: bool | None  # whether the pages support it; None where they do not name the target
    here: bool
    reason: str  # why not, or what to mind


class SupportTable(tuple[Support, ...]):
    """The targets in a fixed order; `str` is the aligned table.

    Example:
      >>> import gru_jax
      >>> from gru_jax import export
      >>> table = export.codegen_support(gru_jax.LayerOptions(100))
      >>> str(table).splitlines()[0].split()
      ['target', 'function', 'pages', 'here', 'reason']
    """

    def __repr__(self) -> str:
        words = {None: "", True: "yes", False: "no"}
        lines: list[tuple[str, ...]] = [("target", "function", "pages", "here", "reason")]
        for row in self:
            cells: tuple[str, ...] = (row.target, row.function, words[row.pages], words[row.here])
            for reason in row.reason.split("; "):
                for line in textwrap.wrap(reason, WIDTH, break_on_hyphens=False) or [""]:
                    lines.append((*cells, line))
                    cells = ("", "", "", "")
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        form = "  ".join(f"{{:<{width}}}" for width in widths)
        return "\n".join(form.format(*line).rstrip() for line in lines)


class Rule(NamedTuple):
    """Values of an option that a target takes; with others it refuses, or has only a remark."""

    option: str
    allowed: Sequence[Any]
    remark: str = ""
    refuses: bool = True


class Target(NamedTuple):
    """A row of the table of facts; None instead of rules: not named, or not made."""

    name: str
    function: str
    pages: tuple[Rule, ...] | None
    pages_projected: tuple[Rule, ...] | None
    here: tuple[Rule, ...] | None


def _activations(state: Any, gate: Any) -> tuple[Rule, Rule]:
    return (
        Rule("state_activation_function", tuple(state)),
        Rule("gate_activation_function", tuple(gate)),
    )


_KNOWN = (  # what the pages have at all
    *_activations(("tanh", "softsign"), ("sigmoid", "hard-sigmoid")),
    Rule("direction", ("forward",), "every GRU runs forwards there"),
)
_NO_PORTS = (Rule("has_state_inputs", (False,)), Rule("has_state_outputs", (False,)))
_LIBRARY = (
    *_NO_PORTS,
    *_activations(("tanh",), ("sigmoid",)),
    Rule("reset_gate_mode", (AFTER, RECURRENT_BIAS)),
    _KNOWN[-1],
)
_GENERIC_ONLY = (Rule("projected", (False,), "projected layers get generic C and C++ only"),)
_CALLER = (
    Rule("data_format", ("BTC",), "x is (batch, time, channels) there", refuses=False),
    Rule("hidden_state", (None,), "pass hidden_state as the initial state", refuses=False),
    Rule("stateful", (False,), "the caller keeps the state", refuses=False),
)
_C = (
    *_activations(_c_weights.STATE, _c_weights.GATE),
    Rule("direction", ("forward", "both"), "hand over the last step first", refuses=False),
    Rule("direction", ("forward", "backward"), "one header for each direction", refuses=False),
    Rule("dtype", tuple(_c_weights.TYPES), "numbers become float or double", refuses=False),
    *_CALLER,
)
_NODE = (
    *_activations(STATE_ACTIVATIONS, GATE_ACTIVATIONS),
    Rule("projected", (False,), "becomes the equal dense GRU", refuses=False),
)
_ONNX = (
    *_NODE,
    Rule("dtype", [np.dtype(kind).name for kind in FLOATS], "cast the arrays to one type"),
    Rule(
        "dtype",
        ("float32", "float16", "mixed"),
        "ONNX Runtime does not run this type",
        refuses=False,
    ),
    Rule("direction", ("forward", "backward"), "pass a pair, outputs come joined", refuses=False),
    *_CALLER,
)
_MODEL = (
    Rule("kind", ("layer",), "it exports models of GRU layers"),
    Rule("stateful", (False,), "make it with has_state_inputs and has_state_outputs"),
    *_NODE,
    Rule("dtype", ("float32",), "ONNX Runtime runs float32 alone", refuses=False),
)
_STABLEHLO = (
    Rule("dtype", ("float32", "float16", "bfloat16", "mixed"), "needs JAX's 64-bit mode",
         refuses=False),
    Rule("direction", ("forward", "backward"), "one artefact for each direction", refuses=False),
    *_CALLER,
)  # fmt: skip
TARGETS = (
    Target("C/C++, generic", "to_c", (*_NO_PORTS, *_KNOWN), _KNOWN, _C),
    Target("C/C++, MKL-DNN", "", _LIBRARY, _GENERIC_ONLY, None),
    Target("C/C++, ARM Compute Library", "", _LIBRARY, _GENERIC_ONLY, None),
    Target("CUDA", "to_stablehlo", _LIBRARY, _GENERIC_ONLY, _STABLEHLO),
    Target("CPU, StableHLO", "to_stablehlo", None, None, _STABLEHLO),
    Target("TPU, StableHLO", "to_stablehlo", None, None, _STABLEHLO),
    Target("ONNX, one GRU", "to_onnx", None, None, _ONNX),
    Target("ONNX, whole model", "model_to_onnx", None, None, _MODEL),
)


def codegen_support(layer: CellOptions | GRUParams) -> SupportTable:
    """Says which code a GRU can become: what the pages support, and what is possible here.

    The pages are those of MATLAB's gruLayer and gruProjectedLayer, under "Extended Capabilities".
    The CUDA here is that of XLA, as StableHLO; no code for the two libraries of the pages is made,
    but C and ONNX serve the same processors.

    Args:
      layer: a layer or cell of `gru_jax.linen` or `gru_jax.nnx`, of which only the options count,
        or `GRUParams`.

    Returns:
      A tuple of rows (target, function, pages, here, reason), which prints as a table. `pages` is
      None where the pages do not name the target. A row that is supported may have a reason too:
      what to mind.

    Raises:
      TypeError: `layer` is none of these.
      ValueError: the shapes of the parameters do not fit.

    References:
      https://www.mathworks.com/help/deeplearning/ref/nnet.cnn.layer.grulayer.html

    Example:
      >>> from gru_jax import export
      >>> from gru_jax.linen import GRULayer
      >>> [row.target for row in export.codegen_support(GRULayer(100)) if row.here]
      ...     # doctest: +NORMALIZE_WHITESPACE
      ['C/C++, generic', 'CUDA', 'CPU, StableHLO', 'TPU, StableHLO', 'ONNX, one GRU',
       'ONNX, whole model']
    """
    facts = _facts(layer)
    return SupportTable(_row(target, facts) for target in TARGETS)


def _row(target: Target, facts: dict[str, Any]) -> Support:
    rules = target.pages_projected if facts["projected"] else target.pages
    pages, says = (None, "") if rules is None else _judge("pages", rules, facts)
    if target.here is None:
        here, too = False, "here: no code for this library is made"
    else:
        here, too = _judge("here", target.here, facts)
    return Support(target.name, target.function, pages, here, "; ".join(filter(None, (says, too))))


def _judge(who: str, rules: tuple[Rule, ...], facts: dict[str, Any]) -> tuple[bool, str]:
    """Whether no rule refuses, and why not; or else the remarks."""
    broken = [rule for rule in rules if facts[rule.option] not in rule.allowed]
    refusing = [rule for rule in broken if rule.refuses]
    texts = [rule.remark for rule in refusing or broken if rule.remark]
    needs = [
        f"{rule.option}={' or '.join(map(repr, rule.allowed))}"
        for rule in refusing
        if not rule.remark
    ]
    texts += [f"needs {', '.join(needs)}"] if needs else []
    return not refusing, f"{who}: {', '.join(texts)}" if texts else ""


def _facts(layer: CellOptions | GRUParams) -> dict[str, Any]:
    """The options that rules ask for; what cells and parameters lack has a layer's default."""
    if isinstance(layer, GRUParams):
        sizes = _arguments.sizes_of(layer)
        kinds = {np.dtype(array.dtype).name for array in layer.arrays().values()}
        kind = "params"
    elif isinstance(layer, CellOptions):
        sizes, kinds = layer, {np.dtype(layer.param_dtype).name}
        kind = "layer" if isinstance(layer, LayerOptions) else "cell"
    else:
        raise TypeError(
            "layer must be a layer or cell of gru_jax.linen or gru_jax.nnx, or gru_jax.GRUParams, "
            f"got {type(layer).__name__}."
        )
    defaults = {
        "has_state_inputs": False, "has_state_outputs": False, "stateful": False,
        "hidden_state": None, "data_format": "BTC",
    }  # fmt: skip
    both = isinstance(layer, BidirectionalOptions)
    direction = "both" if both else "backward" if getattr(layer, "reverse", False) else "forward"
    return {
        **{option: getattr(layer, option) for option in OPTION_CHECKS},
        **{option: getattr(layer, option, default) for option, default in defaults.items()},
        "projected": bool(sizes.input_projector_size or sizes.output_projector_size),
        "dtype": kinds.pop() if len(kinds) == 1 else "mixed",
        "direction": direction,
        "kind": kind,
    }
