"""Parameters in files: MATLAB's v7 and v7.3, safetensors; damaged and hostile ones are refused.

`data/octave_gru.mat` was written by GNU Octave 7.3 with `save -v7` from whole numbers divided by
constants, which `test_a_file_that_octave_wrote` repeats.
"""

import json
import os
import pickle
import stat
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from cases import random_params
from reference import MODES

import gru_jax
from gru_jax.convert import _mat5
from gru_jax.convert._matlab import from_matlab, to_matlab
from gru_jax.convert._safetensors import from_safetensors, to_safetensors

h5py = pytest.importorskip("h5py")
safetensors = pytest.importorskip("safetensors.numpy")

AFTER, BEFORE, RECURRENT_BIAS = MODES
OCTAVE = Path(__file__).parent / "data" / "octave_gru.mat"
DTYPES = ("float64", "float32", "float16", ml_dtypes.bfloat16)
SIZES = [(5, 3, None, None), (1, 1, None, None), (3, 9, None, None), (4, 1, None, 2),
         (5, 4, 2, 3), (1, 3, 1, None), (2, 6, 6, 1)]  # fmt: skip
FILES = ("v7", "v7.3", "safetensors")
FOREIGN = {"gate_activation_function": "hard-sigmoid", "state_activation_function": "softsign"}


def make(H=4, I=3, P_i=2, P_o=3, mode=BEFORE, dtype="float32", **options):  # noqa: E741
    arrays = random_params(np.random.default_rng(H + I), H, I, mode, P_i, P_o, dtype)
    return gru_jax.GRUParams(**arrays, reset_gate_mode=mode, **(options or FOREIGN))


def is_same(one, other):
    """Whether two parameters are bitwise equal, options included."""
    a, b = one.arrays(), other.arrays()
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        type(a[n]) is np.ndarray and (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape)
        and a[n].tobytes() == np.asarray(b[n]).tobytes() for n in b
    )  # fmt: skip


def write(params, path, kind):
    if kind == "safetensors":
        to_safetensors(params, path)
    else:
        to_matlab(params, path, version=kind)


def read(path, kind):
    return from_safetensors(path) if kind == "safetensors" else from_matlab(path)


def element(kind, data, order="<"):
    """An element of a v5 file: tag, content, padding; the long form, which also holds few bytes."""
    return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(name, number, shape, stored, data, order="<", flags=0):
    parts = [(6, struct.pack(order + "II", number | flags, 0)),
             (5, struct.pack(order + f"{len(shape)}i", *shape)), (1, name.encode())]  # fmt: skip
    parts += [(stored, data)] if stored else []
    return element(14, b"".join(element(*part, order) for part in parts), order)


def opaque(name):
    """A dlarray as MATLAB saves it: names, and a reference into the hidden workspace."""
    parts = [(6, struct.pack("<II", 17, 0)), (1, name.encode()), (1, b"MCOS"), (1, b"dlarray")]
    reference = matrix("", 13, (6, 1), 6, np.array([0xDD000000, 2, 1, 1, 1, 1], "<u4").tobytes())
    return element(14, b"".join(element(*part) for part in parts) + reference)


def v5(*matrices, order="<", version=1):
    mark = struct.pack(order + "HH", version << 8, 0x4D49)
    return b"MATLAB 5.0 MAT-file, by hand".ljust(124) + mark + b"".join(matrices)


def put(group, name, value):
    """One variable of a v7.3 file, the way MATLAB writes it."""
    if isinstance(value, dict):
        item = group.create_group(name)
        for field, inner in value.items():
            put(item, field, inner)
        kind = "struct"
    elif isinstance(value, str):
        item = group.create_dataset(name, data=np.array([[ord(c)] for c in value], "u2"))
        item.attrs["MATLAB_int_decode"] = np.int32(2)
        kind = "char"
    elif value.size == 0:
        item = group.create_dataset(name, data=np.array(value.shape, "u8"))
        item.attrs["MATLAB_empty"] = np.uint8(1)
        kind = "double"
    else:
        packed = {"chunks": True, "compression": 3} if value.size > 20 else {}
        item = group.create_dataset(name, data=value.T, **packed)
        kind = {"f4": "single", "f8": "double"}.get(value.dtype.str[1:], value.dtype.name)
    assert isinstance(item, h5py.Dataset | h5py.Group)
    item.attrs["MATLAB_class"] = np.bytes_(kind)
    return item


