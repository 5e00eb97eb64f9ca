"""GRU layers for Flax linen: they own the arrays and call the functional core.

Collection "params" holds the learnables under the names of the fields of `GRUParams`. A layer
computes with the leaves it finds there, projectors or none, so a model is projected by changing
its parameters alone.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax import serialization

from gru_jax._initializers import init_leaf
from gru_jax._layer import (
    BidirectionalOptions,
    ProjectedLayerOptions,
    call_cell,
    call_layer,
    cell_input,
    input_of,
    merge,
    state_pair,
    stored_state,
)
from gru_jax._options import CellOptions, LayerOptions
from gru_jax._pair import call_directions
from gru_jax._params import LEAVES, GRUParams, Leaf, Sizes

__all__ = ["BidirectionalGRULayer", "GRUCell", "GRULayer", "GRUProjectedLayer", "reset_state"]
STATE, HIDDEN = "state", "hidden_state"  # collection and variable of a stateful layer


# pyrefly: ignore[inconsistent-inheritance]
class GRULayer(LayerOptions, nn.Module, kw_only=True):
    """A GRU over sequences, for Flax linen.

    Options, all keywords but the first: those of `gru_jax.LayerOptions` and `gru_jax.CellOptions`,
    where each is described, and linen's `name`. The equations stand at `gru_jax.gru_cell`, the
    meaning of lengths, masks and resets at `gru_jax.gru`. The input size comes from the first
    input. A call changes nothing unless `stateful` is True: then the state is kept in the
    collection "state", which `apply(..., mutable=["state"])` returns (without `mutable` it is read
    and not written) and `gru_jax.linen.reset_state` clears; `init` does not make it. A loop such as
    `nn.scan(..., variable_carry="state")` needs it there before its first step: call the layer once
    outside the loop, or put zeros (*batch, H) under its "hidden_state".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gru_jax.linen import GRULayer
      >>> layer = GRULayer(100, output_mode="last")
      >>> x = jnp.ones((2, 7, 12))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x, lengths=jnp.array([7, 4])).shape
      (2, 100)
    """

    def __post_init__(self) -> None:
        self.settle()
        super().__post_init__()

    @nn.compact
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
          TypeError: wrong dtypes, as in `gru_jax.gru`.
          ValueError: wrong shapes or options, as in `gru_jax.gru`.
        """
        x = input_of(self, x)
        leaves = _leaves(self, x.shape[-1])
        stored = self.get_variable(STATE, HIDDEN) if self.stateful else None
        result, final = call_layer(self, leaves, x, hidden, stored, lengths, mask, resets)
        if self.stateful and self.is_mutable_collection(STATE) and not self.is_initializing():
            self.put_variable(STATE, HIDDEN, final)
        return result

    def known_leaves(self) -> Mapping[str, Any]:
        """Returns the learnables of a bound layer, by name."""
        return _known(self)


class GRUProjectedLayer(ProjectedLayerOptions, GRULayer, kw_only=True):
    """A GRU with learnable projectors, for Flax linen: W' (Q_iᵀ x) and R' (Q_oᵀ h).

    It stores 4·H·P_o numbers instead of 3H², and (3H + I)·P_i instead of 3H·I, and keeps the width
    of its output. Other options, and calls, are those of `GRULayer`.

    Args:
      num_hidden_units: H.
      output_projector_size: P_o; output before input, as on the pages.
      input_projector_size: P_i.

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> from gru_jax.linen import GRUProjectedLayer
      >>> layer = GRUProjectedLayer(100, 25, 9)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 7, 12)))
      >>> gru_jax.num_learnables(variables["params"])
      13108
    """


# pyrefly: ignore[inconsistent-inheritance]
class BidirectionalGRULayer(BidirectionalOptions, nn.Module, kw_only=True):
    """Two GRUs over the same sequences, one from each end, for Flax linen.

    Sub-trees "forward" and "backward". `merge` joins the outputs: "concat" (default), "sum", "mul"
    or "ave"; output mode "last" joins the two final states. `hidden` is a pair, in and out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gru_jax.linen import BidirectionalGRULayer
      >>> layer = BidirectionalGRULayer(100)
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 7, 12)))[0].shape
      (2, 7, 200)
    """

    def __post_init__(self) -> None:
        self.settle()
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Any, hidden: Any = None, *, lengths=None, mask=None, resets=None) -> Any:
        """Runs both directions and merges them; arguments as in `GRULayer`, `hidden` a pair."""
        options = {"lengths": lengths, "mask": mask, "resets": resets}
        pair = state_pair(self, hidden)
        calls = []
        for backward, name in ((False, "forward"), (True, "backward")):
            layer = GRULayer(**self.direction(backward=backward), name=name)
            calls.append(partial(layer, x, pair[backward], **options))
        return merge(self, *call_directions(self, calls))

    def known_leaves(self) -> Mapping[str, Any]:
        """Returns the learnables of a bound layer, by direction and name."""
        return _known(self)


