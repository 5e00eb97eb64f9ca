"""The options of all layers and cells: their names, defaults and constraints, in one place.

Plain dataclasses, mixed into the Flax modules. Values are checked when set, and stored hashable.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from gru_jax import _checks, formats
from gru_jax._display import display
from gru_jax._initializers import Given
from gru_jax._params import AFTER, LEAF_NAMES, LEAVES, OPTION_CHECKS, Sizes, check_initializer

Initializer = str | Callable
Factor = float | tuple[float, float, float]
PORTS = ("num_inputs", "input_names", "num_outputs", "output_names")
READ_ONLY = (
    "num_hidden_units", "input_size", "input_projector_size", "output_projector_size",
    "output_mode", "has_state_inputs", "has_state_outputs", "stateful", *OPTION_CHECKS,
)  # fmt: skip


@dataclasses.dataclass(eq=False, repr=False)
class CellOptions:
    """What a cell is made from; H hidden units, I input channels, P_i and P_o projector sizes.

    Args:
      num_hidden_units: H: the amount of information kept between steps, and the width of the
        output. It does not limit the number of steps; too many units overfit.
      output_projector_size: P_o; fewer learnables below 3H/4. None for no projector.
      input_projector_size: P_i; fewer learnables below 3HI/(3H + I). None for no projector.
      input_size: I, or "auto" to take it from the first input (linen) or from a given array.
      reset_gate_mode: "after-multiplication" (cuDNN's), "before-multiplication" or
        "recurrent-bias-after-multiplication"; see `gru_jax.gru_cell`.
      state_activation_function: σ_s: "tanh", "softsign" or an elementwise function.
      gate_activation_function: σ_g: "sigmoid", "hard-sigmoid" or an elementwise function.
      input_weights_initializer: "glorot", "he", "orthogonal", "narrow-normal", "zeros", "ones" or
        f(key, shape, dtype); see `gru_jax.init_params`. Runs where no array is given.
      recurrent_weights_initializer: the same for the recurrent weights.
      bias_initializer: "zeros", "narrow-normal", "ones" or a function.
      input_projector_initializer: as for the weights.
      output_projector_initializer: as for the weights.
      input_weights: initial value, (3H, I) or (3H, P_i), rows reset, update, candidate.
      recurrent_weights: initial value, (3H, H) or (3H, P_o).
      bias: initial value, (3H,), or (6H,) in recurrent-bias mode.
      input_projector: initial value, (I, P_i).
      output_projector: initial value, (H, P_o).
      input_weights_learn_rate_factor: multiplies the current global learning rate: a number, or
        three for (reset, update, candidate). It acts through `gru_jax.optim`.
      recurrent_weights_learn_rate_factor: likewise.
      bias_learn_rate_factor: likewise; a triple serves both halves of a (6H,) bias.
      input_projector_learn_rate_factor: a number.
      output_projector_learn_rate_factor: a number.
      input_weights_l2_factor: multiplies the global L2 factor; as the learn-rate factors.
      recurrent_weights_l2_factor: likewise.
      bias_l2_factor: likewise; 0 by default.
      input_projector_l2_factor: a number.
      output_projector_l2_factor: a number.
      input_weights_metadata: of the variable: {"out_sharding": ("hidden", None)}, or more in nnx.
      recurrent_weights_metadata: likewise.
      bias_metadata: likewise.
      input_projector_metadata: likewise.
      output_projector_metadata: likewise.
      dtype: type of the computation's arguments and result; None to promote them.
      param_dtype: type of the learnables.
      precision: of the matrix products, as in `jax.lax.dot_general`.
    """

    num_hidden_units: int
    _: dataclasses.KW_ONLY
    output_projector_size: int | None = None
    input_projector_size: int | None = None
    input_size: int | str = "auto"
    reset_gate_mode: str = AFTER
    state_activation_function: str | Callable = "tanh"
    gate_activation_function: str | Callable = "sigmoid"
    input_weights_initializer: Initializer = "glorot"
    recurrent_weights_initializer: Initializer = "orthogonal"
    bias_initializer: Initializer = "zeros"
    input_projector_initializer: Initializer = "orthogonal"
    output_projector_initializer: Initializer = "orthogonal"
    input_weights: Any = None
    recurrent_weights: Any = None
    bias: Any = None
    input_projector: Any = None
    output_projector: Any = None
    input_weights_learn_rate_factor: Factor = 1.0
    recurrent_weights_learn_rate_factor: Factor = 1.0
    bias_learn_rate_factor: Factor = 1.0
    input_projector_learn_rate_factor: float = 1.0
    output_projector_learn_rate_factor: float = 1.0
    input_weights_l2_factor: Factor = 1.0
    recurrent_weights_l2_factor: Factor = 1.0
    bias_l2_factor: Factor = 0.0
    input_projector_l2_factor: float = 1.0
    output_projector_l2_factor: float = 1.0
    input_weights_metadata: Mapping[str, Any] | None = None
    recurrent_weights_metadata: Mapping[str, Any] | None = None
    bias_metadata: Mapping[str, Any] | None = None
    input_projector_metadata: Mapping[str, Any] | None = None
    output_projector_metadata: Mapping[str, Any] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PORTS or (name in READ_ONLY and name in vars(self)):
            raise AttributeError(f"{name} of a {type(self).__name__} is read-only; make a new one.")
        if name in LEAF_NAMES:
            if "_settled" in vars(self):
                raise AttributeError(
                    f"{name} lives among the variables of the layer: set it there."
                )
            if value is not None:  # a given array is kept as its leaf's initialiser
                object.__setattr__(self, f"{name}_initializer", Given(name, value))
            return
        super().__setattr__(name, CHECKS[name](name, value) if name in CHECKS else value)

    def settle(self) -> None:
        """Fits the sizes to given arrays and checks that they fit each other."""
        given = {name: getattr(self, f"{name}_initializer") for name in LEAF_NAMES}
        given = {name: value for name, value in given.items() if isinstance(value, Given)}
        for side in ("input", "output"):
            if f"{side}_projector" in given and getattr(self, f"{side}_projector_size") is None:
                size = given[f"{side}_projector"].shape[1]
                object.__setattr__(self, f"{side}_projector_size", size)
        if self.input_size == "auto":
            source, axis = ("weights", 1) if self.input_projector_size is None else ("projector", 0)
            if f"input_{source}" in given:
                object.__setattr__(self, "input_size", given[f"input_{source}"].shape[axis])
        sizes = self.sizes(None if self.input_size == "auto" else self.input_size)
        for leaf in LEAVES:
            if leaf.name in given:
                given[leaf.name].check(leaf.shape(sizes))
        object.__setattr__(self, "_settled", True)

    def sizes(self, input_size: Any) -> Sizes:
        """Returns what the shapes of the leaves follow from, for this many input channels."""
        return Sizes(
            self.num_hidden_units,
            input_size,
            self.input_projector_size,
            self.output_projector_size,
            self.reset_gate_mode,
        )

    def known_leaves(self) -> Mapping[str, Any]:
        """Returns the learnables that exist already, by name; a face knows those it has made."""
        initializers = {name: getattr(self, f"{name}_initializer") for name in LEAF_NAMES}
        return {name: g.array for name, g in initializers.items() if isinstance(g, Given)}

    def __str__(self) -> str:
        return display(self, self.known_leaves())


@dataclasses.dataclass(eq=False, repr=False)
class LayerOptions(CellOptions):
    """What a layer is made from: the options of a cell, and those of a sequence.

    Args:
      output_mode: "sequence", or "last" for the final step alone.
      has_state_inputs: take the initial state as a second argument, `layer(x, hidden)`.
      has_state_outputs: return the final state too, `y, hidden = layer(x)`.
      hidden_state: H values from which every sequence starts, zeros if None. Not with
        `has_state_inputs`.
      data_format: letters of the axes of the input, see `gru_jax.formats`; "BTC" also takes any
        number of leading batch axes. `lengths`, `mask` and `resets` do not follow it.
      stateful: start each call from the state in which the last one ended, see `reset_state`.
      reverse: process the sequences from their ends.
      unroll: steps per iteration of the loop, see `gru_jax.gru`.
      checkpoint: what the backward pass keeps, see `gru_jax.gru`.
      implementation: see `gru_jax.gru`.
    """

    _: dataclasses.KW_ONLY
    output_mode: str = "sequence"
    has_state_inputs: bool = False
    has_state_outputs: bool = False
    hidden_state: tuple[float, ...] | None = None
    data_format: str = "BTC"
    stateful: bool = False
    reverse: bool = False
    unroll: int | None = None
    checkpoint: int | str | None = None
    implementation: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "hidden_state":
            value = _checks.initial_state(value, self.num_hidden_units)
            if value is not None and self.has_state_inputs:
                raise ValueError(
                    "hidden_state must be None where has_state_inputs is True: the state then "
                    "comes in as the second argument of each call."
                )
        if name == "stateful" and value and self.has_state_inputs:
            raise ValueError("stateful must be False where has_state_inputs is True.")
        super().__setattr__(name, value)

    @property
    def num_inputs(self) -> int:
        """Number of inputs: 1, or 2 with `has_state_inputs`."""
        return len(self.input_names)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs: "in", and "hidden" with `has_state_inputs`."""
        return ("in", "hidden") if self.has_state_inputs else ("in",)

    @property
    def num_outputs(self) -> int:
        """Number of outputs: 1, or 2 with `has_state_outputs`."""
        return len(self.output_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs: "out", and "hidden" with `has_state_outputs`."""
        return ("out", "hidden") if self.has_state_outputs else ("out",)


def _leaf_checks() -> dict[str, Callable]:
    checks: dict[str, Callable] = {}
    for leaf in LEAVES:
        factor = partial(_checks.factor, per_gate=leaf.per_gate)
        checks[f"{leaf.name}_initializer"] = partial(check_initializer, leaf)
        checks[f"{leaf.name}_learn_rate_factor"] = checks[f"{leaf.name}_l2_factor"] = factor
        checks[f"{leaf.name}_metadata"] = _checks.metadata
    return checks


CHECKS: dict[str, Callable] = {
    **_leaf_checks(),
    **OPTION_CHECKS,
    "num_hidden_units": _checks.positive_int,
    "input_size": partial(_checks.size, default="auto"),
    "input_projector_size": partial(_checks.size, default=None),
    "output_projector_size": partial(_checks.size, default=None),
    "data_format": lambda _, value: formats.check(value),
    "param_dtype": _checks.real_dtype,
    "precision": _checks.precision,
    "dtype": lambda name, value: None if value is None else _checks.real_dtype(name, value),
    "output_mode": _checks.output_mode,
    "checkpoint": _checks.checkpoint,
    "implementation": _checks.implementation,
    "unroll": partial(_checks.size, default=None),
    **dict.fromkeys(("has_state_inputs", "has_state_outputs", "stateful", "reverse"), _checks.flag),
}
