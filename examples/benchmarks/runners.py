"""The one form that all contestants take: a GRU with its weights loaded, bound to its inputs."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from examples.benchmarks.problem import Problem, Size

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def configure(device: str, precision: str, devices: int | None = None) -> None:
    """Chooses device and precision before anything runs; nothing compiled comes from a disk.

    Args:
      device: "cpu" or "gpu".
      precision: "default" or "highest".
      devices: how many JAX makes of a CPU. What asks for no other runs on the first, which has
        the threads of all cores.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch
    jax.config.update("jax_enable_compilation_cache", False)
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        if devices is not None:
            jax.config.update("jax_num_cpu_devices", devices)
    elif jax.default_backend() != "gpu":
        raise SystemExit("JAX sees no GPU here.")
    if precision == "highest":
        jax.config.update("jax_default_matmul_precision", "highest")
        if importlib.util.find_spec("torch"):
            import torch

            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


class Runner(NamedTuple):
    """The calls to time; each returns when its result is ready."""

    forward: Callable[[], Any]  # y, (B, T, H)
    train: Callable[[], Any] | None  # …, gradient of x; None: inference only
    numpy: Callable[[Any], np.ndarray]


class GRU(Protocol):
    """A GRU of some library with the weights of a problem."""

    def bind(self, problem: Problem) -> Runner:
        """Returns forward and training step on the inputs of a problem."""

    def stream(self, x: np.ndarray) -> Callable[[], Any]:
        """Returns a call that takes one step on x, (1, I), from the state of the last call."""


class JaxGRU(NamedTuple):
    """A GRU in JAX: pure functions of its learnables, the way `jax.jit` wants them."""

    params: Any
    apply: Callable[[Any, Any], Any]  # params, x (B, T, I) -> y (B, T, H)
    step: Callable[[Any, Any, Any], Any]  # params, h (B, H), x (B, I) -> h (B, H)
    hidden: int
    options: dict[str, Any] | None = None  # of the compiler
    place: Callable[[tuple], tuple] = jax.device_put  # brings params, x, g to where they are used

    def training_step(self) -> Any:
        """Returns loss and gradients of params and x as a new function, that nothing has cached."""

        def loss(params: Any, x: Any, g: Any) -> Any:
            return jnp.sum(self.apply(params, x) * g)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=self.options)

    def bind(self, problem: Problem) -> Runner:
        """Returns forward and training step on the inputs of a problem."""
        params, x, g = self.place((self.params, problem.x, problem.g))
        forward = jax.jit(self.apply, compiler_options=self.options)
        train = self.training_step()
        ready = jax.block_until_ready
        return Runner(
            lambda: ready(forward(params, x)),
            lambda: ready(train(params, x, g))[1][1],
            np.asarray,
        )

    def stream(self, x: np.ndarray) -> Callable[[], Any]:
        """Returns a call that takes one step on x, (1, I), from the state of the last call."""
        params, x_t, h = jax.device_put((self.params, x, np.zeros((1, self.hidden), x.dtype)))
        step = jax.jit(self.step)

        def call() -> Any:
            nonlocal h
            h = jax.block_until_ready(step(params, h, x_t))
            return h

        return call

    def lowered(self, size: Size) -> Any:
        """Returns the training step at some size, traced and lowered, nothing compiled yet."""
        B, T, I, H = size  # noqa: E741
        shapes = [jax.ShapeDtypeStruct((B, T, n), jnp.float32) for n in (I, H)]
        return self.training_step().lower(self.params, *shapes)
