"""The library's C header, compiled for this processor and called through ctypes."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks import jax_grus
from examples.benchmarks.problem import Problem, Weights
from examples.benchmarks.runners import Runner
from gru_jax.export import to_c

COMPILE = ("cc", "-O3", "-march=native", "-shared", "-fPIC")
SOURCE = """
#include "gru.h"
static gru_state s;
void reset(void) { gru_reset(&s); }
void step(const float *x, float *y) { gru_step(&s, x, y); }
void run(const float *x, float *y, size_t steps) { gru_run(&s, x, y, steps); }
"""


class CGRU:
    """`gru_jax.export.to_c`: one sequence at a time, on one core.

    Args:
      weights: the learnables, constants in the code.
      steps: how many one call of `stream` takes, in a loop in C.
    """

    def __init__(self, weights: Weights, steps: int = 1):
        self.library = _compiled(to_c(jax_grus.ours(weights).params))
        self.hidden, self.steps = weights.R.shape[1], steps

    def bind(self, problem: Problem) -> Runner:
        """Returns the forward pass on the inputs of a problem, one sequence after the other."""
        y = np.empty_like(problem.g)

        def forward() -> np.ndarray:
            for x_b, y_b in zip(problem.x, y, strict=True):
                self.library.reset()
                self.library.run(*_where(x_b, y_b), ctypes.c_size_t(len(x_b)))
            return y

        return Runner(forward, None, np.asarray)

    def stream(self, x: np.ndarray) -> Callable[[], Any]:
        """Returns a call that takes its steps on x, (1, I), from the state of the last call."""
        xs = np.repeat(x, self.steps, axis=0)
        y = np.empty((self.steps, self.hidden), x.dtype)
        function, arguments, last = self.library.step, _where(xs, y), y[-1:]
        if self.steps > 1:
            function, arguments = self.library.run, [*arguments, ctypes.c_size_t(self.steps)]

        def call() -> np.ndarray:
            function(*arguments)
            return last

        return call


def why_absent() -> str | None:
    """Returns that there is no compiler, if there is none."""
    return None if shutil.which(COMPILE[0]) else f"no C compiler {COMPILE[0]}"


def _compiled(header: str) -> ctypes.CDLL:
    """Compiles into a folder that is gone once the code is loaded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, library = folder / "gru.c", folder / "gru.so"
        (folder / "gru.h").write_text(header)
        source.write_text(SOURCE)
        subprocess.run([*COMPILE, "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


def _where(*arrays: np.ndarray) -> list[Any]:
    """Returns pointers to the numbers, which keep the arrays alive."""
    return [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
