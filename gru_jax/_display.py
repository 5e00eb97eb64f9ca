"""What `str(layer)` prints: the display of the pages, property by property."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def display(layer: Any, leaves: Mapping[str, Any] | None = None) -> str:
    """Returns the display of a layer or cell.

    Args:
      layer: an object with the fields of `CellOptions` or `LayerOptions`.
      leaves: its learnables by name, where they exist already.

    Returns:
      Several lines of text, under the property names of the pages.
    """
    leaves = leaves or {}
    both = "forward" in leaves  # a bidirectional layer
    directions = {key.capitalize(): leaves[key] for key in leaves} if both else {"": leaves}
    leaves = leaves["forward"] if both else leaves
    projected = layer.input_projector_size or layer.output_projector_size
    projected = projected or "input_projector" in leaves or "output_projector" in leaves
    head = {"Name": layer.name or ""}
    hyper = {"InputSize": _input_size(layer, leaves), "NumHiddenUnits": layer.num_hidden_units}
    if projected:
        hyper["InputProjectorSize"] = _columns(leaves, "input", layer)
        hyper["OutputProjectorSize"] = _columns(leaves, "output", layer)
    state = {}
    if hasattr(layer, "output_mode"):
        head |= {
            "InputNames": _names(layer.input_names),
            "OutputNames": _names(layer.output_names),
            "NumInputs": layer.num_inputs,
            "NumOutputs": layer.num_outputs,
            "HasStateInputs": int(layer.has_state_inputs),
            "HasStateOutputs": int(layer.has_state_outputs),
        }
        hyper["OutputMode"] = layer.output_mode
        state["HiddenState"] = _array(layer.hidden_state)
    hyper |= {
        "StateActivationFunction": layer.state_activation_function,
        "GateActivationFunction": layer.gate_activation_function,
        "ResetGateMode": layer.reset_gate_mode,
    }
    names = ["input_weights", "recurrent_weights", "bias"]
    names += ["input_projector", "output_projector"] if projected else []
    learnables = {
        direction + "".join(word.capitalize() for word in name.split("_")): _array(arrays.get(name))
        for direction, arrays in directions.items()
        for name in names
    }
    sections = {"Hyperparameters": hyper, "Learnable Parameters": learnables}
    if state:
        sections["State Parameters"] = state
    return _join(type(layer).__name__, head, sections)


def _join(title: str, head: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> str:
    width = max(len(name) for block in (head, *sections.values()) for name in block)
    blocks = [f"{title} with properties:", _block(head, width)]
    blocks += [f"  {name}\n{_block(block, width)}" for name, block in sections.items()]
    return "\n\n".join(blocks)


def _block(values: Mapping[str, Any], width: int) -> str:
    return "\n".join(f"    {name:>{width}}: {_value(value)}" for name, value in values.items())


class _Text(str):
    """Text that is shown without quotes."""


def _value(value: Any) -> str:
    return str(value) if isinstance(value, _Text) else repr(value)


def _names(names: tuple[str, ...]) -> _Text:
    return _Text("{" + "  ".join(repr(name) for name in names) + "}")


def _array(value: Any) -> _Text:
    if value is None:
        return _Text("[]")
    shape = tuple(np.shape(value)) or (1,)
    dtype = f" {value.dtype}" if hasattr(value, "dtype") else ""
    return _Text("[" + "×".join(map(str, shape if len(shape) > 1 else (*shape, 1))) + dtype + "]")


def _input_size(layer: Any, leaves: Mapping[str, Any]) -> int | str:
    if "input_projector" in leaves:
        return leaves["input_projector"].shape[0]
    return leaves["input_weights"].shape[1] if leaves else layer.input_size


def _columns(leaves: Mapping[str, Any], side: str, layer: Any) -> Any:
    leaf = leaves.get(f"{side}_projector")
    return getattr(layer, f"{side}_projector_size") if leaf is None else leaf.shape[1]
