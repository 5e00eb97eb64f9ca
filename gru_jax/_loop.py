"""The time loop: what it is given, what is known of it, and how it runs on which platform."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

from gru_jax._blocks import Blocks, blocks_of
from gru_jax._cell import Coefficients
from gru_jax._products import Equations, Learnables

CUDA_UNROLL = 8  # steps in the loop's body, for XLA to launch them as one graph


class Loop(NamedTuple):
    """How the loop runs: static, hashable."""

    equations: Equations
    reverse: bool
    unroll: int | None  # steps in the loop's body; None: as suits the platform
    sequence: bool  # all h_t are wanted, not the last alone
    keep: bool  # the derivative takes its coefficients from the loop, instead of recomputing them
    half: str | None = None  # the 16-bit type of a kernel's products; None where none may run
    kernel: bool | None = False  # GPU kernels run the loops; None: as suits the platform


class Given(NamedTuple):
    """What the recurrence depends on smoothly."""

    learn: Learnables
    x: jax.Array  # (*batch, T, I)
    enter: jax.Array  # (*batch, H): the state before the first step
    back: jax.Array  # (*batch, H): the state to which resets return


class Flags(NamedTuple):
    """(*batch, T, 1) booleans, or None for False everywhere."""

    skip: jax.Array | None  # True leaves the state as it is
    reset: jax.Array | None  # True starts the step from `back`; never where `skip` is True


class Known(NamedTuple):
    """What the derivative knows."""

    given: Given
    flags: Flags
    hs: jax.Array  # (*batch, T, H)
    kept: Coefficients | None  # each (*batch, T, H)


class Results(NamedTuple):
    """What leaves the loop."""

    hs: jax.Array | None  # (*batch, T, H), aligned with the inputs
    last: jax.Array  # (*batch, H), the last one processed


def pieces(loop: Loop, T: Any, step: jax.Array, most_bytes: int) -> tuple[Blocks, dict]:
    """The blocks in which to run T steps, see `blocks_of`, and options of the loop over each."""
    if isinstance(T, int) and (loop.kernel or loop.unroll != 1):
        # One block: what is unrolled must be of known length, and the last of several is not.
        return Blocks(T, T, loop.reverse), {"unroll": loop.unroll}
    return blocks_of(T, step, most_bytes, loop.reverse), {}


def settled(loop: Loop, platform: str) -> Loop:
    """The loop with what it leaves open settled for "cuda", or for any other platform."""
    if platform != "cuda":
        return loop._replace(unroll=loop.unroll or 1, kernel=bool(loop.kernel))
    eq = loop.equations
    if loop.half == "bfloat16" and eq.precision is None:
        eq = eq._replace(precision=lax.DotAlgorithmPreset.BF16_BF16_F32)
    kernel = loop.kernel is not False
    return loop._replace(equations=eq, unroll=loop.unroll or CUDA_UNROLL, kernel=kernel)


def by_platform(run: Callable, loop: Loop, *args: Any) -> Any:
    """`run(loop, *args)`, the loop settled for the platform that it is compiled for."""
    default, cuda = settled(loop, "default"), settled(loop, "cuda")
    if default == cuda:
        return run(default, *args)
    return lax.platform_dependent(*args, cuda=partial(run, cuda), default=partial(run, default))


def on_hopper() -> bool:
    """Whether the CUDA devices at hand, one at least, are all of the kind that kernels are for."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return False
    return all(getattr(device, "compute_capability", "") == "9.0" for device in devices)
