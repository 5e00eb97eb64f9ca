"""The numbers of a GRU as its C code reads them: which arrays, in which order, and as a file.

Matrices are stored column after column, so that the loop over rows, which needs no sums across
vector lanes, runs over neighbours. The arrays stand one after the other without gaps.
"""

import struct
from typing import Any

import numpy as np

from gru_jax import _arguments, _checks
from gru_jax._params import RESET_MODES, GRUParams, Sizes

MAGIC, VERSION = 0x43555247, 1  # "GRUC" in a file of little-endian numbers
TYPES = {"float32": "float", "float64": "double"}
MEMBERS = {  # of the C struct, in its order; W and R have {W} and {R} columns
    "b": "b[3 * gru_H]",
    "c_n": "c_n[gru_H]",
    "W": "W[{W} * 3 * gru_H]",
    "R_rz": "R_rz[{R} * 2 * gru_H]",
    "R_n": "R_n[{R} * gru_H]",
    "Q_i": "Q_i[gru_I * gru_P_i]",
    "Q_o": "Q_o[gru_H * gru_P_o]",
}
STATE = ("tanh", "softsign")  # in the order of their numbers in a file
GATE = ("sigmoid", "hard-sigmoid")


def check(params: GRUParams) -> Sizes:
    """Returns the sizes of parameters whose activation functions have a name."""
    sizes = _arguments.sizes_of(params)
    for option, known in (("state_activation_function", STATE), ("gate_activation_function", GATE)):
        value = getattr(params, option)
        if value not in known:
            raise ValueError(
                f"{option} must be {' or '.join(map(repr, known))} in C, got {value!r}: a function "
                "of Python has no C text. Choose a name, or add the function to the header by hand."
            )
    return sizes


@np.errstate(over="ignore")  # what is too large is refused
def members(params: GRUParams, dtype: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of the C struct by name, in its order: vectors of one type.

    b_Rr and b_Rz join b_Wr and b_Wz, as nothing multiplies them; c_n is b_Rh̃.
    """
    check(params)
    leaves = {name: _exact(name, value) for name, value in params.arrays().items()}
    W, R, b = (leaves[name] for name in ("input_weights", "recurrent_weights", "bias"))
    H = len(R) // 3
    found = {"b": b[: 3 * H]}
    if RESET_MODES[params.reset_gate_mode].recurrent_bias:
        found["b"] = b[: 3 * H] + np.append(b[3 * H : 5 * H], np.zeros(H))
        found["c_n"] = b[5 * H :]
    found |= {"W": W.T, "R_rz": R[: 2 * H].T, "R_n": R[2 * H :].T}
    projectors = {"Q_i": "input_projector", "Q_o": "output_projector"}
    found |= {name: leaves[leaf] for name, leaf in projectors.items() if leaf in leaves}
    return {name: _rounded(name, array, dtype).ravel() for name, array in found.items()}


def _exact(name: str, value: Any) -> np.ndarray:
    """The leaf in float64, which holds every number of the narrower types."""
    array = np.asarray(value).astype(np.float64)
    if not np.isfinite(array).all():
        count = np.count_nonzero(~np.isfinite(array))
        raise ValueError(f"{name} must be finite, as C has no literal for others; {count} are not.")
    return array


def _rounded(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in the type of the C code."""
    rounded = array.astype(dtype)
    if not np.isfinite(rounded).all():
        largest = np.abs(array).max()
        raise ValueError(
            f"dtype must hold all weights; {name} has numbers up to {largest:g}, too large for "
            f"{dtype}. "
            + ("Pass dtype='float64'." if largest < np.inf else "Both halves of bias add up to it.")
        )
    return rounded


def check_dtype(dtype: Any) -> np.dtype:
    """Returns float32 or float64."""
    found = _checks.real_dtype("dtype", dtype)
    if found.name not in TYPES:
        raise ValueError(
            f"dtype must be 'float32' or 'float64', what C calls float and double, got {dtype!r}; "
            "narrower parameters are widened exactly."
        )
    return found


def facts(params: GRUParams, dtype: np.dtype) -> list[int]:
    """Returns the sixteen numbers at the start of a file; the C code compares them with its own."""
    sizes = check(params)
    return [
        MAGIC,
        VERSION,
        dtype.itemsize,
        sizes.num_hidden_units,
        sizes.input_size,
        sizes.input_projector_size or 0,
        sizes.output_projector_size or 0,
        list(RESET_MODES).index(params.reset_gate_mode),
        STATE.index(params.state_activation_function),
        GATE.index(params.gate_activation_function),
        *[0] * 6,
    ]


def c_weights(params: GRUParams, *, dtype: Any = "float32", byte_order: str = "little") -> bytes:
    """Returns the weights as the file that a header of `to_c(params, weights="file")` loads.

    The file holds sixteen 32-bit numbers that say which GRU it is, then the weights. Parameters of
    the same sizes and options fit the same header, so a GRU may be trained anew without compiling.

    Args:
      params: the learnables and the options, as for `to_c`.
      dtype: "float32" (default) or "float64", as in the header.
      byte_order: "little" (default) or "big", that of the machine that runs the C code.

    Returns:
      The content of the file.

    Raises:
      TypeError: a leaf is no array of a floating-point type.
      ValueError: shapes do not fit, a weight is not finite in `dtype`, an activation is a function
        of Python, or an option is unknown.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import export
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> len(export.c_weights(params)) == 64 + 4 * gru_jax.num_learnables(params)
      True
    """
    found = check_dtype(dtype)
    order = "<" if _checks.choice("byte_order", byte_order, ("little", "big")) == "little" else ">"
    arrays = members(params, found).values()
    start = struct.pack(f"{order}16I", *facts(params, found))
    return start + b"".join(array.astype(found.newbyteorder(order)).tobytes() for array in arrays)
