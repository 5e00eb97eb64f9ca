"""Generated C against the oracle, and against what its first comment promises."""

import ctypes
import functools
import re
import shutil
import struct
import subprocess
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from c_cases import (
    BY_NAME,
    CASES,
    CC,
    CXX,
    SCALARS,
    Case,
    Stream,
    compiled,
    fastest,
    folder,
    library,
    needs_compiler,
    needs_cxx,
    unit,
)
from cases import TOLERANCE, relative_error
from reference import MODES, gru_ref

from gru_jax.export._c import to_c
from gru_jax.export._c_weights import c_weights

T = 7
DTYPES = tuple(SCALARS)
SMALL = Case()
FAST = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-ffinite-math-only")
FUNCTIONS = {  # by name, in float64
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "hard-sigmoid": lambda v: np.clip(0.2 * v + 0.5, 0, 1),
    "tanh": np.tanh,
    "softsign": lambda v: v / (1 + np.abs(v)),
}


def inputs(case, dtype, steps=T):
    """x (steps, I) and h0 (H,), exact in the dtype."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(steps, case.I)).astype(dtype)
    return x, rng.uniform(-1, 1, size=case.H).astype(dtype)


def expected(case, dtype, x, h0):
    """The oracle's y, with the learnables as they are in the dtype."""
    options = {"mode": case.mode, "state_activation": case.state, "gate_activation": case.gate}
    return gru_ref(case.arrays(dtype), x, h0, **options)[0]


def rounding(dtype):
    """What differs where a compiler inlines and vectorises one function in two ways."""
    return 16 * np.finfo(dtype).eps


# Numbers


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BY_NAME)
def test_equals_the_oracle_in_one_run_by_steps_and_by_chunks(name, dtype):
    case = BY_NAME[name]
    x, h0 = inputs(case, dtype)
    stream = Stream(library(dtype), case, dtype)
    y = stream(x, h0)
    assert relative_error(y, expected(case, dtype, x, h0)) <= TOLERANCE[dtype]
    np.testing.assert_array_equal(stream.h, y[-1])

    stream(x[:0], h0)  # no step at all
    np.testing.assert_array_equal(stream.h, h0)
    steps = [stream(x[t : t + 1], h0 if t == 0 else None)[0] for t in range(T)]
    assert relative_error(steps, y) <= rounding(dtype)
    chunks = [stream(x[:3], h0), stream(x[3:5]), stream(x[5:])]
    np.testing.assert_array_equal(np.concatenate(chunks), y)

    stream(x[:4], h0, keep=False)
    kept = stream.state.raw
    assert stream(x[4:], keep=False) is None
    np.testing.assert_array_equal(stream.h, y[-1])
    other = Stream(library(dtype), case, dtype)
    other.state = ctypes.create_string_buffer(kept, other.size)  # a state is copied as it is
    np.testing.assert_array_equal(other(x[4:]), y[4:])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_reset_is_a_state_of_zeros(dtype):
    for case in CASES[::6]:
        x, h0 = inputs(case, dtype)
        stream = Stream(library(dtype), case, dtype)
        stream(x, h0)
        stream.function("zero")(stream.state)
        np.testing.assert_array_equal(stream(x), stream(x, np.zeros(case.H)))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [("-O0",), ("-Os",), ("-O3", *FAST)])
