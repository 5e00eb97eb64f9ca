"""The learnables of a GRU: the one table of leaves, and the parameter tuple."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from gru_jax import _activations, _checks

AFTER = "after-multiplication"
BEFORE = "before-multiplication"
RECURRENT_BIAS = "recurrent-bias-after-multiplication"


class ResetMode(NamedTuple):
    """The two independent facts behind a `reset_gate_mode`."""

    reset_after: bool  # r multiplies R h (True) or h (False)
    recurrent_bias: bool  # a second bias stands beside R h


INITIALIZERS = ("glorot", "he", "orthogonal", "narrow-normal", "zeros", "ones")
BIAS_INITIALIZERS = ("zeros", "narrow-normal", "ones")

RESET_MODES = {
    AFTER: ResetMode(reset_after=True, recurrent_bias=False),
    BEFORE: ResetMode(reset_after=False, recurrent_bias=False),
    RECURRENT_BIAS: ResetMode(reset_after=True, recurrent_bias=True),
}


class Sizes(NamedTuple):
    """What the shapes of the leaves follow from. A projector size of None means no projector."""

    num_hidden_units: int
    input_size: int
    input_projector_size: int | None
    output_projector_size: int | None
    reset_gate_mode: str


class Leaf(NamedTuple):
    """One learnable array: a row of the table that everything else reads."""

    name: str
    shape: Callable[[Sizes], tuple[int, ...] | None]  # None where the array is absent
    initializer: str
    initializers: tuple[str, ...]
    fans: tuple[int, int]  # axes of fan-in and fan-out
    per_gate: bool  # rows in the order reset, update, candidate
    l2_factor: float
    learn_rate_factor: float = 1.0


def _bias_rows(s: Sizes) -> int:
    return (6 if RESET_MODES[s.reset_gate_mode].recurrent_bias else 3) * s.num_hidden_units


def _input_projector_shape(s: Sizes) -> tuple | None:
    return (s.input_size, s.input_projector_size) if s.input_projector_size else None


def _output_projector_shape(s: Sizes) -> tuple | None:
    return (s.num_hidden_units, s.output_projector_size) if s.output_projector_size else None


LEAVES = (
    Leaf(
        "input_weights",
        lambda s: (3 * s.num_hidden_units, s.input_projector_size or s.input_size),
        "glorot", INITIALIZERS, (-1, -2), per_gate=True, l2_factor=1.0,
    ),
    Leaf(
        "recurrent_weights",
        lambda s: (3 * s.num_hidden_units, s.output_projector_size or s.num_hidden_units),
        "orthogonal", INITIALIZERS, (-1, -2), per_gate=True, l2_factor=1.0,
    ),
    Leaf(
        "bias",
        lambda s: (_bias_rows(s),),
        "zeros", BIAS_INITIALIZERS, (-1, -1), per_gate=True, l2_factor=0.0,
    ),
    Leaf(
        "input_projector",
        _input_projector_shape,
        "orthogonal", INITIALIZERS, (-2, -1), per_gate=False, l2_factor=1.0,
    ),
    Leaf(
        "output_projector",
        _output_projector_shape,
        "orthogonal", INITIALIZERS, (-2, -1), per_gate=False, l2_factor=1.0,
    ),
)  # fmt: skip
LEAF_NAMES = tuple(leaf.name for leaf in LEAVES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GRUParams:
    """The learnables of one GRU and the three options that say which function they belong to.

    A pytree: the arrays are its leaves (an absent projector is none), the three options are part
    of its structure. Rows of every stacked array are in the order reset, update, candidate; H is
    the number of hidden units, I the input size, P_i and P_o the projector sizes.

    Args:
      input_weights: W, shape (3H, I), or W' of shape (3H, P_i) with an input projector.
      recurrent_weights: R, shape (3H, H), or R' of shape (3H, P_o) with an output projector.
      bias: b, shape (3H,); in mode "recurrent-bias-after-multiplication" (6H,): reset, update and
        candidate of the input product, then the same of the recurrent product.
      input_projector: Q_i, shape (I, P_i), or None.
      output_projector: Q_o, shape (H, P_o), or None.
      reset_gate_mode: "after-multiplication" (default), "before-multiplication" or
        "recurrent-bias-after-multiplication"; see `gru_jax.gru_cell`. Hyphens may be left out.
      state_activation_function: "tanh" (default), "softsign" or an elementwise function.
      gate_activation_function: "sigmoid" (default), "hard-sigmoid" or an elementwise function. A
        function must be pure, differentiable in forward mode (jax.custom_jvp, not custom_vjp), and
        one object defined once: another object compiles anew.

    Raises:
      ValueError: one of the three options is unknown, or a function is not elementwise. Arrays are
        checked by the functions that use them, because a tree of this type also holds shapes,
        shardings, gradients or factors.

    Example:
      >>> import jax, gru_jax
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> params.recurrent_weights.shape, params.reset_gate_mode
      ((300, 100), 'after-multiplication')
      >>> params.replace(bias=params.bias + 1.0).bias[0].item()
      1.0
    """

    input_weights: Any
    recurrent_weights: Any
    bias: Any
    input_projector: Any = None
    output_projector: Any = None
    _: dataclasses.KW_ONLY
    reset_gate_mode: str = dataclasses.field(default=AFTER, metadata={"static": True})
    state_activation_function: str | Callable = dataclasses.field(
        default="tanh", metadata={"static": True}
    )
    gate_activation_function: str | Callable = dataclasses.field(
        default="sigmoid", metadata={"static": True}
    )

    def __post_init__(self) -> None:
        for name, check in OPTION_CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def replace(self, **fields: Any) -> "GRUParams":
        """Returns a copy with the given fields changed."""
        return dataclasses.replace(self, **fields)

    def arrays(self) -> dict[str, Any]:
        """Returns the learnables that are present as a plain dict, in the order of the fields."""
        values = {name: getattr(self, name) for name in LEAF_NAMES}
        return {name: value for name, value in values.items() if value is not None}

    def __repr__(self) -> str:
        shown = [f"{name}={_summary(value)}" for name, value in self.arrays().items()]
        for field in dataclasses.fields(self):
            if field.name in OPTION_CHECKS and getattr(self, field.name) != field.default:
                shown.append(f"{field.name}={getattr(self, field.name)!r}")
        return f"GRUParams({', '.join(shown)})"


OPTION_CHECKS = {
    "reset_gate_mode": partial(_checks.choice, names=RESET_MODES),
    "state_activation_function": partial(_activations.check, names=_activations.STATE),
    "gate_activation_function": partial(_activations.check, names=_activations.GATE),
}


def _summary(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{tuple(value.shape)}"
    return repr(value)


def wrong_shape(name: str, expected: tuple | None, shape: tuple) -> str:
    """The message about a leaf of another shape; None is expected of a leaf that must be absent."""
    if expected is None:
        return f"{name} must be absent here, got an array of shape {shape}."
    hint = ""
    if name == "bias" and len(shape) == 1 and 2 * shape[0] == expected[0]:
        hint = " Append the recurrent bias (zeros change nothing) or choose another mode."
    if name == "bias" and len(shape) == 1 and shape[0] == 2 * expected[0]:
        hint = " A second bias needs reset_gate_mode='recurrent-bias-after-multiplication'."
    return f"{name} must have shape {expected}, got {shape}.{hint}"


def check_initializer(leaf: Leaf, option: str, value: str | Callable) -> str | Callable:
    """Returns the stored form of an initialiser of one leaf."""
    return _checks.choice(option, value, leaf.initializers, or_callable=True)


def num_learnables(params: Any) -> int:
    """Counts the learnable numbers in parameters, of a GRU or of a whole model.

    Args:
      params: `GRUParams`, or any pytree of arrays or of shapes: of a model in linen
        `variables["params"]`, in nnx `nnx.state(model, nnx.Param)`. Every leaf is counted.

    Returns:
      The sum of the sizes of all leaves.

    Example:
      >>> import jax, gru_jax
      >>> dense = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> projected = gru_jax.init_params(
      ...     jax.random.key(0), 100, 12, output_projector_size=25, input_projector_size=9)
      >>> gru_jax.num_learnables(dense), gru_jax.num_learnables(projected)
      (33900, 13108)
    """
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(params))
