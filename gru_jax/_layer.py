"""What a call of a layer or of a cell does, whichever framework owns the arrays."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gru_jax import _arguments, _checks, formats
from gru_jax._cell import gru_cell
from gru_jax._initializers import Given, init_leaf
from gru_jax._options import CellOptions, LayerOptions
from gru_jax._params import LEAF_NAMES, LEAVES, OPTION_CHECKS, GRUParams, Leaf
from gru_jax._sequence import Options, run
from gru_jax._watch import show

MERGES = ("concat", "sum", "mul", "ave")


@dataclasses.dataclass(eq=False, repr=False)
class ProjectedLayerOptions(LayerOptions):
    """`LayerOptions` with both projector sizes required, output before input as on the pages."""

    output_projector_size: int | None = dataclasses.field(kw_only=False)
    input_projector_size: int | None = dataclasses.field(kw_only=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("output_projector_size", "input_projector_size"):
            value = _checks.positive_int(name, value)
        super().__setattr__(name, value)


@dataclasses.dataclass(eq=False, repr=False)
class BidirectionalOptions(LayerOptions):
    """`LayerOptions` of both directions, and how their outputs are merged."""

    _: dataclasses.KW_ONLY
    merge: str = "concat"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LEAF_NAMES and value is not None:
            raise ValueError(
                f"{name} must not be given to a bidirectional layer: its two directions hold their "
                "own, in the sub-trees 'forward' and 'backward'."
            )
        if name == "merge":
            value = _checks.choice("merge", value, MERGES)
        super().__setattr__(name, value)

    def direction(self, *, backward: bool) -> dict[str, Any]:
        """Returns the options of one of the two layers."""
        shared = [field.name for field in dataclasses.fields(LayerOptions)]
        options = {name: getattr(self, name) for name in shared if name not in LEAF_NAMES}
        return options | {"reverse": self.reverse != backward}


def initial_leaves(options: CellOptions, next_key: Callable | None) -> Iterator[tuple[Leaf, Any]]:
    """Draws the leaves of a layer that makes them at once; None where it has no such leaf."""
    if options.input_size == "auto":
        raise ValueError(
            "input_size is missing: an nnx layer makes its learnables at once, so it must be told "
            "the number of input channels, or be given input_weights."
        )
    sizes = options.sizes(options.input_size)
    for leaf in LEAVES:
        initializer = getattr(options, f"{leaf.name}_initializer")
        drawn = not isinstance(initializer, Given) and initializer not in ("zeros", "ones")
        drawn = drawn and leaf.shape(sizes) is not None
        if drawn and next_key is None:
            raise ValueError(f"rngs is missing, to draw {leaf.name}: pass rngs=nnx.Rngs(0).")
        key = next_key() if drawn and next_key else None
        yield leaf, init_leaf(leaf, initializer, key, sizes, options.param_dtype)


def input_of(options: LayerOptions, x: Any) -> jax.Array:
    """Returns the input of a layer as (*batch, time, channels), in the layer's `dtype` if any."""
    x = formats.to_core(_arguments.as_floating("x", x), options.data_format)
    if x.ndim < 2:
        raise ValueError(
            "x must have at least 2 axes, (*batch, time, channels), with data_format 'BTC', got "
            f"shape {x.shape}. For a single step pass data_format='BC' or 'C'."
        )
    return x if options.dtype is None else x.astype(options.dtype)


def call_layer(
    options: LayerOptions,
    leaves: Mapping[str, Any],
    x: jax.Array,
    hidden: Any,
    stored: Any,
    lengths: Any,
    mask: Any,
    resets: Any,
) -> tuple[Any, jax.Array]:
    """Runs a layer over what `input_of` returned.

    Args:
      options: the layer.
      leaves: its learnables by name; projectors there or not.
      x: shape (*batch, time, channels).
      hidden: the second argument of the call, in the format of the state port, or None.
      stored: the state that a stateful layer kept, or None.
      lengths: see `gru_jax.gru`; so are `mask` and `resets`.
      mask: booleans.
      resets: booleans.

    Returns:
      What the call returns, and the final state, (*batch, H).
    """
    params = as_params(options, leaves)
    if options.data_format != "BTC":
        _check_channels(options, _arguments.sizes_of(params).input_size, x)
    start = _start(options, hidden, stored, x)
    back = stored_state(options) if options.stateful and resets is not None else None
    call = params, x, start, back, lengths, mask, resets
    y, final = show(options, *call) or run(options_of(options), *call)
    y = formats.from_core(y, options.data_format, options.output_mode)
    if not options.has_state_outputs:
        return y, final
    return (y, formats.from_core(final, options.data_format, "last")), final


def options_of(options: Any) -> Options:
    """Those of a layer's options that the core takes."""
    return Options(*(getattr(options, name) for name in Options._fields))


def _check_channels(options: LayerOptions, channels: int, x: jax.Array) -> None:
    """The check of the core, in the words of a layer that has turned the axes of its input."""
    if x.shape[-1] != channels:
        raise ValueError(
            f"x must have input_size = {channels} channels; read by data_format "
            f"{options.data_format!r}, as (*batch, time, channels), it has shape {x.shape}. "
            "Name the axes as they are."
        )


