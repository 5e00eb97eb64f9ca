"""GRU layers for Flax nnx: they own the arrays and call the functional core.

Learnables are `nnx.Param`s named as the fields of `GRUParams`; an absent projector is None.
"""

import contextlib
import dataclasses
from functools import partial
from typing import Any

import jax
from flax import nnx

from gru_jax import _layer
from gru_jax._initializers import Given
from gru_jax._options import CellOptions, LayerOptions
from gru_jax._pair import call_directions
from gru_jax._params import LEAF_NAMES, GRUParams

__all__ = ["BidirectionalGRULayer", "GRUCell", "GRULayer", "GRUProjectedLayer", "HiddenState"]


class HiddenState(nnx.Variable):
    """The state that a layer with `stateful=True` keeps between calls."""


with contextlib.suppress(ValueError):  # the name may be taken; only Flax's bridge would use it
    nnx.register_variable_name("state", HiddenState)


@dataclasses.dataclass(eq=False, repr=False)
class _Owner(CellOptions, nnx.Module):
    """Draws the learnables or takes those given, and lets an array be assigned to them."""

    _: dataclasses.KW_ONLY
    name: str = ""
    rngs: dataclasses.InitVar[nnx.Rngs | None] = None

    def __post_init__(self, rngs: nnx.Rngs | None) -> None:
        self.settle()
        if not isinstance(rngs, nnx.Rngs | None):
            raise TypeError(f"rngs must be an nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}.")
        for leaf, value in _layer.initial_leaves(self, None if rngs is None else rngs.params):
            data = dict(getattr(self, f"{leaf.name}_metadata") or {})
            setattr(self, leaf.name, nnx.data(None) if value is None else nnx.Param(value, **data))
            if isinstance(getattr(self, f"{leaf.name}_initializer"), Given):  # now in its Param
                object.__setattr__(self, f"{leaf.name}_initializer", leaf.initializer)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in LEAF_NAMES or "_settled" not in vars(self):
            super().__setattr__(name, value)
        elif value is None or isinstance(value, nnx.Variable | dataclasses.Field):  # of nnx.data
            nnx.Module.__setattr__(self, name, value)
        else:
            given, current = Given(name, value), vars(self).get(name)
            if current is None:
                setattr(self, name, nnx.Param(given(None, given.shape, self.param_dtype)))
            else:
                current[...] = given(None, current[...].shape, current[...].dtype)

    def set_learnables(self, params: GRUParams) -> None:
        """Takes the arrays of `params`, projected or not, and keeps everything else."""
        for name in LEAF_NAMES:
            value, current = getattr(params, name), getattr(self, name)
            if name.endswith("projector"):
                size = None if value is None else value.shape[1]
                object.__setattr__(self, f"{name}_size", size)
            if value is None or current is None:
                data = dict(getattr(self, f"{name}_metadata") or {})
                setattr(self, name, nnx.data(None) if value is None else nnx.Param(value, **data))
            else:
                current.set_value(value)
        if type(self) in (GRULayer, GRUProjectedLayer):  # what it is called follows what it is
            both = self.input_projector_size and self.output_projector_size
            object.__setattr__(self, "__class__", GRUProjectedLayer if both else GRULayer)

    def known_leaves(self) -> dict[str, Any]:
        """Returns the learnables that are present, by name: variables, or arrays of nnx.as_pure."""
        held = {name: getattr(self, name) for name in LEAF_NAMES}
        known = {n: v.get_value() if isinstance(v, nnx.Variable) else v for n, v in held.items()}
        return {name: value for name, value in known.items() if value is not None}


@dataclasses.dataclass(eq=False, repr=False)
class GRULayer(_Owner, LayerOptions):
    """A GRU over sequences, for Flax nnx.

    Options, all keywords but the first: those of `gru_jax.LayerOptions` and `gru_jax.CellOptions`,
    where each is described, and the two below. The equations stand at `gru_jax.gru_cell`, the
    meaning of lengths, masks and resets at `gru_jax.gru`.

    A call changes nothing unless `stateful` is True: then the state is kept in the variable
    `state`, a `HiddenState`. Transformations of nnx carry its changes on; plain `jax.jit` drops
    them without a word: there, use `has_state_inputs` and `has_state_outputs`. Learnables,
    `hidden_state`, factors and `name` can be assigned; read-only options cannot.

    Args:
      name: a name for display.
      rngs: `nnx.Rngs`, whose stream "params" the learnables are drawn from.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gru_jax.nnx import GRULayer
      >>> layer = GRULayer(100, input_size=12, output_mode="last", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 7, 12)), lengths=jnp.array([7, 4])).shape
      (2, 100)
    """

    def __post_init__(self, rngs: nnx.Rngs | None) -> None:
        super().__post_init__(rngs)
        if self.stateful:
            self.state = HiddenState(_layer.stored_state(self))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "hidden_state" and "state" in vars(self):
            self.reset_state()

    def __call__(self, x: Any, hidden: Any = None, *, lengths=None, mask=None, resets=None) -> Any:
        """Runs the layer.

        Args:
          x: inputs with the axes of `data_format`, (*batch, time, channels) by default.
          hidden: initial state, with `has_state_inputs` only, in the format of the "last" output.
          lengths: integers (*batch,): right padding begins there.
          mask: booleans (*batch, time): False at steps to skip.
          resets: booleans (*batch, time): the state returns to the initial one before such a step.

        Returns:
          y, or (y, hidden) with `has_state_outputs`.

        Raises:
          TypeError, ValueError: as in `gru_jax.gru`.
        """
        if self.stateful and not isinstance(self.state, nnx.Variable):
            raise ValueError("stateful must be False: nnx.as_pure left no variable to write to.")
        stored = self.state.get_value() if self.stateful else None
        call = _layer.input_of(self, x), hidden, stored, lengths, mask, resets
        result, final = _layer.call_layer(self, self.known_leaves(), *call)
        if self.stateful:
            self.state.set_value(final)
        return result

    def reset_state(self, batch_shape: tuple[int, ...] = ()) -> None:
        """Returns the state of a stateful layer to `hidden_state`, or zeros.

        Args:
          batch_shape: shape of the batch to come; by default the state fits any batch.

        Raises:
          ValueError: the layer is not stateful.
        """
        if not self.stateful:
            raise ValueError("reset_state needs a layer made with stateful=True.")
        self.state.set_value(_layer.stored_state(self, tuple(batch_shape)))