def v73(path, edit):
    """A v7.3 file; `edit` fills it."""
    with h5py.File(path, "w", userblock_size=512) as file:
        edit(file)
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: ... HDF5 schema 1.00 ."
    with open(path, "r+b") as file:
        file.write(head.ljust(116) + bytes(8) + b"\x00\x02IM")


# Round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SIZES)
def test_round_trips_are_bitwise(tmp_path, sizes, mode, dtype):
    for options in (FOREIGN, {"gate_activation_function": "sigmoid"}):
        params = make(*sizes, mode, dtype, **options)
        assert is_same(params, from_matlab(to_matlab(params)))
        assert is_same(params, from_safetensors(to_safetensors(params)))
        for kind in FILES if dtype in ("float64", "float32") else FILES[2:]:
            write(params, tmp_path / "gru", kind)
            assert is_same(params, read(tmp_path / "gru", kind))
            assert os.listdir(tmp_path) == ["gru"]


def test_special_values_mixed_dtypes_jax_arrays_and_fortran_order(tmp_path):
    params = make(mode=RECURRENT_BIAS, dtype="float64")
    W = np.asfortranarray(params.input_weights.astype("float32"))
    W[0], W[1], W[2] = np.nan, -np.inf, -0.0
    params = params.replace(input_weights=jnp.asarray(W), bias=params.bias[::-1])
    for kind in FILES:
        for given in (params, params.replace(input_weights=W)):
            write(given, tmp_path / "gru", kind)
            assert is_same(read(tmp_path / "gru", kind), params)


def test_the_same_parameters_give_the_same_bytes(tmp_path):
    for kind in ("v7", "v7.3"):  # safetensors orders its metadata at random
        for name in ("one", "two"):
            write(make(), tmp_path / name, kind)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# MATLAB, against other readers and writers


def test_names_and_orientation_in_matlab():
    params = make(5, 4, 2, 3, RECURRENT_BIAS)
    layer = to_matlab(params)
    assert {name: np.shape(value) for name, value in layer.items() if np.ndim(value)} == {
        "OutputProjector": (5, 3), "InputProjector": (4, 2), "Bias": (30, 1),
        "RecurrentWeights": (15, 3), "InputWeights": (15, 2),
    }  # fmt: skip
    assert layer["ResetGateMode"] == RECURRENT_BIAS
    assert layer["GateActivationFunction"] == "hard-sigmoid"
    assert layer["StateActivationFunction"] == "softsign"
    np.testing.assert_array_equal(layer["RecurrentWeights"], params.recurrent_weights)
    assert "InputProjector" not in to_matlab(make(P_i=None))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scipy_reads_what_is_written_and_writes_what_is_read(tmp_path, sizes, dtype):
    params, path = make(*sizes, dtype=dtype), tmp_path / "gru.mat"
    layer = to_matlab(params, path)
    for name, found in scipy.io.loadmat(path, mat_dtype=True).items():
        if not name.startswith("__"):
            np.testing.assert_array_equal(found, layer.pop(name), strict=found.dtype.kind == "f")
    assert not layer
    layer = to_matlab(params)
    for compress in (False, True):
        scipy.io.savemat(path, layer | {"net": {"gru1": layer}}, do_compression=compress)
        assert is_same(from_matlab(path), params)
        assert is_same(from_matlab(str(path), variable="net.gru1"), params)
        loaded = scipy.io.loadmat(path, mat_dtype=True)
        assert is_same(from_matlab(loaded), params)
        assert is_same(from_matlab(loaded, variable="net.gru1"), params)
    swapped = {n: v if v.dtype.kind == "U" else v.astype(v.dtype.newbyteorder(">"))
               for n, v in loaded.items() if n in layer}  # fmt: skip
    assert is_same(from_matlab(swapped), params)
    scipy.io.savemat(path, {"net": np.array([(1,), (2,)], [("gru1", object)])})
    for source in (path, scipy.io.loadmat(path)):
        with pytest.raises(ValueError, match=r"net must be one struct of arrays, got (array|sev)"):
            from_matlab(source, variable="net.gru1")


