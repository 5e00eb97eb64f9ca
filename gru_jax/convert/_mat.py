"""What a .mat file or a mapping in MATLAB's words holds: found, understood, checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gru_jax._params import LEAF_NAMES, OPTION_CHECKS
from gru_jax.convert import _arrays, _files, _hdf5, _mat5
from gru_jax.convert._files import ContentError, Foreign

# Options first, what every layer has last: a file that was cut off lacks what it must have.
NAMES = {
    "".join(map(str.capitalize, name.split("_"))): name
    for name in (*OPTION_CHECKS, *reversed(LEAF_NAMES))
}
REQUIRED = ("InputWeights", "RecurrentWeights", "Bias")
OBJECTS = (
    "Objects (layers, networks, dlarrays, tables, strings) can be read by MATLAB only: save plain "
    "arrays, as the documentation of gru_jax.convert.from_matlab shows."
)
HINTS = {
    "struct": "Arrays in a struct are found with variable=, the name of the struct.",
    "cell": "Save its element.",
    "sparse": "Save full(...) of it.",
    "char": "Save the numbers.",
    "link": "Save the array itself.",
    "complex": "Save real numbers.",
    "object": OBJECTS,
    "function_handle": OBJECTS,
}
NUMBERS = (
    "Save double(...) of it. MATLAB keeps whole numbers in fewer bytes: scipy.io.loadmat gives "
    "their class with mat_dtype=True."
)
ORIENTATION = (
    "The rows are those of the gates, as in MATLAB; nothing is transposed here to make it fit, "
    "because that would be a guess. Save the layer's properties as they are."
)
VERSIONS = {b"\x00\x01IM": "v7", b"\x01\x00MI": "v7", b"\x00\x02IM": "v7.3", b"\x02\x00MI": "v7.3"}


def load(file: str, variable: str | None) -> dict[str, Any]:
    """Returns what a file holds of a layer, under MATLAB's names."""
    with open(file, "rb") as stream:
        head = stream.read(128)
        version = VERSIONS.get(head[124:])
        data = head + stream.read() if version == "v7" else head
    if version is None:
        raise ContentError(
            "it must be a .mat file of version 5, 6, 7 or 7.3, which begins with a header of 128 "
            "bytes, and is not. Save it in MATLAB with -v7."
        )
    if version == "v7.3":
        open_file = _hdf5.package().File
        with _files.parsing("a MATLAB v7.3 file"), open_file(file, "r") as stream:
            return take(_hdf5.fields(stream), variable)
    with _files.parsing("a MATLAB v7 file"):
        return take(_mat5.workspace(data), variable)


def take(values: Mapping[str, Any], variable: str | None) -> dict[str, Any]:
    """Returns what stands under MATLAB's names in the struct that `variable` names."""
    for part in variable.split(".") if variable is not None else ():
        if part not in values:
            raise ContentError(f"it must have a struct {part!r}; it has {_listed(values)}.")
        values = _fields(part, values[part])
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        found = f"it must have {', '.join(missing)}; it has {_listed(values)}."
        raise ContentError(f"{found} {HINTS['struct']} {OBJECTS}")
    return {name: values[name] for name in NAMES if name in values}


def _listed(values: Mapping[str, Any]) -> str:
    """The first names of a workspace or struct; objects have none."""
    names = [name for name in values if not name.startswith("__")]
    return ", ".join("an object" if name == "None" else name for name in names[:12]) or "nothing"


def _fields(name: str, value: Any) -> Mapping[str, Any]:
    """The fields of a scalar struct."""
    if isinstance(value, Mapping):
        return value
    kind = _kind(value)
    if kind != "struct" or value.size != 1:
        number = "several structs" if kind == "struct" else kind
        raise ContentError(f"{name} must be one struct of arrays, got {number}. {OBJECTS}")
    return {field: value[field].item() for field in value.dtype.names}


def _kind(value: Any) -> str:
    """MATLAB's word for a value, or NumPy's where that says more."""
    if isinstance(value, Foreign):
        return value.kind
    if type(value).__name__.startswith("Matlab"):  # scipy's objects and function handles
        return "object"
    if isinstance(value, Mapping) or getattr(getattr(value, "dtype", None), "names", None):
        return "struct"
    if isinstance(value, str) or getattr(value, "dtype", np.dtype("V")).kind == "U":
        return "char"
    if hasattr(value, "tocsc"):
        return "sparse"
    kind = str(getattr(value, "dtype", type(value).__name__))
    return {"object": "cell", "bool": "logical"}.get(kind, kind)


def split(found: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the leaves and the options, under the names of `GRUParams`."""
    options = {NAMES[n]: _text(n, v) for n, v in found.items() if NAMES[n] in OPTION_CHECKS}
    matrices = {n: _matrix(n, v) for n, v in found.items() if NAMES[n] in LEAF_NAMES}
    for name in REQUIRED:
        if not matrices[name].size:
            raise ContentError(f"{name} is empty: the layer has not been initialised.")
    matrices = {name: matrix for name, matrix in matrices.items() if matrix.size}
    _check_shapes(matrices)
    matrices["Bias"] = matrices["Bias"][:, 0]
    return {NAMES[name]: matrix for name, matrix in matrices.items()}, options


def _text(name: str, value: Any) -> str:
    """A char variable of one row."""
    kind = _kind(value)
    if kind != "char" or np.size(value) > 1:
        got = "several rows" if kind == "char" else kind
        raise ContentError(f"{name} must be a row of characters, got {got}. Save char(...) of it.")
    return str(np.ravel(value)[0]) if np.size(value) else ""


def _matrix(name: str, value: Any) -> np.ndarray:
    """A matrix of real numbers, in MATLAB's orientation."""
    kind = _kind(value)
    if kind in HINTS or isinstance(value, Foreign):
        hint = HINTS.get(kind, NUMBERS)
        raise ContentError(f"{name} must be a matrix of class double or single, got {kind}. {hint}")
    try:
        return _arrays.array(name, value, ndim=2)
    except TypeError as error:
        raise ContentError(f"{error} {NUMBERS}") from None


def _check_shapes(matrices: Mapping[str, np.ndarray]) -> None:
    """Raises where two sizes that must be one are not, naming all shapes."""
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    H, columns = shapes["RecurrentWeights"][0] // 3, shapes["InputWeights"][1]
    input_size, P_i = shapes.get("InputProjector", (columns, columns))
    _, P_o = shapes.get("OutputProjector", (H, H))
    expected = {
        "RecurrentWeights": ("3H x P_o" if "OutputProjector" in shapes else "3H x H", (3 * H, P_o)),
        "InputWeights": ("3H x P_i" if "InputProjector" in shapes else "3H x I", (3 * H, P_i)),
        "Bias": ("3H x 1 or 6H x 1", (3 * H, 1), (6 * H, 1)),
        "OutputProjector": ("H x P_o", (H, P_o)),
        "InputProjector": ("I x P_i", (input_size, P_i)),
    }
    for name, (words, *allowed) in expected.items():
        if name in shapes and shapes[name] not in allowed:
            came = ", ".join(f"{n} {rows} x {columns}" for n, (rows, columns) in shapes.items())
            raise ContentError(f"{name} must be {words}, got {came}. {ORIENTATION}")
