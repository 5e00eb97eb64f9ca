"""MATLAB's v7.3 files: HDF5, with the class of each array beside it and all axes turned round."""

import io
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from gru_jax import _checks
from gru_jax.convert._files import ContentError, Foreign, Lazy

HEADER = b"MATLAB 7.3 MAT-file, Platform: any, Created by: gru_jax HDF5 schema 1.00 ."
VERSION = b"\x00\x02IM"  # at byte 124: version 2.0, little-endian
USER_BLOCK = 512
CLASSES = {"double": np.float64, "single": np.float32, "char": np.uint16}
DENSEST = 1100  # deflate makes at most 1032 bytes of one


def fields(group: Any) -> Lazy:
    """Returns what stands in a group, the whole file or a struct, each read when asked for."""
    return Lazy({name: partial(_value, group, name) for name in group if not name.startswith("#")})


def _value(group: Any, name: str) -> Any:
    """What a name stands for; what it links to elsewhere is not followed."""
    h5py = package()
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        return Foreign("link")
    item = group[name]
    kind = _kind(item)
    if isinstance(item, h5py.Group):
        return fields(item) if kind == "struct" else Foreign(kind)
    if kind not in CLASSES:
        return Foreign(kind)
    matrix = _matrix(name, item, kind)
    return _text(matrix) if kind == "char" else matrix


def package() -> ModuleType:
    """Returns h5py."""
    return _checks.package("h5py", "matlab", "MAT files of v7.3 need")


def _kind(item: Any) -> str:
    """MATLAB's class of a dataset or group."""
    kind = item.attrs.get("MATLAB_class", b"of no MATLAB class")
    kind = kind.decode("latin1") if isinstance(kind, bytes) else str(kind)
    if "MATLAB_object_decode" in item.attrs:
        return "object"
    if "MATLAB_sparse" in item.attrs:
        return "sparse"
    return kind


def _matrix(name: str, item: Any, kind: str) -> Any:
    """An array in MATLAB's orientation."""
    if item.external or item.is_virtual:
        return Foreign("link")
    if item.nbytes > DENSEST * item.id.get_storage_size():
        raise ContentError(f"{name} is said to be {item.shape[::-1]}, and that is not stored.")
    if item.attrs.get("MATLAB_empty", 0):  # its numbers are only the sizes of the axes
        return np.empty((0, 0), CLASSES[kind])
    if item.dtype.names:
        return Foreign("complex")
    if item.dtype.newbyteorder("=") != CLASSES[kind]:
        raise ContentError(f"{name} is said to be {kind} and holds {item.dtype}.")
    return item[()].T


def _text(codes: Any) -> Any:
    """One row of UTF-16 codes as text."""
    if isinstance(codes, Foreign) or (codes.size and codes.shape[0] != 1):
        return Foreign("char of several rows")
    return codes.astype("<u2").tobytes().decode("utf-16-le")


def content(variables: Mapping[str, np.ndarray | str]) -> bytes:
    """Returns the bytes of a file with these variables, matrices of class double or single."""
    h5py, stream = package(), io.BytesIO()
    with h5py.File(stream, "w", userblock_size=USER_BLOCK) as file:
        for name, value in variables.items():
            if isinstance(value, str):
                item = file.create_dataset(name, data=_codes(value))
                item.attrs["MATLAB_class"] = np.bytes_("char")
                item.attrs["MATLAB_int_decode"] = np.int32(2)
            else:
                item = file.create_dataset(name, data=np.ascontiguousarray(value.T))
                item.attrs["MATLAB_class"] = np.bytes_(
                    "single" if value.dtype == np.float32 else "double"
                )
    data = stream.getvalue()
    return (HEADER.ljust(116) + bytes(8) + VERSION).ljust(USER_BLOCK, b"\0") + data[USER_BLOCK:]


def _codes(text: str) -> np.ndarray:
    """A row of characters, as a column of codes."""
    return np.frombuffer(text.encode("utf-16-le"), "<u2")[:, None]
