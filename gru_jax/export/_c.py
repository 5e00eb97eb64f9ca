"""A GRU as one C99 header: `_c.h.in`, without what does not concern this GRU.

In that file the lines between `@if`, `@else` and `@end` are kept or left out, words after a `$` are
filled in, and the prefix `gru_` stands for the name.
"""

import re
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from gru_jax import _checks
from gru_jax._params import RESET_MODES, GRUParams, Sizes
from gru_jax.export import _c_weights

WORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t
    char8_t class co_await co_return co_yield compl concept const const_cast consteval constexpr
    constinit continue decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
    nullptr operator or or_eq private protected public register reinterpret_cast requires restrict
    return short signed sizeof static static_assert static_cast struct switch template this
    thread_local throw true try typedef typeid typename typeof typeof_unqual union unsigned using
    virtual void volatile wchar_t while xor xor_eq
"""  # of C and C++, up to C23 and C++23
COMMENT = re.compile(r"(/\*.*?\*/)", re.DOTALL)


def to_c(
    params: GRUParams,
    *,
    name: str = "gru",
    dtype: Any = "float32",
    weights: str = "constants",
) -> str:
    """Returns a GRU as one C99 header for inference, which is C++ too and needs no library.

    With `name="gru"` it defines

    ==========================  ===================================================================
    `gru_state`                 the state; its field `h`, H numbers, may be read and written
    `gru_reset(s)`              h becomes zero
    `gru_reset_to(s, h)`        the state becomes h: an initial state, or one kept before
    `gru_step(s, x, y)`         one step with I numbers x; y receives the new h, or is NULL
    `gru_run(s, x, y, steps)`   many steps; x and y hold one step after the other
    `gru_load(s, bytes, size)`  with weights="file": takes them from memory; returns 0, or why not
    ==========================  ===================================================================

    All reset modes, activation functions by name and projectors (kept as factors). Nothing is
    allocated, and nothing written but the state and y; the memory is stated at the top. Every name
    begins with `name`, so several headers fit in one file. Against exact arithmetic an output errs
    by about 1e-7 in float and 1e-16 in double. `-O3 -march=native` vectorises the loops.

    Args:
      params: the learnables and the options; concrete arrays.
      name: what every name of the header begins with, an identifier of C.
      dtype: "float32" (default) or "float64", the type of all numbers. Weights of a wider type are
        rounded to it once, narrower ones are widened.
      weights: "constants" (default) puts them into the header, digit by digit exact; "file" leaves
        them to `gru_load` and the file of `c_weights`: quicker to compile from a million on, and
        exchanged without compiling.

    Returns:
      The text of the header; the same for the same arguments.

    Raises:
      TypeError: a leaf is no array of a floating-point type.
      ValueError: shapes do not fit, a weight is not finite in `dtype`, an activation is a function
        of Python, or an option is unknown.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import export
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> header = export.to_c(params, name="wake_word")
      >>> "static inline void wake_word_step(wake_word_state *s," in header
      True
    """
    _check_name(name)
    dtype, sizes = _c_weights.check_dtype(dtype), _c_weights.check(params)
    from_file = _checks.choice("weights", weights, ("constants", "file")) == "file"
    arrays = _c_weights.members(params, dtype)
    template = resources.files("gru_jax.export").joinpath("_c.h.in").read_text("utf-8")
    text = _chosen(template, _conditions(params, sizes, dtype, from_file))
    words = _words(params, sizes, arrays, dtype, from_file)
    text = re.sub(r"\bgru_(?!jax)", f"{name}_", Template(text).safe_substitute(words))
    if dtype == np.float32:
        text = _with_suffixes(text)
    return Template(text).substitute(constants=",\n".join(map(_initializer, arrays.values())))


def _check_name(name: str) -> None:
    """Raises unless `name` may begin the names of a C header, at file scope, in C++ too."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}.")
    if not re.fullmatch(r"[A-Za-z](_?[A-Za-z0-9])*", name) or name in WORDS.split():
        raise ValueError(
            "name must be an identifier of C: letters, digits and single underscores between them, "
            f"a letter first, and no word of C or C++; got {name!r}."
        )


def _conditions(
    params: GRUParams, sizes: Sizes, dtype: np.dtype, from_file: bool
) -> dict[str, bool]:
    """What the `@if` of the template ask for."""
    mode = RESET_MODES[params.reset_gate_mode]
    tanh = params.state_activation_function == "tanh"
    sigmoid = params.gate_activation_function == "sigmoid"
    return {
        "file": from_file,
        "double": dtype == np.float64,
        "reset_after": mode.reset_after,
        "recurrent_bias": mode.recurrent_bias,
        "tanh": tanh,
        "sigmoid": sigmoid,
        "exp": tanh or sigmoid,
        "input_projector": sizes.input_projector_size is not None,
        "output_projector": sizes.output_projector_size is not None,
    }


def _chosen(template: str, conditions: dict[str, bool]) -> str:
    """The lines between `@if`, `@else` and `@end` whose conditions hold."""
    kept, active = [], [True]
    for line in template.splitlines():
        match line.split():
            case ["@if", *words]:
                active.append(conditions[words[-1]] == (words[0] != "not"))
            case ["@else"]:
                active[-1] = not active[-1]
            case ["@end"]:
                active.pop()
            case _ if all(active):
                kept.append(line)
    return "\n".join(kept) + "\n"


def _words(
    params: GRUParams, sizes: Sizes, arrays: dict, dtype: np.dtype, from_file: bool
) -> dict[str, Any]:
    """What stands for the `$` of the template."""
    H, P_i, P_o = (sizes.num_hidden_units, sizes.input_projector_size, sizes.output_projector_size)
    columns = {"W": "gru_P_i" if P_i else "gru_I", "R": "gru_P_o" if P_o else "gru_H"}
    facts = [f"{fact}u" for fact in _c_weights.facts(params, dtype)]
    return {
        "H": H,
        "I": sizes.input_size,
        "P_i": P_i,
        "P_o": P_o,
        "real": _c_weights.TYPES[dtype.name],
        "bits": 8 * dtype.itemsize,
        "gate": str(params.gate_activation_function).replace("-", ""),
        "state": params.state_activation_function,
        "weight_bytes": sum(array.nbytes for array in arrays.values()),
        "where": "in memory that you provide" if from_file else "constants",
        "state_bytes": H * dtype.itemsize,
        "pointer": " and a pointer" if from_file else "",
        "stack_bytes": (4 * H + (P_i or 0) + (P_o or 0)) * dtype.itemsize,
        "members": "\n".join(
            f"    gru_real {_c_weights.MEMBERS[name].format(**columns)};" for name in arrays
        ),
        "facts": f"        {', '.join(facts[:8])},\n        {', '.join(facts[8:])}",
        "v": "q" if P_o else "h",
        "columns": columns["R"],
    }


def _with_suffixes(text: str) -> str:
    """The code with every number such as 0.5 as a float, 0.5f; comments as they are."""
    parts = COMMENT.split(text)
    parts[::2] = [re.sub(r"\b\d+\.\d+(e[+-]?\d+)?", r"\g<0>f", part) for part in parts[::2]]
    return "".join(parts)


def _initializer(array: np.ndarray) -> str:
    """The numbers in braces, each with the fewest digits that tell it from its neighbours."""
    single = array.dtype == np.float32
    numbers = [f"{number}f" if single else number for number in array.astype(str).tolist()]
    per_line = 6 if single else 4
    lines = (numbers[k : k + per_line] for k in range(0, len(numbers), per_line))
    return "    {\n        " + ",\n        ".join(map(", ".join, lines)) + "\n    }"
