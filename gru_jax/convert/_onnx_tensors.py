"""Arrays in ONNX tensors, bit by bit; a file's claims are checked before anything is allocated."""

import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gru_jax import _checks
from gru_jax.convert._arrays import BFLOAT16, FLOATS

if TYPE_CHECKING:
    import onnx

ELEMENT_TYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
    np.dtype(np.float16): 10,
    np.dtype(np.float64): 11,
    np.dtype(BFLOAT16): 16,
}  # numbers of onnx.TensorProto.DataType
_TYPED_FIELDS = {"float32": "float_data", "float64": "double_data"}  # the others: int32_data
_FIELDS = (
    "raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data",
    "string_data",
)  # fmt: skip
_EXTERNAL = 1  # onnx.TensorProto.DataLocation


def load_onnx() -> ModuleType:
    """Returns the package onnx."""
    return _checks.package("onnx", "onnx", "ONNX models need")


def to_tensor(name: str, a: np.ndarray) -> "onnx.TensorProto":
    """Returns an array as a tensor."""
    proto = load_onnx().TensorProto(name=name, dims=a.shape, data_type=ELEMENT_TYPES[a.dtype])
    proto.raw_data = a.astype(a.dtype.newbyteorder("<")).tobytes()
    return proto


def from_tensor(
    what: str, proto: "onnx.TensorProto", folder: Path | None, kinds: Iterable[type] = FLOATS
) -> np.ndarray:
    """Returns a tensor as an array.

    Args:
      what: what messages call it.
      proto: the tensor.
      folder: the model's, where data may lie in other files; None if the model came without one.
      kinds: the types that it may have.

    Raises:
      ValueError: its type is another one, or its shape and its data do not agree.
    """
    wanted = {ELEMENT_TYPES[np.dtype(kind)]: np.dtype(kind) for kind in kinds}
    if proto.data_type not in wanted:
        listed = " or ".join(str(dtype) for dtype in wanted.values())
        names = {n: name.lower() for name, n in load_onnx().TensorProto.DataType.items()}
        found = names.get(proto.data_type, f"type {proto.data_type}")
        raise ValueError(f"{what} must be of {listed}, got {found}.")
    dtype, shape = wanted[proto.data_type], tuple(proto.dims)
    if min(shape, default=1) < 1:
        raise ValueError(f"{what} must have positive sizes, got shape {shape}.")
    needed = math.prod(shape) * dtype.itemsize  # of Python's integers, which do not overflow
    if proto.data_location == _EXTERNAL:
        data = _external_data(what, proto, folder, needed)
    else:
        data = _own_data(what, proto, dtype)
    if len(data) != needed:
        raise ValueError(
            f"{what} must hold {needed} bytes for shape {shape} in {dtype}, got {len(data)}."
        )
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _own_data(what: str, proto: "onnx.TensorProto", dtype: np.dtype) -> bytes:
    """The data inside the tensor, as little-endian bytes."""
    typed = _TYPED_FIELDS.get(dtype.name, "int32_data")
    filled = [field for field in _FIELDS if len(getattr(proto, field))]
    if proto.HasField("segment") or filled not in ([], ["raw_data"], [typed]):
        raise ValueError(
            f"{what} must hold all of its data in raw_data or in {typed}, got "
            f"{' and '.join(filled)}{' in segments' * proto.HasField('segment')}."
        )
    if filled != [typed]:
        return proto.raw_data
    numbers = np.array(getattr(proto, typed))
    if dtype.itemsize == 2:  # integers hold the bits of half-precision numbers
        if numbers.min() < 0 or numbers.max() > 0xFFFF:
            raise ValueError(f"{what} must hold numbers of 16 bits in {typed}, got larger ones.")
        return numbers.astype("<u2").tobytes()
    return numbers.astype(dtype.newbyteorder("<")).tobytes()


def _external_data(what: str, proto: "onnx.TensorProto", folder: Path | None, needed: int) -> bytes:
    """The data in another file, which must lie in the model's folder."""
    if folder is None:
        raise ValueError(
            f"{what} lies in another file: pass the model's path, or load it with onnx.load."
        )
    entries = {str(entry.key): str(entry.value) for entry in proto.external_data}
    location = entries.get("location", "")
    path = (folder / location).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{what} must lie in a file of the model's folder, got {location!r}.")
    offset, length = entries.get("offset", "0"), entries.get("length", str(needed))
    size = path.stat().st_size
    sound = offset.isdecimal() and len(offset) < 20 and length == str(needed)
    if not sound or int(offset) + needed > size:
        raise ValueError(
            f"{what} must hold {needed} bytes, got {length!r} from byte {offset!r} on in a file "
            f"of {size}."
        )
    with path.open("rb") as file:
        file.seek(int(offset))
        return file.read(needed)