def cell_input(options: CellOptions, x: Any) -> jax.Array:
    """Returns the input of a cell, (*batch, channels), in the cell's `dtype` if any."""
    x = _arguments.as_floating("x", x)
    if not x.ndim:
        raise ValueError(f"x must have at least 1 axes, (*batch, channels), got shape {x.shape}.")
    return x if options.dtype is None else x.astype(options.dtype)


def call_cell(options: CellOptions, leaves: Mapping[str, Any], carry: Any, x: jax.Array) -> tuple:
    """Runs a cell for one step: (carry, x) to (new carry, output), the carry keeping its dtype."""
    params = as_params(options, leaves)
    show(options, params, x, carry, None, None, None, None)
    new = gru_cell(params, carry, x, precision=options.precision)
    dtype, _ = _arguments.result_dtypes(x, *params.arrays().values())
    return new, new.astype(dtype)


def as_params(options: CellOptions, leaves: Mapping[str, Any]) -> GRUParams:
    """The leaves as `GRUParams`, in the layer's `dtype` if any."""
    if options.dtype is not None:
        leaves = {name: jnp.asarray(leaf, options.dtype) for name, leaf in leaves.items()}
    return assembled(options, leaves)


def assembled(options: CellOptions, leaves: Mapping[str, Any]) -> GRUParams:
    """The leaves as they are, with the options that `GRUParams` hold."""
    arrays: dict[str, Any] = {name: leaves.get(name) for name in LEAF_NAMES}
    params = GRUParams(**arrays, **{name: getattr(options, name) for name in OPTION_CHECKS})
    sizes = _arguments.sizes_of(params)
    for name in ("num_hidden_units", "input_size"):
        wanted, found = getattr(options, name), getattr(sizes, name)
        if wanted not in ("auto", found):
            raise ValueError(
                f"{name} of this {type(options).__name__} is {wanted}, but its learnables are made "
                f"for {found}: {params}."
            )
    return params


def stored_state(options: CellOptions, batch_shape: tuple[int, ...] = ()) -> jax.Array:
    """The state that `reset_state` returns to: `hidden_state`, or zeros, for such a batch."""
    H = options.num_hidden_units
    dtype = _checks.promote(options.dtype or options.param_dtype, jnp.float32)
    values = getattr(options, "hidden_state", None) or (0.0,) * H
    return jnp.broadcast_to(jnp.asarray(values, dtype), (*batch_shape, H))


def _start(options: LayerOptions, hidden: Any, stored: Any, x: jax.Array) -> Any:
    """The state from which a call starts, for the core; None for zeros."""
    if options.has_state_inputs:
        if hidden is None:
            raise ValueError(
                "hidden is missing: has_state_inputs is True, so call layer(x, hidden)."
            )
        hidden = _arguments.as_floating("hidden", hidden)
        if options.data_format != "BTC" and hidden.ndim != 1:
            hidden = _port_to_core(options, hidden, x.shape[0])
        return _arguments.check_state("hidden", hidden, x.shape[:-2], options.num_hidden_units)
    if hidden is not None:
        raise ValueError("hidden was given, but has_state_inputs is False; make the layer with it.")
    if stored is not None:
        shape = (*x.shape[:-2], options.num_hidden_units)
        if stored.shape not in (shape, shape[-1:]):
            raise ValueError(
                f"the stored state has shape {stored.shape}, but this input needs {shape}: call "
                "reset_state before another batch size."
            )
        return stored
    return None if options.hidden_state is None else stored_state(options)


def state_pair(options: BidirectionalOptions, hidden: Any) -> tuple[Any, Any]:
    """The second argument of a bidirectional layer's call, one state for each direction."""
    if hidden is None:
        return None, None
    if not isinstance(hidden, tuple | list) or len(hidden) != 2:
        raise ValueError("hidden of a bidirectional layer must be a pair (forward, backward).")
    return hidden[0], hidden[1]


def _port_to_core(options: LayerOptions, hidden: jax.Array, batch: int) -> jax.Array:
    """A state in the format of the "last" output, as (batch, H)."""
    letters = formats.output_format(options.data_format, "last")
    sizes = {"B": batch, "C": options.num_hidden_units}
    expected = tuple(sizes[letter] for letter in letters)
    if hidden.shape != expected:
        raise ValueError(
            f"hidden must have shape {expected}, axes {letters!r} for data_format "
            f"{options.data_format!r}, or ({options.num_hidden_units},); got {hidden.shape}."
        )
    return jnp.moveaxis(hidden, letters.index("C"), -1)


def merge(options: BidirectionalOptions, forward: Any, backward: Any) -> Any:
    """Joins what the two directions of a bidirectional layer returned; states become a pair."""
    states = ()
    if options.has_state_outputs:
        (forward, first), (backward, second) = forward, backward
        states = ((first, second),)
    if options.merge == "concat":
        axis = formats.channel_axis(options.data_format, options.output_mode)
        y = jnp.concatenate([forward, backward], axis=axis)
    elif options.merge == "mul":
        y = forward * backward
    else:
        y = forward + backward
        y = y / 2 if options.merge == "ave" else y
    return (y, *states) if states else y