@dataclasses.dataclass(eq=False, repr=False)
class GRUProjectedLayer(_layer.ProjectedLayerOptions, GRULayer):
    """A GRU with learnable projectors, for Flax nnx: W' (Q_iᵀ x) and R' (Q_oᵀ h).

    It stores 4·H·P_o numbers instead of 3H², and (3H + I)·P_i instead of 3H·I, and keeps the width
    of its output. The first three arguments are `num_hidden_units`, `output_projector_size` and
    `input_projector_size`, as on the pages; other options, and calls, are those of `GRULayer`.

    Example:
      >>> import gru_jax
      >>> from flax import nnx
      >>> from gru_jax.nnx import GRUProjectedLayer
      >>> layer = GRUProjectedLayer(100, 25, 9, input_size=12, rngs=nnx.Rngs(0))
      >>> gru_jax.num_learnables(nnx.state(layer, nnx.Param))
      13108
    """


@dataclasses.dataclass(eq=False, repr=False)
class BidirectionalGRULayer(_layer.BidirectionalOptions, nnx.Module):
    """Two GRUs over the same sequences, one from each end, for Flax nnx.

    Sub-modules `forward` and `backward`. `merge` joins the outputs: "concat", "sum", "mul" or
    "ave"; output mode "last" joins the two final states. `hidden` is a pair, in and out.

    Args:
      name: a name for display.
      rngs: `nnx.Rngs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gru_jax.nnx import BidirectionalGRULayer
      >>> layer = BidirectionalGRULayer(100, input_size=12, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 7, 12))).shape
      (2, 7, 200)
    """

    _: dataclasses.KW_ONLY
    name: str = ""
    rngs: dataclasses.InitVar[nnx.Rngs | None] = None

    def __post_init__(self, rngs: nnx.Rngs | None) -> None:
        self.settle()
        self.forward = GRULayer(**self.direction(backward=False), rngs=rngs)
        self.backward = GRULayer(**self.direction(backward=True), rngs=rngs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "backward" in vars(self) and name in self.direction(backward=False):
            setattr(self.forward, name, self.direction(backward=False)[name])
            setattr(self.backward, name, self.direction(backward=True)[name])

    def reset_state(self, batch_shape: tuple[int, ...] = ()) -> None:
        """Returns both states to `hidden_state`, or zeros, for a batch of this shape (or any)."""
        self.forward.reset_state(batch_shape)
        self.backward.reset_state(batch_shape)

    def __call__(self, x: Any, hidden: Any = None, *, lengths=None, mask=None, resets=None) -> Any:
        """Runs both directions and merges them; arguments of `GRULayer`, `hidden` a pair."""
        options = {"lengths": lengths, "mask": mask, "resets": resets}
        layers, pair = (self.forward, self.backward), _layer.state_pair(self, hidden)
        calls = [partial(layers[i], x, pair[i], **options) for i in (0, 1)]
        return _layer.merge(self, *call_directions(self, calls))

    def known_leaves(self) -> dict[str, Any]:
        """Returns the learnables by direction and name."""
        return {"forward": self.forward.known_leaves(), "backward": self.backward.known_leaves()}


@dataclasses.dataclass(eq=False, repr=False)
class GRUCell(_Owner, nnx.RNNCellBase):
    """One step of a GRU in nnx's cell protocol, for `flax.nnx.RNN`.

    Args:
      name: a name for display.
      rngs: `nnx.Rngs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gru_jax.nnx import GRUCell
      >>> rnn = nnx.RNN(GRUCell(100, input_size=12, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
      >>> rnn(jnp.ones((2, 7, 12))).shape
      (2, 7, 100)
    """

    def __call__(self, carry: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """Takes one step: (*batch, H) and (*batch, I) to the new carry and the output."""
        inputs = _layer.cell_input(self, inputs)
        return _layer.call_cell(self, self.known_leaves(), carry, inputs)

    def initialize_carry(self, input_shape: tuple, rngs: Any = None, carry_init: Any = None) -> Any:
        """Returns zeros, or a draw of `carry_init`, (*batch, H) for inputs of shape (*batch, I)."""
        zeros = _layer.stored_state(self, tuple(input_shape[:-1]))
        if carry_init is None:
            return zeros
        if rngs is None:
            raise ValueError("rngs is missing, to draw the carry: pass rngs=nnx.Rngs(0).")
        key = rngs.carry() if isinstance(rngs, nnx.Rngs) else rngs()
        return carry_init(key, zeros.shape, zeros.dtype)

    @property
    def num_feature_axes(self) -> int:
        """Number of axes of one input vector."""
        return 1