def test_a_file_that_octave_wrote():
    count = lambda *shape: np.arange(1.0, 1 + np.prod(shape)).reshape(shape, order="F")  # noqa: E731
    wanted = gru_jax.GRUParams(
        (count(12, 3) / 8).astype("f4"), (count(12, 4) / 16).astype("f4"),
        (count(12) / 4).astype("f4"), reset_gate_mode=BEFORE,
    )  # fmt: skip
    assert is_same(from_matlab(OCTAVE), wanted)
    wanted = gru_jax.GRUParams(
        -count(12, 3) / 3, count(12, 2) / 7, np.zeros(24), None, count(4, 2),
        reset_gate_mode=RECURRENT_BIAS,
    )  # fmt: skip
    assert is_same(from_matlab(OCTAVE, variable="net.gru1"), wanted)
    for variable, match in (("net", "it has gru1"), ("mask", "logical"), ("a.b", "a struct 'a'"),
                            ("net.gru1.Bias", "one struct"), ("XTrain", "cell")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"octave_gru\.mat: .*{match}"):
            from_matlab(OCTAVE, variable=variable)


def test_whole_numbers_in_few_bytes_and_big_endian_files(tmp_path):
    path = tmp_path / "gru.mat"
    W, R = np.arange(30.0).reshape(6, 5), 5 - np.arange(12.0).reshape(6, 2)
    for order, codec in (("<", "utf-16-le"), (">", "utf-16-be")):
        b = np.linspace(0, 1, 6).astype(order + "f4")
        path.write_bytes(v5(
            matrix("ResetGateMode", 4, (1, 21), 4, BEFORE.encode(codec), order),
            matrix("InputWeights", 6, (6, 5), 2, W.astype("u1").tobytes("F"), order),
            matrix("RecurrentWeights", 6, (6, 2), 3, R.astype(order + "i2").tobytes("F"), order),
            matrix("Bias", 7, (6, 1), 7, b.tobytes(), order), order=order,
        ))  # fmt: skip
        wanted = gru_jax.GRUParams(W, R, b.astype("f4"), reset_gate_mode=BEFORE)
        assert is_same(from_matlab(path), wanted)


@pytest.mark.parametrize("sizes", SIZES)
def test_v73_as_matlab_writes_it(tmp_path, sizes):
    params, path = make(*sizes, dtype="float64"), tmp_path / "gru.mat"
    layer = to_matlab(params) | {"Name": "gru", "HiddenState": np.empty((0, 0))}
    layer = {"InputProjector": np.empty((0, 0)), "OutputProjector": np.empty((3, 0))} | layer
    v73(path, lambda file: [put(file, n, v) for n, v in (layer | {"net": {"g": layer}}).items()])
    assert is_same(from_matlab(path), params)
    assert is_same(from_matlab(path, variable="net.g"), params)


def test_v73_is_written_as_matlab_needs_it(tmp_path):
    layer = to_matlab(make(), tmp_path / "gru.mat", version="v7.3")
    head = (tmp_path / "gru.mat").read_bytes()[:520]
    assert head.startswith(b"MATLAB 7.3 MAT-file, ")
    assert head[116:128] == bytes(8) + b"\x00\x02IM"
    assert head[512:] == b"\x89HDF\r\n\x1a\n"
    with h5py.File(tmp_path / "gru.mat") as file:
        assert set(file) == set(layer)
        for name, value in layer.items():
            text = isinstance(value, str)
            assert file[name].attrs["MATLAB_class"] == (b"char" if text else b"single")
            stored = np.array([[ord(c)] for c in value], "u2") if text else value.T
            np.testing.assert_array_equal(file[name][()], stored, strict=True)
            assert not text or file[name].attrs["MATLAB_int_decode"] == 2


# MATLAB: what is refused