def test_optimisation_changes_roundings_only(dtype, flags):
    for case in CASES[::5]:
        x, h0 = inputs(case, dtype)
        y = Stream(library(dtype), case, dtype)(x, h0)
        same = Stream(library(dtype, flags=flags), case, dtype)(x, h0)
        assert relative_error(same, y) <= rounding(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_runs_stay_with_the_oracle(dtype):
    case = Case(130, 7)
    x, h0 = inputs(case, dtype, 60)
    y = Stream(library(dtype), case, dtype)(x, h0)
    assert relative_error(y, expected(case, dtype, x, h0)) <= TOLERANCE[dtype]


@functools.cache
def functions(dtype, flags):
    """The four activation functions as one library."""
    text = ""
    for case in (Case(), Case(state="softsign", gate="hard-sigmoid")):
        text += to_c(case.params(), name=case.name, dtype=dtype)
        for function in (case.state, case.gate):
            short = function.replace("-", "")
            head = f"void all_{short}(const {case.name}_real *x, {case.name}_real *y, size_t n)"
            loop = f"for (k = 0; k < n; k++) y[k] = {case.name}_{short}(x[k]);"
            text += f"{head};\n{head}\n{{\n    size_t k;\n    {loop}\n}}\n"
    path, _ = compiled(f"functions_{dtype}{flags}", text, *flags, "-shared", "-fPIC")
    return ctypes.CDLL(str(path))


@needs_compiler
@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name, dtype, optimised):
    top = np.finfo(dtype).max
    spread = np.geomspace(1e-30, 800, 20001)
    x = np.concatenate([np.linspace(-30, 30, 60001), spread, -spread, [0, top, -top, 2.5, -2.5]])
    special = [np.inf, -np.inf, np.nan, -np.nan]
    x = np.concatenate([x, special]).astype(dtype)
    y = np.empty_like(x)
    flags = fastest() if optimised else ("-O0",)
    function = getattr(functions(dtype, flags), f"all_{name.replace('-', '')}")
    function(*(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), ctypes.c_size_t(len(x)))
    exact = np.nextafter if dtype == "float64" else None
    wide = x[:-4].astype(np.float64 if exact is None else np.longdouble)
    with np.errstate(over="ignore"):
        error = np.abs(y[:-4] - FUNCTIONS[name](wide))
    assert error.max() <= 1.5 * np.finfo(dtype).eps
    low = 0.0 if name.endswith("sigmoid") else -1.0
    np.testing.assert_allclose(y[-4:-2], [1.0, low], rtol=0, atol=1e-37)
    assert np.isnan(y[-2:]).all()
    assert y.min() >= low or np.isnan(y.min())
    assert np.nanmax(y) <= 1.0
    if low:
        near = np.abs(wide) < 0.1
        assert (error[near] <= 2 * np.finfo(dtype).eps * np.abs(wide[near]) + 1e-45).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_inputs(dtype):
    for case in CASES[::3]:
        x, h0 = inputs(case, dtype)
        stream = Stream(library(dtype), case, dtype)
        x[2] = 1e30 * np.sign(x[2])
        y = stream(x, h0)
        assert (np.abs(y) <= 1).all()
        x[3] = np.nan
        y = stream(x, h0)
        assert np.isfinite(y[:3]).all()
        assert np.isnan(y[3:]).all()
        assert np.isfinite(stream(x[:2], h0)).all()  # reset_to ends it


# Weights


