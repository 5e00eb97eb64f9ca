"""GRUs outside JAX: PyTorch, and for inference ONNX Runtime and OpenVINO."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from examples.benchmarks.problem import RECURRENT_BIAS, Problem, Size, Weights, update_first
from examples.benchmarks.runners import Runner


class TorchGRU:
    """`torch.nn.GRU` on the CPU or a GPU, where each call waits for the device.

    Args:
      weights: of recurrent-bias mode.
      device: "cpu" or "gpu".
      cell: take single steps with `torch.nn.GRUCell`.
      dtype: of weights and inputs.
      lengths: of the sequences, (B,), which are then packed, and the outputs padded again.
    """

    def __init__(
        self,
        weights: Weights,
        device: str,
        cell: bool = False,
        dtype: str = "float32",
        lengths: np.ndarray | None = None,
    ):
        import torch

        assert weights.mode == RECURRENT_BIAS
        H, I = weights.R.shape[1], weights.W.shape[1]  # noqa: E741
        self.dtype, self.lengths = getattr(torch, dtype), lengths
        self.device = torch.device("cuda" if device == "gpu" else "cpu")
        self.layer = torch.nn.GRU(I, H, batch_first=True)
        self.cell = torch.nn.GRUCell(I, H) if cell else None
        leaves = weights.W, weights.R, weights.bias, weights.recurrent_bias
        for module in filter(None, (self.layer, self.cell)):
            with torch.no_grad():
                for tensor, array in zip(module.parameters(), leaves, strict=True):
                    tensor.copy_(torch.from_numpy(array))
            module.to(self.device, self.dtype)
        self.wait = torch.cuda.synchronize if device == "gpu" else lambda: None

    def bind(self, problem: Problem) -> Runner:
        """Returns forward and training step on the inputs of a problem."""
        import torch

        x, g = (torch.from_numpy(a).to(self.device, self.dtype) for a in (problem.x, problem.g))
        leaves = [*self.layer.parameters(), x.clone().requires_grad_()]
        inference = copy.deepcopy(self.layer).eval()
        inference.flatten_parameters()

        def forward() -> Any:
            with torch.inference_mode():
                y = self._outputs(inference, x)
            self.wait()
            return y

        def train() -> Any:
            y = self._outputs(self.layer, leaves[-1])
            gradients = torch.autograd.grad(torch.sum(y * g), leaves)
            self.wait()
            return gradients[-1]

        return Runner(forward, train, lambda tensor: tensor.float().cpu().numpy())

    def _outputs(self, layer: Any, x: Any) -> Any:
        """Returns y of a layer, of packed sequences where there are lengths."""
        if self.lengths is None:
            return layer(x)[0]
        from torch.nn.utils import rnn

        options: dict[str, Any] = {"batch_first": True}
        packed = rnn.pack_padded_sequence(x, self.lengths, enforce_sorted=False, **options)
        return rnn.pad_packed_sequence(layer(packed)[0], total_length=x.shape[1], **options)[0]

    def stream(self, x: np.ndarray) -> Callable[[], Any]:
        """Returns a call that takes one step on x, (1, I), from the state of the last call."""
        import torch

        x_t = torch.from_numpy(x).to(self.device)
        h = torch.zeros(1, self.layer.hidden_size, device=self.device)

        def call() -> Any:
            nonlocal h
            with torch.inference_mode():
                h = self.layer(x_t, h)[1] if self.cell is None else self.cell(x_t, h)
            self.wait()
            return h

        return call


def onnx_model(weights: Weights, size: Size) -> bytes:
    """Returns a model of one GRU node: x (B, T, I), h0 (1, B, H) to y (B, T, H), hidden (1, B, H).

    ONNX Runtime refuses batch-major nodes (`layout=1`), so that Transpose nodes stand around it.
    """
    from onnx import TensorProto, helper, numpy_helper

    assert weights.mode == RECURRENT_BIAS
    B, T, I, H = size  # noqa: E741
    biases = np.concatenate([update_first(weights.bias), update_first(weights.recurrent_bias)])
    arrays = {"W": update_first(weights.W), "R": update_first(weights.R), "b": biases}
    constants = [numpy_helper.from_array(array[None], name) for name, array in arrays.items()]
    nodes = [
        helper.make_node("Transpose", ["x"], ["x_t"], perm=[1, 0, 2]),
        helper.make_node(
            "GRU",
            ["x_t", "W", "R", "b", "", "h0"],
            ["y_t", "hidden"],
            hidden_size=H,
            linear_before_reset=1,
        ),
        helper.make_node("Transpose", ["y_t"], ["y_4"], perm=[2, 0, 1, 3]),  # (T, 1, B, H)
        helper.make_node("Reshape", ["y_4", "shape"], ["y"]),
    ]
    constants.append(numpy_helper.from_array(np.array([B, T, H]), "shape"))
    shapes = {"x": (B, T, I), "h0": (1, B, H), "y": (B, T, H), "hidden": (1, B, H)}
    x, h0, y, hidden = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    graph = helper.make_graph(nodes, "gru", [x, h0], [y, hidden], constants)
    opsets = [helper.make_opsetid("", 14)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


class OnnxRuntimeGRU:
    """One GRU node in ONNX Runtime on the CPU."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def session(self, size: Size) -> Callable[[dict], list]:
        """Returns a function of inputs by name."""
        import onnxruntime

        session = onnxruntime.InferenceSession(
            onnx_model(self.weights, size), providers=["CPUExecutionProvider"]
        )
        return lambda feed: session.run(None, feed)

    def bind(self, problem: Problem) -> Runner:
        """Returns the forward pass on the inputs of a problem."""
        size = problem.size
        run = self.session(size)
        feed = {"x": problem.x, "h0": np.zeros((1, size.batch, size.hidden), np.float32)}
        return Runner(lambda: run(feed)[0], None, np.asarray)

    def stream(self, x: np.ndarray) -> Callable[[], Any]:
        """Returns a call that takes one step on x, (1, I), from the state of the last call."""
        H = self.weights.R.shape[1]
        run = self.session(Size(1, 1, x.shape[1], H))
        feed = {"x": x[None], "h0": np.zeros((1, 1, H), np.float32)}

        def call() -> Any:
            feed["h0"] = run(feed)[1]
            return feed["h0"][0]

        return call


class OpenVinoGRU(OnnxRuntimeGRU):
    """The same node in OpenVINO on the CPU, in float32 also where bfloat16 would be faster."""

    def session(self, size: Size) -> Callable[[dict], list]:
        """Returns a function of inputs by name."""
        nothing: Any = None  # in its place, or the import of OpenVINO reports itself to a server
        sys.modules["openvino_telemetry"] = nothing
        import openvino

        core = openvino.Core()
        model = core.read_model(onnx_model(self.weights, size))
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(model, "CPU", hints).create_infer_request()

        def run(feed: dict) -> list:
            outputs = request.infer(feed, share_inputs=True, share_outputs=False)
            return list(outputs.values())

        return run
