"""Compiling generated C and calling it: many GRUs in one translation unit, through ctypes."""

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cases import as_params, random_params
from reference import GATE_ACTIVATIONS, MODES, STATE_ACTIVATIONS

from gru_jax.export import _c

CC, CXX = shutil.which("cc"), shutil.which("c++")
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wsign-conversion"]
STRICT += ["-Wshadow", "-Wdouble-promotion", "-Wcast-align", "-Wundef"]
SCALARS = {"float32": ctypes.c_float, "float64": ctypes.c_double}
WRAPPER = """
size_t {name}_sizes(int k);
size_t {name}_sizes(int k) {{ return k ? sizeof({name}_weights) : sizeof({name}_state); }}
int {name}_call({name}_state *s, const {name}_real *h, const {name}_real *x, {name}_real *y,
                size_t steps);
int {name}_call({name}_state *s, const {name}_real *h, const {name}_real *x, {name}_real *y,
                size_t steps)
{{
    if (h) {name}_reset_to(s, h);
    if (steps == 1) {name}_step(s, x, y); else {name}_run(s, x, y, steps);
    return 0;
}}
void {name}_zero({name}_state *s);
void {name}_zero({name}_state *s) {{ {name}_reset(s); }}
"""
CONSTANTS = """
const void *{name}_numbers(void);
const void *{name}_numbers(void) {{ return &{name}_constants; }}
"""
LOAD = """
int {name}_take({name}_state *s, const void *bytes, size_t size);
int {name}_take({name}_state *s, const void *bytes, size_t size)
{{
    return {name}_load(s, bytes, size);
}}
"""

needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler (cc) is installed")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler (c++) is installed")


class Case(NamedTuple):
    """One GRU."""

    H: int = 5
    I: int = 3  # noqa: E741
    mode: str = MODES[0]
    state: str = "tanh"
    gate: str = "sigmoid"
    P_i: int | None = None
    P_o: int | None = None

    @property
    def name(self):
        """A prefix for C that tells the case."""
        words = [self.mode[:3], self.state[:4], self.gate[:4], f"H{self.H}", f"I{self.I}"]
        return "_".join([*words, f"i{self.P_i or 0}", f"o{self.P_o or 0}"])

    def arrays(self, dtype="float64"):
        """The same random learnables in every dtype, but for rounding."""
        rng = np.random.default_rng(self.H * 1000 + self.I)
        return random_params(rng, self.H, self.I, self.mode, self.P_i, self.P_o, dtype)

    def params(self, dtype="float64"):
        """The library's parameters."""
        return as_params(self.arrays(dtype), self.mode, self.state, self.gate)


CASES = [
    Case(5, 3, *kinds, *sizes)
    for *kinds, sizes in itertools.product(
        MODES, STATE_ACTIVATIONS, GATE_ACTIVATIONS, [(None, None), (2, None), (None, 3), (2, 3)]
    )
]
CASES += [
    Case(H, I, mode, P_i=P_i, P_o=P_o)
    for mode in MODES
    for H, I, P_i, P_o in [  # noqa: E741
        (1, 1, None, None),
        (1, 1, 1, 1),
        (4, 12, None, None),
        (8, 1, None, 8),
        (64, 16, None, None),
        (130, 7, 5, 21),
        (130, 7, None, None),
    ]
]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)


@functools.cache
def folder():
    """A folder for what this process compiles, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="gru_c_")


def compiled(name, source, *flags, compiler=None, standard="c99"):
    """Compiles a text; returns the path of the result and what the compiler said."""
    suffix = ".cpp" if standard.startswith("c++") else ".c"
    path = Path(folder().name) / f"{name}{suffix}"
    path.write_text(source)
    out = path.with_suffix(".out")
    command = [compiler or CC, f"-std={standard}", *STRICT, *flags, str(path), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stderr


@functools.cache
def fastest():
    """-O3, and -march=native where the compiler knows it."""
    path = Path(folder().name) / "empty.c"
    path.write_text("typedef int nothing;\n")
    command = [CC, "-march=native", "-c", str(path), "-o", str(path.with_suffix(".o"))]
    known = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ("-O3", "-march=native") if known else ("-O3",)


def unit(cases, dtype, weights="constants"):
    """One translation unit with the headers of many cases, and functions to call them."""
    text = []
    for case in cases:
        text.append(_c.to_c(case.params(dtype), name=case.name, dtype=dtype, weights=weights))
        wrapper = WRAPPER + (LOAD if weights == "file" else CONSTANTS)
        text.append(wrapper.format(name=case.name))
    return "\n".join(text)


def library(dtype, weights="constants", flags=None):
    """All cases as a shared library; every fifth of them if loaded, or with other flags."""
    every = 1 if weights == "constants" and flags is None else 5
    return _library(dtype, weights, flags or fastest(), every)


@functools.cache
def _library(dtype, weights, flags, every):
    name = f"{dtype}_{weights}_{'_'.join(flags)}"
    source = unit(CASES[::every], dtype, weights)
    path, _ = compiled(name, source, *flags, "-shared", "-fPIC")
    return ctypes.CDLL(str(path))


class Stream:
    """One state of a compiled GRU."""

    def __init__(self, lib, case, dtype):
        self.lib, self.case, self.dtype = lib, case, dtype
        self.function("sizes").restype = ctypes.c_size_t
        self.size = self.function("sizes")(0)
        self.weights_size = self.function("sizes")(1)
        self.state = ctypes.create_string_buffer(self.size)
        self.function("zero")(self.state)

    def function(self, name):
        """A function of the wrapper."""
        return getattr(self.lib, f"{self.case.name}_{name}")

    def load(self, content):
        """Takes weights from bytes; returns the code."""
        self.block = np.frombuffer(content, np.uint8).copy()
        return self.load_at(self.block.ctypes.data, len(content))

    def load_at(self, address, size):
        """The same from an address."""
        pointer = ctypes.c_void_p(address)
        return self.function("take")(self.state, pointer, ctypes.c_size_t(size))

    def __call__(self, x, h=None, keep=True):
        """Runs over x (time, I), from h if given; returns y (time, H), or None."""
        x = np.ascontiguousarray(x, self.dtype)
        h = None if h is None else np.ascontiguousarray(h, self.dtype)
        y = np.full((len(x), self.case.H), 7.0, self.dtype) if keep else None
        pointers = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (h, x, y)]
        self.function("call")(self.state, *pointers, ctypes.c_size_t(len(x)))
        return y

    @property
    def h(self):
        """A copy of the state's field h, which comes first."""
        return np.frombuffer(self.state.raw, self.dtype, self.case.H)

    def numbers(self):
        """The weights as they stand in memory."""
        self.function("numbers").restype = ctypes.c_void_p
        return ctypes.string_at(self.function("numbers")(), self.weights_size)
