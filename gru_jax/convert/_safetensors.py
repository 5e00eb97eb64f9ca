"""Safetensors: the leaves under their own names, the options in the file's metadata."""

import json
import os
from typing import Any

import numpy as np

from gru_jax import _arguments, _checks
from gru_jax._params import LEAF_NAMES, OPTION_CHECKS, GRUParams
from gru_jax.convert import _arrays, _files

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": _arrays.BFLOAT16}
NEEDED_BY = "safetensors files need"


def to_safetensors(
    params: GRUParams, file: str | os.PathLike | None = None, *, prefix: str = ""
) -> bytes:
    """Returns parameters as the content of a safetensors file, and writes the file if named.

    The arrays are stored bit by bit under `prefix` and the names of `GRUParams`, projectors
    included; the three options stand in the metadata as text, under `prefix` and their names.

    Args:
      params: the parameters, of any floating-point types.
      file: path of a file to write; one that exists is replaced, as a whole or not at all.
      prefix: put before every name, for example "encoder.gru.".

    Returns:
      The bytes of the file.

    Raises:
      ValueError: shapes do not fit, or an activation function is no name.
      TypeError: a leaf is no array of floating-point numbers.
      ModuleNotFoundError: the package safetensors is missing.

    References:
      https://huggingface.co/docs/safetensors

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> convert.from_safetensors(convert.to_safetensors(params))
      GRUParams(input_weights=float32(15, 3), recurrent_weights=float32(15, 5), bias=float32(15,))
    """
    _arguments.sizes_of(params)
    options = _files.names_of_options(params)
    arrays = {name: _arrays.array(name, value) for name, value in params.arrays().items()}
    data = _checks.package("safetensors.numpy", "safetensors", NEEDED_BY).save(
        {prefix + name: np.ascontiguousarray(value) for name, value in arrays.items()},
        {prefix + option: value for option, value in options.items()},
    )
    if file is not None:
        _files.write(file, data)
    return data


def from_safetensors(
    source: str | os.PathLike | bytes,
    *,
    prefix: str = "",
    reset_gate_mode: str | None = None,
    state_activation_function: Any = None,
    gate_activation_function: Any = None,
) -> GRUParams:
    """Reads parameters from safetensors; the inverse of `to_safetensors`, without arguments.

    A file from elsewhere must hold the arrays in the shapes of `GRUParams`, with rows in the order
    reset, update, candidate. Arrays without the prefix are other layers', and so are those with a
    dot or a slash after it; they are left alone. Any other that is no leaf is refused: it stands
    where only this GRU's arrays should, and would be dropped in silence.

    Args:
      source: path of a file, or its content. It is read as a whole.
      prefix: what stands before the names, for example "encoder.gru.".
      reset_gate_mode: None (default) for the one in the metadata; without one there, a bias of 6H
        means "recurrent-bias-after-multiplication" and one of 3H "after-multiplication".
        "before-multiplication" has the same shapes and so must be said.
      state_activation_function: None (default) for the one in the metadata, or else "tanh".
      gate_activation_function: None (default) for the one in the metadata, or else "sigmoid".

    Returns:
      The parameters, as NumPy arrays of the stored dtypes.

    Raises:
      ValueError: the content is no safetensors file, is cut off, lacks an array, has others or
        ones of wrong types or shapes, or its metadata contradict an argument.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the package safetensors is missing.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(
      ...     jax.random.key(0), 5, 3, reset_gate_mode="before-multiplication")
      >>> data = convert.to_safetensors(params, prefix="encoder.")
      >>> convert.from_safetensors(data, prefix="encoder.").reset_gate_mode
      'before-multiplication'
    """
    asked = {
        "reset_gate_mode": reset_gate_mode,
        "state_activation_function": state_activation_function,
        "gate_activation_function": gate_activation_function,
    }
    if isinstance(source, bytes | bytearray | memoryview):
        file, data = "safetensors", bytes(source)
    else:
        file = os.fspath(source)
        with open(file, "rb") as stream:
            data = stream.read()
    with _files.reading(file):
        stored, metadata = _parse(data)
        arrays = {name: _array(prefix + name, stored) for name in _present(stored, prefix)}
        saved = {o: metadata[prefix + o] for o in OPTION_CHECKS if prefix + o in metadata}
        unknown = [o for o in OPTION_CHECKS if asked[o] is None and o not in saved]
        if saved and unknown:
            raise ValueError(
                f"its metadata must hold all options or none, {', '.join(unknown)} are missing. "
                "Pass them as arguments."
            )
        return _files.assemble(arrays, saved, asked)


def _parse(data: bytes) -> tuple[dict[str, dict], dict[str, str]]:
    """Returns what the file says of each array, bytes included, and its metadata."""
    safetensors = _checks.package("safetensors", "safetensors", NEEDED_BY)
    with _files.parsing("a safetensors file"):
        stored = dict(safetensors.deserialize(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return stored, header.get("__metadata__") or {}


def _present(stored: dict[str, dict], prefix: str) -> list[str]:
    """The leaves that are there; all that must be, and nothing else beside them."""
    required = tuple(prefix + name for name in LEAF_NAMES[:3])
    _arrays.pick("it", stored, required)
    beside = [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]
    other = [n for n in beside if n not in LEAF_NAMES and not set(n) & set("./")]
    if other:
        raise ValueError(
            f"only {', '.join(LEAF_NAMES)} may stand at the prefix {prefix!r}, got also "
            f"{', '.join(sorted(other)[:12])}. Save the GRU under a prefix of its own."
        )
    return [name for name in LEAF_NAMES if prefix + name in stored]


def _array(name: str, stored: dict[str, dict]) -> np.ndarray:
    """One array, copied out of the content."""
    entry = stored[name]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} must be {', '.join(DTYPES)}, got {entry['dtype']}.")
    little = np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<")
    flat = np.frombuffer(entry["data"], little).astype(DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"])