def laid_out(case, dtype):
    """The weights as the header documents them, from the reference's leaves."""
    a, H = case.arrays(dtype), case.H
    W, R, b = a["input_weights"], a["recurrent_weights"], a["bias"].astype(np.float64)
    parts = [b[: 3 * H]]
    if case.mode == MODES[2]:
        parts = [np.concatenate([b[: 2 * H] + b[3 * H : 5 * H], b[2 * H : 3 * H]]), b[5 * H :]]
    parts += [W[:, j] for j in range(W.shape[1])]
    parts += [R[: 2 * H, j] for j in range(R.shape[1])]
    parts += [R[2 * H :, j] for j in range(R.shape[1])]
    parts += [a[name].ravel() for name in ("input_projector", "output_projector") if name in a]
    return np.concatenate([part.astype(dtype) for part in parts])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_are_bitwise_the_weights(dtype):
    for case in CASES:
        stream = Stream(library(dtype), case, dtype)
        assert stream.numbers() == laid_out(case, dtype).tobytes()
        assert stream.numbers() == c_weights(case.params(dtype), dtype=dtype)[64:]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_numbers_are_exact(dtype):
    info = np.finfo(dtype)
    rows = [info.max, -info.max, info.tiny, info.smallest_subnormal, -0.0, 0.1, 1 / 3, 16777217.0]
    bits = np.random.default_rng(0).integers(0, 2**16, (200_000, info.bits // 16), np.uint16)
    drawn = np.ascontiguousarray(bits).view(dtype).ravel()
    numbers = np.concatenate([np.array(rows, dtype), drawn[np.isfinite(drawn)]])
    W = numbers[: 3 * (len(numbers) // 3)].reshape(3, -1)
    params = SMALL.params().replace(
        input_weights=W, recurrent_weights=np.zeros((3, 1), dtype), bias=np.zeros(3, dtype)
    )
    reader = "const void *at(void);\nconst void *at(void) { return gru_constants.W; }\n"
    path, _ = compiled(f"exact_{dtype}", to_c(params, dtype=dtype) + reader, "-shared", "-fPIC")
    at = ctypes.CDLL(str(path)).at
    at.restype = ctypes.c_void_p
    assert ctypes.string_at(at(), W.nbytes) == np.ascontiguousarray(W.T).tobytes()


@pytest.mark.parametrize("narrow", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_parameters_are_widened_exactly(narrow, dtype):
    leaves = {name: a.astype(narrow) for name, a in SMALL.arrays().items()}
    params = SMALL.params().replace(**{name: jnp.asarray(a) for name, a in leaves.items()})
    wide = params.replace(**{name: a.astype(dtype) for name, a in leaves.items()})
    assert to_c(params, dtype=dtype) == to_c(wide, dtype=dtype)
    assert c_weights(params, dtype=dtype) == c_weights(wide, dtype=dtype)


def test_wider_parameters_are_rounded_once():
    params = SMALL.params()
    rounded = params.replace(**{n: np.asarray(a, np.float32) for n, a in params.arrays().items()})
    assert to_c(params) == to_c(rounded) != to_c(params, dtype="float64")
    twice = Case(mode=MODES[2]).params()
    numbers = np.frombuffer(c_weights(twice)[64:], np.float32)[:5]
    both = np.asarray(twice.bias[:5]) + np.asarray(twice.bias[15:20])
    np.testing.assert_array_equal(numbers, both.astype(np.float32))


# The separate file


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_gives_the_numbers_of_constants(dtype):
    for case in CASES[::5]:
        x, h0 = inputs(case, dtype)
        stream = Stream(library(dtype, "file"), case, dtype)
        stream(x[:0], h0)
        assert stream.load(c_weights(case.params(dtype), dtype=dtype)) == 0
        np.testing.assert_array_equal(stream.h, 0)
        constants = Stream(library(dtype), case, dtype)(x, h0)
        assert relative_error(stream(x, h0), constants) <= rounding(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_files_are_refused(dtype):
    case = CASES[0]
    stream = Stream(library(dtype, "file"), case, dtype)
    content = c_weights(case.params(dtype), dtype=dtype)
    assert stream.load(content) == 0
    x, h0 = inputs(case, dtype)
    y, before = stream(x, h0), stream.state.raw
    block = stream.block
    other = {"float32": "float64", "float64": "float32"}[dtype]
    refused = {
        "empty": (b"", 1),
        "one byte short": (content[:-1], 1),
        "one byte long": (content + b"\0", 1),
        "only the start": (content[:64], 1),
        "half of the start": (content[:32], 1),
        "no such file": (b"\x7fELF" + content[4:], 3),
        "other byte order": (c_weights(case.params(), dtype=dtype, byte_order="big"), 3),
        "later version": (content[:4] + struct.pack("=I", 2) + content[8:], 4),
        "other dtype": (c_weights(case.params(), dtype=other), 5),
        "other H": (c_weights(Case(6, 3).params(), dtype=dtype), 6),
        "other I": (c_weights(Case(5, 4).params(), dtype=dtype), 7),
        "other P_i": (c_weights(Case(P_i=2).params(), dtype=dtype), 8),
        "other P_o": (c_weights(Case(P_o=2).params(), dtype=dtype), 9),
        "other mode": (c_weights(Case(mode=MODES[1]).params(), dtype=dtype), 10),
        "other state": (c_weights(Case(state="softsign").params(), dtype=dtype), 11),
        "other gate": (c_weights(Case(gate="hard-sigmoid").params(), dtype=dtype), 12),
    }
    for reason, (wrong, code) in refused.items():
        assert stream.load(wrong) == code, reason
        assert stream.state.raw == before, reason
    shifted = np.zeros(len(content) + 1, np.uint8)
    shifted[1:] = np.frombuffer(content, np.uint8)
    assert stream.load_at(shifted.ctypes.data + 1, len(content)) == 2
    np.testing.assert_array_equal(stream(x, h0), y)
    assert len(block) == len(content)


def test_files():
    params = Case(mode=MODES[2], P_i=2, P_o=4, gate="hard-sigmoid").params()
    little, big = (c_weights(params, dtype="float64", byte_order=o) for o in ("little", "big"))
    assert little[:4] == b"GRUC"
    assert struct.unpack("<16I", little[:64])[1:] == (1, 8, 5, 3, 2, 4, 2, 0, 1, *[0] * 6)
    np.testing.assert_array_equal(np.frombuffer(little[64:], "<f8"), np.frombuffer(big[64:], ">f8"))
    assert struct.unpack(">16I", big[:64]) == struct.unpack("<16I", little[:64])
    assert c_weights(params) == c_weights(params)
    assert "weights" in to_c(params, weights="file")
    assert len(to_c(Case(130, 130).params(), weights="file")) < 20_000


# The text


@needs_compiler
@pytest.mark.parametrize("weights", ["constants", "file"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stated_memory_is_what_the_compiler_finds(dtype, weights):
    for case in CASES[::5]:
        text = to_c(case.params(), dtype=dtype, weights=weights)
        found = (
            "weights (\\d+) bytes.*a state (\\d+) bytes( and a pointer)?; a step about (\\d+) bytes"
        )
        stated = re.search(found, text, re.DOTALL)
        stream = Stream(library(dtype, weights), case, dtype)
        size = case.H * np.dtype(dtype).itemsize
        assert (int(stated[1]), int(stated[2])) == (stream.weights_size, size)
        word = ctypes.sizeof(ctypes.c_void_p)
        with_pointer = -(-size // word) * word + word
        assert stream.size == (with_pointer if weights == "file" else size)
        assert bool(stated[3]) == (weights == "file")
        temporary = 4 * case.H + (case.P_i or 0) + (case.P_o or 0)
        assert int(stated[4]) == temporary * np.dtype(dtype).itemsize


def test_the_text_is_deterministic_ascii_and_not_wide():
    for case in CASES:
        for weights in ("constants", "file"):
            text = to_c(case.params(), name=case.name, weights=weights)
            assert text == to_c(case.params(), name=case.name, weights=weights)
            assert text.isascii()
            assert not re.search(r"[$@]|gru_(?!jax)|\bNone\b|\t| $", text, re.M)
            code = to_c(case.params(), weights="file")
            assert max(map(len, code.splitlines())) <= 100


def test_the_text_holds_the_equations_of_its_mode():
    texts = [to_c(Case(mode=mode).params()) for mode in MODES]
    candidates = [
        "tanh(W_n x + b_n + r * (R_n h))",
        "tanh(W_n x + b_n + R_n (r * h))",
        "tanh(W_n x + b_n + r * (R_n h + c_n))",
    ]
    for n, text in enumerate(texts):
        assert [candidate in text for candidate in candidates] == [n == m for m in range(3)]
        assert "h = (1 - z) * n + z * h" in text
    assert "softsign(W_n" in to_c(Case(state="softsign").params())


def names_of(text):
    """The names that a header defines at file scope, without the prefix."""
    found = re.findall(r"\bgru_(?!jax)(\w+)", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
    return set(found)


def test_no_two_prefixes_can_meet():
    """With the names a and a_b: a_b_c must not be c of a_b and b_c of a."""
    names = set()
    for case in (Case(P_i=2, P_o=2), Case(state="softsign", gate="hard-sigmoid", mode=MODES[2])):
        for weights in ("constants", "file"):
            names |= names_of(to_c(case.params(), weights=weights))
    assert {"step", "run", "reset", "reset_to", "load", "state", "weights", "H"} <= names
    assert not [(a, b) for a in names for b in names if a != b and a.endswith(f"_{b}")]


@needs_compiler
def test_many_headers_in_one_file_and_one_header_twice():
    names = ("gru", "gru_state", "gru_real", "Gru", "g1", "step")
    text = "\n".join(to_c(SMALL.params(), name=name) for name in names for _ in range(2))
    compiled("together", f"{text}\nint main(void) {{ return 0; }}\n", "-O1")


# What the compiler says


@needs_cxx
@pytest.mark.parametrize("standard", ["c++11", "c++20"])
@pytest.mark.parametrize("weights", ["constants", "file"])
def test_is_cplusplus_without_warnings(standard, weights):
    for dtype in DTYPES:
        source = unit(CASES[:: 4 if standard == "c++11" else 9], dtype, weights)
        name = f"plus_{standard}_{dtype}_{weights}"
        compiled(name, f'extern "C" {{\n{source}\n}}', "-O0", "-c", compiler=CXX, standard=standard)


@needs_compiler
@pytest.mark.parametrize("standard", ["c99", "c11", "gnu99"])
def test_a_header_alone_compiles_without_warnings(standard):
    for weights in ("constants", "file"):
        text = to_c(SMALL.params(), weights=weights)
        path, _ = compiled(f"alone_{standard}_{weights}", text, "-O2", "-c", standard=standard)
        assert not symbols(path)


def symbols(path):
    """(kind, name) of all symbols of an object file; kinds in capitals are seen outside."""
    if shutil.which("nm") is None:
        pytest.skip("no nm to list symbols")
    listed = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split()[-2:]) for line in listed.splitlines()]


@needs_compiler
@pytest.mark.parametrize("flags", [("-O0",), ("-O3",)])
@pytest.mark.parametrize("weights", ["constants", "file"])
def test_no_writable_globals_and_no_library(weights, flags):
    cases = CASES[::5]
    options = ("-fno-pic", "-fno-stack-protector", "-c")
    name = f"symbols_{weights}{flags[0]}"
    path, _ = compiled(name, unit(cases, "float32", weights), *flags, *options)
    found = symbols(path)
    assert {kind for kind, _ in found} <= set("TtrRU")
    wrappers = {
        f"{c.name}_{w}" for c in cases for w in ("sizes", "call", "zero", "numbers", "take")
    }
    assert {name for kind, name in found if kind in "TR"} <= wrappers
    assert {name for kind, name in found if kind == "U"} <= {"memcpy", "memset"}


@needs_compiler
def test_loops_vectorise_without_fast_math():
    about = subprocess.run([CC, "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" not in about:
        pytest.skip("only gcc says so in this way")
    for dtype in DTYPES:
        for n, case in enumerate(CASES[:48]):
            wide = case._replace(H=64, I=32, P_i=case.P_i and 16, P_o=case.P_o and 16)
            text = to_c(wide.params(), dtype=dtype)
            caller = "void f(gru_state *s, const gru_real *x, gru_real *y);\n"
            caller += (
                "void f(gru_state *s, const gru_real *x, gru_real *y) { gru_step(s, x, y); }\n"
            )
            if n % 7 == 0:
                flags = (*fastest(), "-c", "-fopt-info-vec-optimized")
                _, said = compiled(f"vector_{dtype}_{n}", text + caller, *flags)
                lines = {int(m) for m in re.findall(r":(\d+):\d+: optimized: loop vec", said)}
                loops = [line_of(text, start) for start in LOOPS]
                assert all(lines & set(at) for at in loops), (case, loops, lines)


LOOPS = (  # the products, the gates, the candidate and h
    "        for (k = 0; k < rows; k++)\n            out[k] += (v0",
    "    for (k = 0; k < 2 * gru_H; k++)",
    "    for (k = 0; k < gru_H; k++) {\n        const gru_real z",
)


def line_of(text, start):
    """The numbers of the first lines of a piece of text."""
    assert text.count(start) == 1
    line = text[: text.index(start)].count("\n") + 1
    return range(line, line + 3)


MAIN = """
#include <stdlib.h>
int main(void)
{{
    static const float awkward[] = {{0.0f, 1e30f, -1e30f, 1e37f, 1e-40f, -88.0f, 0.5f}};
    float *x = (float *)malloc(7 * {I} * sizeof(float)), *y = (float *)malloc(7 * {H} * sizeof *y);
    {name}_state *s = ({name}_state *)malloc(sizeof *s);
    size_t k;
    if (!x || !y || !s) return 2;
    for (k = 0; k < 7 * {I}; k++) x[k] = awkward[k / {I}];
    {begin}
    {name}_run(s, x, y, 7);
    for (k = 0; k < 7 * {H}; k++) if (!(y[k] >= -1 && y[k] <= 1)) return 3;
    {name}_reset_to(s, y);
    {name}_step(s, s->h, s->h);
    x[0] = (float)strtod("nan", NULL);
    {name}_step(s, x, NULL);
    if (s->h[0] == s->h[0]) return 4;
    x[0] = (float)strtod("inf", NULL);
    {name}_reset(s);
    {name}_step(s, x, y);
    free(x); free(y); free(s);
    return 0;
}}
"""


@needs_compiler
@pytest.mark.parametrize("weights", ["constants", "file"])
@pytest.mark.parametrize("n", range(0, 48, 5))
def test_sanitizers_find_nothing(n, weights):
    case = CASES[n]._replace(I=5)  # s->h serves as an input
    text = to_c(case.params(), name="net", weights=weights)
    begin, head = "net_reset(s);", ""
    if weights == "file":
        content = c_weights(case.params())
        words = ", ".join(f"{word}u" for word in struct.unpack(f"={len(content) // 4}I", content))
        head = f"static const uint32_t block[] = {{{words}}};\n"
        begin = "if (net_load(s, block, sizeof block)) return 5;"
    source = text + head + MAIN.format(name="net", H=case.H, I=case.I, begin=begin)
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if not sanitizers_work():
        pytest.skip("no sanitizers with this compiler")
    path, _ = compiled(f"sane_{weights}_{n}", source, *flags)
    done = subprocess.run([str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@functools.cache
def sanitizers_work():
    path = Path(folder().name) / "sane.c"
    path.write_text("int main(void) { return 0; }\n")
    out = str(path.with_suffix(".run"))
    flags = ["-fsanitize=address,undefined", str(path), "-o", out]
    built = subprocess.run([CC, *flags], capture_output=True, check=False).returncode == 0
    return built and subprocess.run([out], capture_output=True, check=False).returncode == 0


# Refusals


@pytest.mark.parametrize(
    "name", ["", "1st", "a b", "a-b", "_a", "a__b", "a_", "grü", "int", "class", "restrict", "a;b"]
)
def test_names_that_c_cannot_have(name):
    with pytest.raises(ValueError, match="name must be an identifier of C"):
        to_c(SMALL.params(), name=name)


def test_names_must_be_strings():
    with pytest.raises(TypeError, match="name must be a string"):
        to_c(SMALL.params(), name=3)


@pytest.mark.parametrize("write", [to_c, c_weights])
def test_refusals(write):
    params = SMALL.params()
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=r"recurrent_weights must be finite.* 1 are not"):
            write(params.replace(recurrent_weights=params.recurrent_weights.at[3, 1].set(bad)))
    large = params.replace(bias=params.bias.at[2].set(-1e39))
    with pytest.raises(ValueError, match=r"b has numbers up to 1e\+39.*dtype='float64'"):
        write(large)
    assert write(large, dtype="float64")
    twice = Case(mode=MODES[2]).params()
    twice = twice.replace(bias=jnp.full_like(twice.bias, 1e308))
    for dtype in DTYPES:
        words = f"b has numbers up to inf, too large for {dtype}. Both halves of bias"
        with pytest.raises(ValueError, match=words):
            write(twice, dtype=dtype)
    for option, function in (("state", jnp.tanh), ("gate", jnp.sin)):
        option = f"{option}_activation_function"
        with pytest.raises(ValueError, match=rf"{option} must be .* in C, got"):
            write(params.replace(**{option: function}))
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64'"):
            write(params, dtype=dtype)
    for dtype in ("int32", "fast"):
        with pytest.raises(TypeError, match="dtype must be"):
            write(params, dtype=dtype)
    with pytest.raises(ValueError, match=r"bias must have shape \(15,\)"):
        write(params.replace(bias=params.bias[:3]))
    with pytest.raises(TypeError, match=r"gru_jax\.GRUParams"):
        write(params.arrays())


def test_refused_options():
    with pytest.raises(ValueError, match="weights must be one of 'constants', 'file'"):
        to_c(SMALL.params(), weights="flash")
    with pytest.raises(ValueError, match="byte_order must be one of 'little', 'big'"):
        c_weights(SMALL.params(), byte_order="native")
