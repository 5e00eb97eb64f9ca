"""Trained GRUs that run elsewhere: ONNX, StableHLO and C; and a table of what is supported."""

from gru_jax.export._c import to_c as to_c
from gru_jax.export._c_weights import c_weights as c_weights
from gru_jax.export._codegen_support import Support as Support
from gru_jax.export._codegen_support import SupportTable as SupportTable
from gru_jax.export._codegen_support import codegen_support as codegen_support
from gru_jax.export._onnx import to_onnx as to_onnx
from gru_jax.export._onnx_model import model_to_onnx as model_to_onnx
from gru_jax.export._program import Program as Program
from gru_jax.export._stablehlo import from_stablehlo as from_stablehlo
from gru_jax.export._stablehlo import to_stablehlo as to_stablehlo
