"""MATLAB: gruLayer and gruProjectedLayer as plain arrays, in memory or in a .mat file."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gru_jax import _arguments, _checks
from gru_jax._params import OPTION_CHECKS, GRUParams
from gru_jax.convert import _arrays, _files, _hdf5, _mat, _mat5


def from_matlab(
    source: str | os.PathLike | Mapping[str, Any],
    *,
    variable: str | None = None,
    reset_gate_mode: str | None = None,
    state_activation_function: Any = None,
    gate_activation_function: Any = None,
) -> GRUParams:
    """Reads the learnables of MATLAB's gruLayer or gruProjectedLayer, saved as plain arrays.

    The names and shapes are the layers' own, with the rows in our order::

        InputWeights      3H x I       3H x P_i with an InputProjector
        RecurrentWeights  3H x H       3H x P_o with an OutputProjector
        Bias              3H x 1       6H x 1 in mode recurrent-bias-after-multiplication
        InputProjector    I x P_i      absent or []
        OutputProjector   H x P_o      absent or []
        ResetGateMode, StateActivationFunction, GateActivationFunction    char, may be absent

    Layers, networks and dlarrays are objects, which no other program can read. In MATLAB::

        layer = net.Layers(2);
        s = struct;
        for name = ["ResetGateMode" "StateActivationFunction" "GateActivationFunction"]
            s.(name) = char(layer.(name));
        end
        for name = ["OutputProjector" "InputProjector" "Bias" "RecurrentWeights" "InputWeights"]
            if isprop(layer, name)
                value = layer.(name);
                if isa(value, "dlarray"), value = extractdata(value); end
                s.(name) = gather(value);
            end
        end
        save("gru.mat", "-struct", "s")            % or save("gru.mat", "-struct", "s", "-v7.3")

    Matrices are taken as they stand, never transposed to make them fit; those of a v7.3 file are
    always turned back, because that format turns them round.

    Args:
      source: path of a .mat file of version 5, 6, 7 or 7.3, or a mapping from these names to
        matrices in MATLAB's orientation (of `scipy.io.loadmat`: with `mat_dtype=True`).
      variable: the struct that holds the arrays, for example "gru" or "net.gru1"; None (default)
        where they are variables of the file.
      reset_gate_mode: None (default) for the ResetGateMode of the file; without one there, a bias
        of 6H rows means "recurrent-bias-after-multiplication" and one of 3H MATLAB's default
        "after-multiplication". "before-multiplication" has the same shapes and so must be said,
        there or here.
      state_activation_function: None (default) for the file's, or else "tanh".
      gate_activation_function: None (default) for the file's, or else "sigmoid".

    Returns:
      The parameters, NumPy arrays of the stored class: double float64, single float32.

    Raises:
      ValueError: the source cannot be read, holds objects or other classes, lacks an array, or its
        shapes or options do not fit.
      TypeError: it is neither a path nor a mapping.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the package h5py, which v7.3 needs, is missing.

    References:
      https://www.mathworks.com/help/deeplearning/ref/nnet.cnn.layer.grulayer.html

    Example:
      >>> import numpy as np
      >>> from gru_jax import convert
      >>> layer = {"InputWeights": np.ones((15, 3)), "RecurrentWeights": np.ones((15, 5)),
      ...          "Bias": np.ones((30, 1))}
      >>> convert.from_matlab(layer).reset_gate_mode
      'recurrent-bias-after-multiplication'
    """
    asked = {
        "reset_gate_mode": reset_gate_mode,
        "state_activation_function": state_activation_function,
        "gate_activation_function": gate_activation_function,
    }
    if variable is not None and not isinstance(variable, str):
        raise TypeError(f"variable must be a name or None, got {variable!r}.")
    if isinstance(source, Mapping):
        with _files.reading("source"):
            return _files.assemble(*_mat.split(_mat.take(source, variable)), asked)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "source must be the path of a .mat file or a mapping from names to arrays, got "
            f"{type(source).__name__}."
        )
    with _files.reading(os.fspath(source)):
        return _files.assemble(*_mat.split(_mat.load(os.fspath(source), variable)), asked)


def to_matlab(
    params: GRUParams, file: str | os.PathLike | None = None, *, version: str = "v7"
) -> dict[str, np.ndarray | str]:
    """Returns parameters as MATLAB's layers name and shape them, and writes a .mat file if named.

    Projectors stay. In MATLAB a file becomes a layer again by::

        s = load("gru.mat");
        layer = gruLayer(size(s.RecurrentWeights, 1) / 3, ResetGateMode=s.ResetGateMode, ...
            StateActivationFunction=s.StateActivationFunction, ...
            GateActivationFunction=s.GateActivationFunction, ...
            InputWeights=s.InputWeights, RecurrentWeights=s.RecurrentWeights, Bias=s.Bias);

    Args:
      params: the parameters.
      file: path of a .mat file to write; one that exists is replaced, as a whole or not at all.
      version: "v7" (default), or "v7.3", which is HDF5.

    Returns:
      Arrays as in `from_matlab`, of the dtypes of the leaves, and the three options as text.

    Raises:
      TypeError: the file would need float16 or bfloat16, which MATLAB does not have.
      ValueError: shapes do not fit, an activation function is no name, or the version is unknown.
      ModuleNotFoundError: the package h5py, which v7.3 needs, is missing.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import convert
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> layer = convert.to_matlab(params)
      >>> layer["Bias"].shape, layer["ResetGateMode"]
      ((15, 1), 'after-multiplication')
      >>> convert.from_matlab(layer)
      GRUParams(input_weights=float32(15, 3), recurrent_weights=float32(15, 5), bias=float32(15,))
    """
    version = _checks.choice("version", version, ("v7", "v7.3"))
    _arguments.sizes_of(params)
    values = _files.names_of_options(params) | params.arrays()
    result = {}
    for matlab_name, name in _mat.NAMES.items():
        if name in OPTION_CHECKS:
            result[matlab_name] = values[name]
        elif name in values:
            value = _arrays.array(name, values[name])
            result[matlab_name] = value[:, None] if name == "bias" else value
    if file is not None:
        _files.write(file, _content(result, version))
    return result


def _content(variables: dict[str, np.ndarray | str], version: str) -> bytes:
    """The bytes of a file."""
    for name, value in variables.items():
        if not isinstance(value, str) and value.dtype not in (np.float64, np.float32):
            raise TypeError(
                f"{name} must be float64 or float32 in a file, because MATLAB has no {value.dtype}."
                " Convert: jax.tree.map(lambda a: a.astype('float32'), params)."
            )
    return (_hdf5 if version == "v7.3" else _mat5).content(variables)