def test_shapes_are_never_turned_to_fit():
    square = make(3, 9, None, None)  # 3H = I: both orientations of W have one shape
    layer = to_matlab(square)
    turned = from_matlab(layer | {"InputWeights": layer["InputWeights"].T})
    np.testing.assert_array_equal(turned.input_weights, square.input_weights.T)
    for params in (square, make(4, 3), make(1, 1, None, None), make(2, 12, 6, 6)):
        layer = to_matlab(params)
        for name in [n for n, v in layer.items() if not isinstance(v, str)]:
            value = layer[name]
            if value.shape != value.shape[::-1]:
                shape = " x ".join(map(str, value.shape[::-1]))
                with pytest.raises(ValueError, match=rf"{name} {shape}.*rows are those of the ga"):
                    from_matlab(layer | {name: value.T})
            with pytest.raises(ValueError, match=r"source: .*2 axes|must be"):
                from_matlab(layer | {name: value.ravel()})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a.astype("int32"), "int32.*mat_dtype=True"),
        (lambda a: a > 0, "logical|bool"),
        (lambda a: a + 1j, "complex"),
        (lambda a: a.astype(object), "cell"),
        (lambda a: a.tolist(), "an array, got list"),
        (lambda a: np.array(["ab", "cd"]), "char"),
        (lambda a: {"a": a}, "struct.*variable="),
        (lambda a: a[:0], "not been initialised"),
        (lambda a: a[..., None], "2 axes"),
        (lambda a: a[:-1], "must be"),
    ],
)  # fmt: skip
def test_other_classes_are_refused(change, match):
    layer = to_matlab(make())
    for name in ("InputWeights", "RecurrentWeights", "Bias"):
        with pytest.raises(ValueError, match=f"source: .*({match})"):
            from_matlab(layer | {name: change(layer[name])})
        with pytest.raises(ValueError, match=f"must have {name}; it has "):
            from_matlab({n: v for n, v in layer.items() if n != name})


@pytest.mark.parametrize("version", ["v7", "v7.3"])
def test_other_classes_in_files_are_refused(tmp_path, version):
    layer, path = to_matlab(make(P_i=None)), tmp_path / "gru.mat"
    W = layer["InputWeights"]
    values = {"int32": W.astype("i4"), "(logical|bool)": W > 0, "complex": W + 1j}
    if version == "v7":
        values |= {"sparse": scipy.sparse.csc_array(W), "cell": W.astype(object)}
    for match, value in values.items():
        changed = layer | {"InputWeights": value}
        if version == "v7":
            scipy.io.savemat(path, changed)
        else:
            v73(path, lambda file, new=changed: [put(file, n, v) for n, v in new.items()])
        with pytest.raises(ValueError, match=rf"gru\.mat: InputWeights must be .*got {match}"):
            from_matlab(path)


def test_objects_are_refused_with_the_way_out(tmp_path):
    path, match = tmp_path / "gru.mat", "got object.*save plain arrays"
    rest = [matrix(n, 6, (1, 1), 9, bytes(8)) for n in ("RecurrentWeights", "Bias")]
    made = opaque("InputWeights")
    packed = zlib.compress(made)
    for content in (made, struct.pack("<II", 15, len(packed)) + packed):
        path.write_bytes(v5(*rest, content))
        with pytest.raises(ValueError, match=f"InputWeights.*{match}"):
            from_matlab(path)
    inner = element(14, b"".join([
        element(6, struct.pack("<II", 2, 0)), element(5, struct.pack("<ii", 1, 1)),
        element(1, b"s"), element(5, struct.pack("<i", 17)), element(1, b"".join(
            n.encode().ljust(17, b"\0") for n in ("InputWeights", "RecurrentWeights", "Bias"))),
        *[opaque("")] * 3,
    ]))  # fmt: skip
    path.write_bytes(v5(inner, opaque("net")))
    with pytest.raises(ValueError, match=match):
        from_matlab(path, variable="s")
    with pytest.raises(ValueError, match=r"net must be one struct.*got object.*save plain"):
        from_matlab(path, variable="net.gru")
    with pytest.raises(ValueError, match=r"it has s, net.*save plain arrays"):
        from_matlab(path)

    def fill(file):
        for name, value in to_matlab(make()).items():
            put(file, name, value)
        file["Bias"].attrs["MATLAB_object_decode"] = np.int32(3)

    v73(path, fill)
    with pytest.raises(ValueError, match=f"Bias.*{match}"):
        from_matlab(path)


