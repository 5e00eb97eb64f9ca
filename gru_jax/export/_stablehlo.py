"""A trained GRU as one StableHLO program, through `jax.export`: weights within, sizes of data open.

An artefact is what `jax.export.Exported.serialize` gives, and 40 bytes behind it: the SHA-256 of
all before, and a mark. `jax.export.deserialize` does not see them; `from_stablehlo` needs them,
because the reader behind JAX may crash or hang on damaged bytes.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from gru_jax import _arguments, _checks
from gru_jax._params import GRUParams
from gru_jax._sequence import gru
from gru_jax.convert import _arrays
from gru_jax.export._program import Program, need_x64

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
MARK = b"gru_jax\x01"
FOOTER = hashlib.sha256().digest_size + len(MARK)


def to_stablehlo(
    params: GRUParams,
    *,
    gradient: bool = False,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    lengths: bool = False,
    output_mode: str = "sequence",
    reverse: bool = False,
    precision: Any = None,
) -> bytes:
    """Compiles a GRU with its weights into a portable program for other processes and machines.

    The program maps x (batch, time, channels) and h0 (batch, H) to y and hidden, as `gru_jax.gru`
    does, for any batch and any time of at least 1. It runs wherever JAX does, without this package:
    `from_stablehlo` loads it, and so does `jax.export.deserialize`. Projected layers keep their
    factors; custom activation functions are part of the program.

    It is no archive: JAX promises that versions up to six months newer and three weeks older than
    the one that wrote it can read it. Keep the parameters too. Like any program exported by JAX it
    names the source files that made it.

    Args:
      params: the parameters. The type that x must have, and y has, is their promoted type; h0 and
        hidden have the same, but at least float32.
      gradient: include the derivative, so that `jax.grad` with respect to x and h0 works, once and
        in reverse mode. The weights are constants: they have no gradient, and are stored twice.
      platforms: what it can run on, of "cpu", "cuda", "rocm" and "tpu"; none of them need be here.
      lengths: take true lengths (batch,) of int32 as third argument.
      output_mode: "sequence" for all outputs, "last" for the final one.
      reverse: process from each sequence's own last step to its first.
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      The artefact.

    Raises:
      TypeError: `params` are no `GRUParams` of floating-point arrays.
      ValueError: shapes do not fit, an option is unknown, a mesh is set, or the parameters are
        float64 and JAX is not in its 64-bit mode.
      ModuleNotFoundError: the package flatbuffers is missing.

    References:
      https://docs.jax.dev/en/latest/export/export.html

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> from gru_jax import export
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> run = export.from_stablehlo(export.to_stablehlo(params))
      >>> y, hidden = run(jnp.ones((2, 7, 12)))
      >>> y.shape, hidden.shape, run.platforms
      ((2, 7, 100), (2, 100), ('cpu', 'cuda', 'tpu'))
    """
    _checks.package("flatbuffers", "export", "StableHLO artefacts need")
    sizes = _arguments.sizes_of(params)
    arrays = {name: _arrays.array(name, value) for name, value in params.arrays().items()}
    for array in arrays.values():
        need_x64(array.dtype, "params are")
    dtype, state_dtype = _arguments.result_dtypes(*arrays.values())
    params = params.replace(**{name: jnp.asarray(array) for name, array in arrays.items()})
    options: dict = {"output_mode": output_mode, "reverse": reverse, "precision": precision}

    def gru_jax_gru(x: jax.Array, h0: jax.Array, *flags: jax.Array) -> tuple:
        return gru(params, x, h0, lengths=flags[0] if flags else None, **options)

    batch, time = jax_export.symbolic_shape("batch, time")
    arguments = [
        jax.ShapeDtypeStruct((batch, time, sizes.input_size), dtype),
        jax.ShapeDtypeStruct((batch, sizes.num_hidden_units), state_dtype),
    ]
    if _checks.flag("lengths", lengths):
        arguments.append(jax.ShapeDtypeStruct((batch,), jnp.int32))
    order = int(_checks.flag("gradient", gradient))
    make = jax_export.export(jax.jit(gru_jax_gru), platforms=_checked_platforms(platforms))
    exported = make(*arguments)
    if exported.nr_devices != 1:
        raise ValueError(
            f"the program would be for {exported.nr_devices} devices only: call to_stablehlo "
            "outside jax.set_mesh. Its caller may split the batch over any mesh."
        )
    return _sealed(bytes(exported.serialize(vjp_order=order)))


def from_stablehlo(data: bytes) -> Program:
    """Loads an artefact of `to_stablehlo`.

    Only load what you trust: a program is run when it is called. Damage by accident is found, by
    a checksum, before anything is read.

    Args:
      data: what `to_stablehlo` returned, as bytes.

    Returns:
      A function, (x, h0) -> (y, hidden); see `Program`.

    Raises:
      TypeError: `data` are no bytes.
      ValueError: they are no artefact of `to_stablehlo`, damaged, or of another time's JAX.
      ModuleNotFoundError: the package flatbuffers is missing.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import export
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> export.from_stablehlo(export.to_stablehlo(params, gradient=True))
      Program(input_size=12, num_hidden_units=100, dtype=float32, gradient=True, lengths=False, \
platforms=('cpu', 'cuda', 'tpu'))
    """
    _checks.package("flatbuffers", "export", "StableHLO artefacts need")
    payload = _unsealed(data)
    try:
        exported = jax_export.deserialize(bytearray(payload))
        for program in (exported, exported.vjp()) if exported.has_vjp() else (exported,):
            program.mlir_module()  # JAX itself would read it at the first call only
    except Exception as error:
        raise ValueError(
            f"data could not be read by JAX {jax.__version__}; its readers reach six months back "
            "and three weeks ahead. Export the parameters anew with to_stablehlo."
        ) from error
    return Program(exported)


def _sealed(payload: bytes) -> bytes:
    """The payload, its checksum and the mark."""
    return payload + hashlib.sha256(payload).digest() + MARK


def _unsealed(data: Any) -> bytes:
    """The payload of an artefact, once it is known to be whole."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(
            f"data must be the bytes of an artefact, got {type(data).__name__}; read a file with "
            "pathlib.Path(name).read_bytes()."
        )
    data = bytes(data)
    if not data.endswith(MARK):
        raise ValueError(
            f"data is no artefact of to_stablehlo, or cut off: its {len(data)} bytes do not end as "
            "one. What jax.export serialised by itself loads with jax.export.deserialize."
        )
    payload = data[:-FOOTER]
    if _sealed(payload) != data:
        raise ValueError(
            "data is damaged: its checksum differs. Copy the artefact again, as a binary file."
        )
    return payload


def _checked_platforms(platforms: Any) -> tuple[str, ...]:
    """The platforms as a tuple of known names."""
    names = () if isinstance(platforms, str) else tuple(platforms)
    if not names or not all(name in PLATFORMS for name in names):
        raise ValueError(
            f"platforms must be some of {PLATFORMS}, got {platforms!r}; a GPU is 'cuda' or 'rocm'."
        )
    return names
