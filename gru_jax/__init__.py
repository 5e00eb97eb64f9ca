"""Gated recurrent units for JAX: one functional core, thin Flax layers.

`gru_jax.gru` and `gru_jax.gru_cell` are pure functions over `gru_jax.GRUParams`;
`gru_jax.linen` and `gru_jax.nnx` wrap them in Flax modules.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import Any as _Any

from gru_jax import formats as formats
from gru_jax._cell import gru_cell as gru_cell
from gru_jax._initializers import init_params as init_params
from gru_jax._options import CellOptions as CellOptions
from gru_jax._options import LayerOptions as LayerOptions
from gru_jax._parallel import gru_parallel as gru_parallel
from gru_jax._params import GRUParams as GRUParams
from gru_jax._params import num_learnables as num_learnables
from gru_jax._params_of import params_of as params_of
from gru_jax._sequence import gru as gru


def __getattr__(name: str) -> _Any:
    """Loads what needs more than JAX when it is asked for."""
    if name in ("convert", "export", "linen", "nnx", "optim", "projection", "ragged"):
        return _import_module(f"gru_jax.{name}")
    raise AttributeError(f"module 'gru_jax' has no attribute {name!r}")


__version__ = _version("gru_jax")
__all__ = [
    "CellOptions",
    "GRUParams",
    "LayerOptions",
    "formats",
    "gru",
    "gru_cell",
    "gru_parallel",
    "init_params",
    "num_learnables",
    "params_of",
]