class GRUCell(CellOptions, nn.RNNCellBase, kw_only=True):
    """One step of a GRU in linen's cell protocol, for `flax.linen.RNN`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from gru_jax.linen import GRUCell
      >>> rnn = nn.RNN(GRUCell(100))
      >>> rnn.init_with_output(jax.random.key(0), jnp.ones((2, 7, 12)))[0].shape
      (2, 7, 100)
    """

    def __post_init__(self) -> None:
        self.settle()
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """Takes one step: (*batch, H) and (*batch, I) to the new carry and the output."""
        inputs = cell_input(self, inputs)
        return call_cell(self, _leaves(self, inputs.shape[-1]), carry, inputs)

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> jax.Array:
        """Returns zeros of shape (*batch, H) for inputs of shape (*batch, I)."""
        return stored_state(self, tuple(input_shape[:-1]))

    @property
    def num_feature_axes(self) -> int:
        """Number of axes of one input vector."""
        return 1

    def known_leaves(self) -> Mapping[str, Any]:
        """Returns the learnables of a bound cell, by name."""
        return _known(self)


# GRUParams go to flax.serialization by name, alone and in the states of solvers.
serialization.register_serialization_state(
    GRUParams,
    lambda params: serialization.to_state_dict(params.arrays()),
    lambda params, saved: params.replace(**serialization.from_state_dict(params.arrays(), saved)),
    override=True,
)


def reset_state(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables whose stateful GRU layers start again from their `hidden_state`.

    Args:
      variables: what `init` or `apply(..., mutable=["state"])` gave, with a collection "state".

    Returns:
      A copy without the variables named "hidden_state" in that collection; all else is kept.

    Example:
      >>> from gru_jax import linen
      >>> linen.reset_state({"params": {}, "state": {"hidden_state": 1.0}})
      {'params': {}}
    """
    kept = _without_hidden(variables.get(STATE, {}))
    rest = {name: collection for name, collection in variables.items() if name != STATE}
    return rest | ({STATE: kept} if kept else {})


def _without_hidden(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            value = _without_hidden(value)
            if not value:
                continue
        elif name == HIDDEN:
            continue
        kept[name] = value
    return kept


def _leaves(module: Any, input_size: int) -> dict[str, jax.Array]:
    """The leaves that the module was given, or at `init` those that its options ask for."""
    if module.input_size != "auto":
        input_size = module.input_size
    sizes, leaves = module.sizes(input_size), {}
    for leaf in LEAVES:
        if module.has_variable("params", leaf.name):
            leaves[leaf.name] = nn.meta.unbox(module.get_variable("params", leaf.name))
        elif leaf.shape(sizes) and (leaf.per_gate or module.is_initializing()):
            leaves[leaf.name] = module.param(leaf.name, partial(_init, module, leaf, sizes))
    return leaves


def _init(module: Any, leaf: Leaf, sizes: Sizes, key: jax.Array) -> Any:
    draw = partial(init_leaf, leaf, getattr(module, f"{leaf.name}_initializer"))
    metadata = dict(getattr(module, f"{leaf.name}_metadata") or {})
    names = metadata.pop("out_sharding", None)
    names = (names,) if isinstance(names, str) else names
    if metadata:
        raise ValueError(
            f"{leaf.name}_metadata may hold only 'out_sharding' in linen, got {sorted(metadata)}."
        )
    if names is not None:
        draw = nn.with_partitioning(draw, tuple(names))
    return draw(key, sizes, module.param_dtype)


def _known(module: Any) -> Mapping[str, Any]:
    bound = {} if module.scope is None else nn.meta.unbox(module.variables.get("params", {}))
    return bound or CellOptions.known_leaves(module)