def test_v73_reads_nothing_but_what_stands_in_the_file(tmp_path):
    layer, path = to_matlab(make(dtype="float64")), tmp_path / "gru.mat"
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        put(file, "Bias", layer["Bias"])
    raw = tmp_path / "raw"
    raw.write_bytes(layer["Bias"].tobytes())
    layout = h5py.VirtualLayout((1, 12), "f8")
    layout[:] = h5py.VirtualSource(other, "Bias", (1, 12))
    bad = {
        "got link": lambda f: f.__setitem__("Bias", h5py.ExternalLink(str(other), "/Bias")),
        "got  ?link": lambda f: f.__setitem__("Bias", h5py.SoftLink("/InputWeights")),
        "got (link)": lambda f: f.create_dataset("Bias", (1, 12), "f8", external=[(raw, 0, 96)]),
        "(got link)": lambda f: f.create_virtual_dataset("Bias", layout),
        "not stored": lambda f: f.create_dataset("Bias", (1, 10**12), "f8", chunks=(1, 1000)),
        "holds int32": lambda f: f.create_dataset("Bias", data=np.ones((1, 12), "i4")),
        "no MATLAB class": lambda f: f.create_dataset("Bias", data=layer["Bias"].T),
    }
    for match, make_bias in bad.items():

        def fill(file, match=match, make_bias=make_bias):
            for name in [n for n in layer if n != "Bias"]:
                put(file, name, layer[name])
            make_bias(file)
            if match != "no MATLAB class" and isinstance(
                file.get("Bias", getlink=True), h5py.HardLink
            ):
                file["Bias"].attrs["MATLAB_class"] = np.bytes_("double")

        v73(path, fill)
        with pytest.raises(ValueError, match=rf"gru\.mat: Bias .*{match}"):
            from_matlab(path)


def test_deep_nests_double_names_and_wrong_sizes(tmp_path):
    path = tmp_path / "gru.mat"
    nest = b""
    for _ in range(2000):
        nest = element(14, b"".join([
            element(6, struct.pack("<II", 2, 0)), element(5, struct.pack("<ii", 1, 1)),
            element(1, b"Bias"), element(5, struct.pack("<i", 2)), element(1, b"a\0"), nest,
        ]))  # fmt: skip
    unsigned = zlib.compress(matrix("Bias", 6, (1, 1), 9, bytes(8)))[:-4]
    longer = zlib.compress(matrix("Bias", 6, (1, 1), 9, bytes(8))) + b"more"
    one = matrix("InputWeights", 6, (1, 1), 9, bytes(8))
    more = matrix("RecurrentWeights", 6, (1, 1), 9, bytes(8))
    for content, match in (
        (one + more + nest, "Bias must be .*got struct"),
        (one + one, "two variables InputWeights"),
        (matrix("InputWeights", 6, (-1, -8), 9, bytes(64)), "must have"),
        (one + more + matrix("Bias", 6, (-1, -8), 9, bytes(64)), "cannot be read"),
        (one + more + matrix("Bias", 6, (9, 9), 9, bytes(8)), "holds 1 float64"),
        (one + more + matrix("Bias", 7, (1, 1), 9, bytes(8)), "holds 1 float64"),
        (one + more + struct.pack("<II", 15, len(unsigned)) + unsigned, "cut off, too long or"),
        (one + more + struct.pack("<II", 15, len(longer)) + longer, "cut off, too long or"),
        (one + more + matrix("Bias", 6, (1, 1), 9, bytes(8))[:-8], "cut off or damaged"),
        (element(13, b""), "unknown kind 13"),
    ):
        path.write_bytes(v5(content))
        with pytest.raises(ValueError, match=rf"gru\.mat: .*{match}"):
            from_matlab(path)


@pytest.mark.parametrize("number", [6, 7])
def test_matrices_that_unpack_to_more_than_the_format_holds(tmp_path, monkeypatch, number):
    path, names = tmp_path / "gru.mat", ("InputWeights", "RecurrentWeights", "Bias")
    numbers = 1200 // (8 if number == 6 else 4)
    for rows, refused in ((numbers, False), (numbers + 3, True)):
        packed = [zlib.compress(matrix(n, number, (rows, 1), 2, bytes(rows))) for n in names]
        path.write_bytes(v5(*(struct.pack("<II", 15, len(p)) + p for p in packed)))
        monkeypatch.setattr(_mat5, "LARGEST", 1200)
        match = rf"gru\.mat: a (double|single) matrix must have less .* \({rows}, 1\)"
        with pytest.raises(ValueError, match=match if refused else "RecurrentWeights must be"):
            from_matlab(path)


# Options


