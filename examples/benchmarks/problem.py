"""What every contestant is given: sizes, weights and inputs, and the right answer in float64."""

import argparse
from typing import NamedTuple

import numpy as np

from examples.benchmarks import oracle

AFTER = "after-multiplication"
BEFORE = "before-multiplication"
RECURRENT_BIAS = "recurrent-bias-after-multiplication"
MODES = (AFTER, BEFORE, RECURRENT_BIAS)


class Size(NamedTuple):
    """The size of a layer and of its input."""

    batch: int
    time: int
    inputs: int
    hidden: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Reads "B,T,I,H"."""
        numbers = [int(part) for part in text.split(",")]
        if len(numbers) != 4 or min(numbers) < 1:
            raise argparse.ArgumentTypeError(
                f"a size is B,T,I,H, four positive integers, got {text}"
            )
        return cls(*numbers)

    def flops(self, training: bool) -> float:
        """The operations of the matrix products; a training step has three of each product."""
        B, T, I, H = self  # noqa: E741
        return (3 if training else 1) * 2.0 * B * T * 3 * H * (I + H)


class Weights(NamedTuple):
    """The learnables, float32, rows in the order reset, update, candidate."""

    mode: str
    W: np.ndarray  # (3H, I)
    R: np.ndarray  # (3H, H)
    bias: np.ndarray  # (3H,)
    recurrent_bias: np.ndarray  # (3H,), zeros except in recurrent-bias mode

    @property
    def folded(self) -> np.ndarray:
        """Returns the bias with the two recurrent biases added that nothing multiplies, (3H,)."""
        H = len(self.recurrent_bias) // 3
        return self.bias + np.concatenate([self.recurrent_bias[: 2 * H], np.zeros(H, np.float32)])

    @property
    def candidate_bias(self) -> np.ndarray:
        """Returns b_Rh̃, (H,)."""
        return self.recurrent_bias[2 * len(self.recurrent_bias) // 3 :]


class Problem(NamedTuple):
    """One size and mode with everything drawn: the training loss is sum(y ⊙ g)."""

    size: Size
    weights: Weights
    x: np.ndarray  # (B, T, I)
    g: np.ndarray  # (B, T, H)


class Answer(NamedTuple):
    """What a contestant must return, in float64."""

    y: np.ndarray  # (B, T, H)
    dx: np.ndarray  # (B, T, I)


def draw_weights(rng: np.random.Generator, inputs: int, hidden: int, mode: str) -> Weights:
    """Draws weights as PyTorch initialises them: uniform between ±1/√H."""

    def uniform(*shape: int) -> np.ndarray:
        return (rng.uniform(-1, 1, shape) / np.sqrt(hidden)).astype(np.float32)

    W, R = uniform(3 * hidden, inputs), uniform(3 * hidden, hidden)
    b_W, b_R = uniform(3 * hidden), uniform(3 * hidden)
    return Weights(mode, W, R, b_W, b_R if mode == RECURRENT_BIAS else np.zeros_like(b_R))


def draw(size: Size, mode: str, seed: int) -> Problem:
    """Draws the problem of one size and mode; the same seed gives the same numbers."""
    rng = np.random.default_rng(seed)
    weights = draw_weights(rng, size.inputs, size.hidden, mode)
    x = rng.standard_normal((size.batch, size.time, size.inputs), np.float32)
    g = rng.standard_normal((size.batch, size.time, size.hidden), np.float32)
    return Problem(size, weights, x, g)


def answer(problem: Problem) -> Answer:
    """Computes the outputs and the gradient of x in float64, from the zero state."""
    B, _, _, H = problem.size
    weights, zeros = problem.weights, np.zeros((B, H))
    leaves = {"W": weights.W, "R": weights.R}
    leaves["b"] = np.concatenate([weights.bias, weights.recurrent_bias])
    call = oracle.Call(weights.mode, leaves, problem.x, zeros, problem.g, zeros)
    right = oracle.solve(call)
    return Answer(right.y, right.x)


def update_first(rows: np.ndarray) -> np.ndarray:
    """Returns rows reset, update, candidate as update, reset, candidate: Keras, ONNX."""
    r, z, n = np.split(rows, 3)
    return np.concatenate([z, r, n])


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest deviation as a part of the largest number expected."""
    if got.shape != expected.shape:
        raise ValueError(f"an array of shape {expected.shape} was expected, got {got.shape}")
    return float(np.abs(got - expected).max() / np.abs(expected).max())
