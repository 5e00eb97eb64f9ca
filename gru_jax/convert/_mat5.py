"""MATLAB's files of version 5 to 7: a header of 128 bytes, then elements of tag and content.

Read here and not by SciPy, whose reader ends the whole process on some damaged files. Nothing is
read beyond its element, checksums are verified, and variables that nobody asks for stay packed.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from gru_jax.convert._files import ContentError, Foreign, Lazy

HEADER = b"MATLAB 5.0 MAT-file, Created by: gru_jax".ljust(116) + bytes(8) + b"\x00\x01IM"
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
CODECS = {1: "ascii", 2: "ascii", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
INT8, UINT16, INT32, UINT32, MATRIX, COMPRESSED = 1, 4, 5, 6, 14, 15
CLASSES = {
    1: "cell", 2: "struct", 4: "char", 5: "sparse", 6: "double", 7: "single", 8: "int8",
    9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32", 14: "int64", 15: "uint64",
}  # fmt: skip
OPAQUE = 17  # of objects; these have no sizes
LOGICAL, COMPLEX = 1 << 9, 1 << 11
LARGEST = 2**31 - 1


def workspace(data: bytes) -> Lazy:
    """Returns the variables of a file, each read when it is asked for."""
    order = "<" if data[126:128] == b"IM" else ">"
    readers = {}
    for kind, content in _elements(memoryview(data)[128:], order):
        if kind == COMPRESSED:
            start = zlib.decompressobj().decompress(content, 1024)  # flags, sizes and name
            value = partial(_inflated, content, order)
        elif kind == MATRIX:
            start, value = content, partial(_value, content, order)
        else:
            raise ContentError(f"it holds an element of the unknown kind {kind}.")
        name = _name(memoryview(start)[8 if kind == COMPRESSED else 0 :], order)
        if name in readers:
            raise ContentError(f"it holds two variables {name}.")
        if name:  # what has no name belongs to objects
            readers[name] = value
    return Lazy(readers)


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Kind and content of each element; those of at most four bytes stand in their tags."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        start = at + 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        end = start + size
        if end > len(data) or (start == at + 4 and size > 4):
            raise ContentError("it is cut off or damaged.")
        yield kind, data[start:end]
        at = end if kind == COMPRESSED else -(-end // 8) * 8


def _inflated(content: memoryview, order: str) -> Any:
    """The value of a compressed variable, whose checksum must be right."""
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(content, LARGEST)
    if not unpacker.eof or unpacker.unused_data:
        raise ContentError("a compressed variable is cut off, too long or too large.")
    ((kind, matrix),) = _elements(memoryview(data), order)
    if kind != MATRIX:
        raise ContentError("a compressed variable is no matrix.")
    return _value(matrix, order)


def _flags(element: tuple[int, memoryview], order: str) -> int:
    """The class of a matrix in the lowest byte, and its flags."""
    kind, content = element
    if kind != UINT32 or len(content) != 8:
        raise ContentError("a matrix has no class.")
    return struct.unpack_from(order + "I", content)[0]


def _name(matrix: memoryview, order: str) -> str:
    """The name of a matrix, from its first bytes."""
    parts = _elements(matrix, order)
    if _flags(next(parts), order) & 0xFF != OPAQUE:
        next(parts)  # the sizes, which an object has not
    return bytes(next(parts)[1]).decode("latin1")


def _value(matrix: memoryview, order: str) -> Any:
    """What a matrix is: numbers, a text, a struct, or nothing that can be used here."""
    if not matrix:
        return np.empty((0, 0))
    first, sizes, _, *rest = _elements(matrix, order)
    flags = _flags(first, order)
    kind = CLASSES.get(flags & 0xFF, "object")
    if flags & (LOGICAL | COMPLEX):
        return Foreign("logical" if flags & LOGICAL else "complex")
    if kind not in READERS:
        return Foreign(kind)
    shape = tuple(np.frombuffer(sizes[1], order + "i4").tolist())
    return READERS[kind](shape, rest, order)


def _numbers(kind: str, shape: tuple, parts: list, order: str) -> np.ndarray:
    """A matrix of a class; MATLAB may keep whole numbers in fewer bytes."""
    ((stored, content),) = parts
    flat = np.frombuffer(content, order + NUMBERS[stored])
    itemsize = np.dtype(kind).itemsize
    if flat.size != math.prod(shape) or flat.itemsize > itemsize:
        raise ContentError(f"a {kind} matrix of shape {shape} holds {flat.size} {flat.dtype}.")
    if flat.size * itemsize > LARGEST:
        raise ContentError(f"a {kind} matrix must have less than 2 GiB, got shape {shape}.")
    return flat.astype(kind, copy=False).reshape(shape, order="F")


def _text(shape: tuple, parts: list, order: str) -> str | Foreign:
    """A row of characters."""
    ((stored, content),) = parts
    codec = CODECS[stored] + {"<": "-le", ">": "-be"}[order] * (CODECS[stored] == "utf-16")
    text = bytes(content).decode(codec)
    if len(text) != math.prod(shape):
        raise ContentError(f"a char matrix of shape {shape} holds {len(text)} characters.")
    return text if shape[0] == 1 or not text else Foreign("char of several rows")


def _fields(shape: tuple, parts: list, order: str) -> Lazy | Foreign:
    """The fields of a struct."""
    if math.prod(shape) != 1:
        return Foreign("array of structs")
    (_, width), (_, names), *values = parts
    (width,) = struct.unpack(order + "i", width)
    names = [
        bytes(names[n : n + width]).partition(b"\0")[0].decode("latin1")
        for n in range(0, len(names), width)
    ]
    if len(names) != len(values):
        raise ContentError("a struct has another number of fields than of values")
    return Lazy({n: partial(_value, v, order) for n, (_, v) in zip(names, values, strict=True)})


READERS: dict[str, Callable] = {
    "double": partial(_numbers, "double"), "single": partial(_numbers, "single"),
    "char": _text, "struct": _fields,
}  # fmt: skip


def content(variables: Mapping[str, np.ndarray | str]) -> bytes:
    """Returns the bytes of a v7 file with these variables, matrices of class double or single."""
    return HEADER + b"".join(_variable(name, value) for name, value in variables.items())


def _variable(name: str, value: np.ndarray | str) -> bytes:
    """A compressed matrix."""
    if isinstance(value, str):
        number, shape, kind, data = 4, (1, len(value)), UINT16, value.encode("utf-16-le")
    else:
        number, kind = (7, 7) if value.dtype == np.float32 else (6, 9)
        shape, data = value.shape, value.astype(value.dtype.newbyteorder("<")).tobytes("F")
    parts = (
        (UINT32, struct.pack("<II", number, 0)),
        (INT32, struct.pack("<ii", *shape)),
        (INT8, name.encode("ascii")),
        (kind, data),
    )
    matrix = b"".join(_element(*part) for part in parts)
    if len(matrix) > LARGEST - 8:
        raise ValueError(f"{name} must have less than 2 GiB in a v7 file. Write version='v7.3'.")
    packed = zlib.compress(_element(MATRIX, matrix))
    return struct.pack("<II", COMPRESSED, len(packed)) + packed


def _element(kind: int, data: bytes) -> bytes:
    """A tag and its content; up to four bytes stand in the tag."""
    if len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)