@pytest.mark.parametrize("source", ["matlab", "safetensors"])
def test_options_from_the_caller_and_from_the_file(source):
    for mode in MODES:
        params = make(mode=mode)
        if source == "matlab":
            full, layer = to_matlab(params), to_matlab(params)
            bare = {n: v for n, v in layer.items() if not isinstance(v, str)}
            back = from_matlab
        else:
            full, bare = to_safetensors(params), safetensors.save(params.arrays())
            back = from_safetensors
        found = back(bare)
        assert found.reset_gate_mode == (RECURRENT_BIAS if mode == RECURRENT_BIAS else AFTER)
        assert found.state_activation_function == "tanh"
        assert found.gate_activation_function == "sigmoid"
        assert is_same(back(bare, reset_gate_mode=mode, **FOREIGN), params)
        assert is_same(back(full, reset_gate_mode=mode.replace("-", ""), **FOREIGN), params)
        for option, other in (("reset_gate_mode", next(m for m in MODES if m != mode)),
                              ("state_activation_function", "tanh"),
                              ("gate_activation_function", "sigmoid")):  # fmt: skip
            with pytest.raises(ValueError, match=f"{option} is saved as .* contradicts"):
                back(full, **{option: other})
            with pytest.raises(ValueError, match=f"{option} must be one of"):
                back(bare, **{option: "relu"})
    with pytest.raises(ValueError, match=r"bias must have shape \(12,\), got \(24,\)"):
        back(bare, reset_gate_mode=AFTER)


def test_options_in_other_forms_are_refused():
    layer = to_matlab(make())
    for value, match in ((np.array(["tanh", "tank"]), "several"), (np.ones((1, 1)), "float64"),
                         ("", "one of"), ("gelu", "one of")):  # fmt: skip
        with pytest.raises(ValueError, match=f"(?i)state_?activation_?function must be .*{match}"):
            from_matlab(layer | {"StateActivationFunction": value})
    custom = make(state_activation_function=jnp.sin)
    for target in (to_matlab, to_safetensors):
        with pytest.raises(ValueError, match="a file holds no functions"):
            target(custom)


# Writing


