"""Weights in and out: exact conversions between `GRUParams` and other frameworks, and files.

Pairs of inverse functions over plain arrays: `from_x` returns `GRUParams` of NumPy arrays in the
dtype of the source (`jax.device_put` puts them on a device), `to_x` what the other side reads.
What the other side cannot compute exactly is refused with the reason.
"""

from gru_jax.convert._equinox import from_equinox as from_equinox
from gru_jax.convert._equinox import to_equinox as to_equinox
from gru_jax.convert._flax import from_flax as from_flax
from gru_jax.convert._flax import to_flax as to_flax
from gru_jax.convert._haiku import from_haiku as from_haiku
from gru_jax.convert._haiku import to_haiku as to_haiku
from gru_jax.convert._keras import from_keras as from_keras
from gru_jax.convert._keras import to_keras as to_keras
from gru_jax.convert._matlab import from_matlab as from_matlab
from gru_jax.convert._matlab import to_matlab as to_matlab
from gru_jax.convert._onnx import to_onnx as to_onnx
from gru_jax.convert._onnx_reading import OnnxGRU as OnnxGRU
from gru_jax.convert._onnx_reading import from_onnx as from_onnx
from gru_jax.convert._onnx_reading import read_onnx as read_onnx
from gru_jax.convert._safetensors import from_safetensors as from_safetensors
from gru_jax.convert._safetensors import to_safetensors as to_safetensors
from gru_jax.convert._torch import from_torch as from_torch
from gru_jax.convert._torch import to_torch as to_torch