@pytest.mark.parametrize("kind", FILES)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, kind):
    path = tmp_path / "gru"
    path.write_bytes(b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                write(make(), path, kind)
        assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["gru"])
    with pytest.raises(FileNotFoundError):
        write(make(), tmp_path / "nowhere" / "gru", kind)
    (tmp_path / "link").symlink_to(path)
    write(make(), tmp_path / "link", kind)
    assert (tmp_path / "link").is_symlink()
    assert is_same(read(path, kind), make())
    other = tmp_path / "plain"
    other.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    for dtype in DTYPES[2:]:
        for version in ("v7", "v7.3"):
            with pytest.raises(TypeError, match=r"float64 or float32 in a file.*astype\('float32'"):
                to_matlab(make(dtype=dtype), tmp_path / "gru.mat", version=version)
    with pytest.raises(ValueError, match="version must be one of"):
        to_matlab(make(), tmp_path / "gru.mat", version="v6")
    for target in (to_matlab, to_safetensors):
        with pytest.raises(ValueError, match="bias must have shape"):
            target(make().replace(bias=np.ones(7)), tmp_path / "gru.mat")
        with pytest.raises(TypeError, match="GRUParams"):
            target({"bias": 1}, tmp_path / "gru.mat")
    assert not os.listdir(tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    write(make(), tmp_path / "v73", "v7.3")
    data = to_safetensors(make())
    for name in ("h5py", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: from_matlab(tmp_path / "v73"),
                 lambda: to_matlab(make(), tmp_path / "x", version="v7.3")):  # fmt: skip
        with pytest.raises(ModuleNotFoundError, match=r"gru_jax\[matlab\]"):
            call()
    for call in (lambda: from_safetensors(data), lambda: to_safetensors(make())):
        with pytest.raises(ModuleNotFoundError, match=r"gru_jax\[safetensors\]"):
            call()


# Safetensors


def test_the_package_reads_what_is_written_and_prefixes_keep_layers_apart(tmp_path):
    one, two = make(5, 4), make(3, 5, None, None, RECURRENT_BIAS)
    data = to_safetensors(one, prefix="encoder.")
    found = safetensors.load(data)
    assert set(found) == {f"encoder.{name}" for name in one.arrays()}
    np.testing.assert_array_equal(found["encoder.bias"], one.bias, strict=True)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["encoder.reset_gate_mode"] == BEFORE
    both = found | two.arrays() | {"head.kernel": np.ones((2, 2), "i4"), "a/b": np.ones(1, "i1")}
    safetensors.save_file(both, tmp_path / "both", header["__metadata__"])
    assert is_same(from_safetensors(tmp_path / "both", prefix="encoder."), one)
    activations = {"state_activation_function": "softsign", "gate_activation_function": "sigmoid"}
    assert is_same(from_safetensors(tmp_path / "both", **activations), two.replace(**activations))


def test_arrays_that_do_not_belong_are_refused():
    arrays = make().arrays()
    for change, match in (
        ({"input_projectr": np.ones(3)}, "got also input_projectr.*prefix of its own"),
        ({"bias": np.ones(12, "i4")}, "bias must be F64, F32, F16, BF16, got I32"),
        ({"bias": np.ones((12, 1))}, "bias must have 1 axis"),
        ({"bias": np.ones(11)}, "bias must have shape"),
        ({"input_weights": arrays["input_weights"].T.copy()}, "input_weights must have shape"),
    ):
        with pytest.raises(ValueError, match=f"safetensors: .*{match}"):
            from_safetensors(safetensors.save(arrays | change))
    for name in ("input_weights", "recurrent_weights", "bias"):
        with pytest.raises(ValueError, match=f"must have {name}; it has "):
            from_safetensors(safetensors.save({n: a for n, a in arrays.items() if n != name}))
    with pytest.raises(ValueError, match=r"all options or none, state_act.*are missing"):
        from_safetensors(safetensors.save(arrays, {"reset_gate_mode": BEFORE}))


# Damaged and hostile content


@pytest.mark.parametrize("kind", FILES)
def test_every_file_that_is_cut_off_is_refused(tmp_path, kind):
    path = tmp_path / "gru"
    write(make(), path, kind)
    good = path.read_bytes()
    for end in range(0, len(good), 1 + len(good) // 1500):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match=f"^{path}: "):
            read(path, kind)


@pytest.mark.parametrize("kind", FILES)
def test_flipped_bytes_are_refused_or_change_nothing_where_there_is_a_checksum(tmp_path, kind):
    params, path, refused = make(), tmp_path / "gru", 0
    write(params, path, kind)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for at in range(0, len(good), 1 + len(good) // 1500):
        bad = bytearray(good)
        bad[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try:
            found = read(path, kind)
        except ValueError:
            refused += 1
        else:
            assert isinstance(found, gru_jax.GRUParams)
            assert kind != "v7" or is_same(found, params)
    assert refused > 100


class Bomb:
    """What a pickle can do when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_other_content_is_refused_and_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("zip", "w") as archive:
        archive.writestr("InputWeights", "1")
    with h5py.File("hdf5", "w") as file:
        put(file, "Bias", np.ones((3, 1)))
    np.savez("npz.npz", **make().arrays())
    np.save("npy.npy", np.array([Bomb()]), allow_pickle=True)
    Path("pickle").write_bytes(pickle.dumps(Bomb()))
    Path("text").write_text("InputWeights = 1;\n" * 40)
    Path("matlab 4").write_bytes(struct.pack("<5i", 0, 1, 1, 0, 2) + b"x\0" + bytes(300))
    Path("random").write_bytes(np.random.default_rng(0).bytes(5000))
    Path("zeros").write_bytes(bytes(1000))
    header = b'{"bias":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}'
    Path("large").write_bytes(len(header).to_bytes(8, "little") + header)
    Path("larger").write_bytes((2**62).to_bytes(8, "little") + header)
    for path in sorted(Path().iterdir()):
        for back in (from_matlab, from_safetensors):
            with pytest.raises(ValueError, match=rf"^{path}: it must be a .*(Save it|safeten)"):
                back(path)
    for version in (1, 2):
        Path("v").write_bytes(v5(pickle.dumps(Bomb()) * 9, version=version))
        with pytest.raises(ValueError, match=r"^v: it "):
            from_matlab("v")
    assert not Path("executed").exists()
    for back in (from_matlab, from_safetensors):
        with pytest.raises(FileNotFoundError):
            back("nothing.mat")
        with pytest.raises(TypeError):
            back(3)
    with pytest.raises(TypeError, match="variable must be a name"):
        from_matlab({}, variable=3)
