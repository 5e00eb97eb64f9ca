"""A GRU loaded as a program: checks of its arguments, any batch axes, and its derivative."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from gru_jax import _arguments, _checks
from gru_jax._params import AFTER, Sizes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A GRU that `from_stablehlo` loaded: y, hidden = program(x, h0).

    Works under `jax.jit` and `jax.vmap`, and under `jax.grad` if it was exported with
    `gradient=True`: in reverse mode, once.

    Args:
      exported: the program as `jax.export` knows it.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import export
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> export.from_stablehlo(export.to_stablehlo(params))  # doctest: +NORMALIZE_WHITESPACE
      Program(input_size=3, num_hidden_units=5, dtype=float32, gradient=False, lengths=False,
              platforms=('cpu', 'cuda', 'tpu'))
    """

    exported: jax_export.Exported

    @property
    def input_size(self) -> int:
        """I, the number of input channels."""
        return self.exported.in_avals[0].shape[2]

    @property
    def num_hidden_units(self) -> int:
        """H."""
        return self.exported.in_avals[1].shape[1]

    @property
    def dtype(self) -> np.dtype:
        """The type of x and y."""
        return np.dtype(self.exported.in_avals[0].dtype)

    @property
    def gradient(self) -> bool:
        """Whether it can be differentiated with respect to x and h0."""
        return self.exported.has_vjp()

    @property
    def lengths(self) -> bool:
        """Whether it takes lengths."""
        return len(self.exported.in_avals) > 2

    @property
    def platforms(self) -> tuple[str, ...]:
        """What it can run on."""
        return self.exported.platforms

    def __repr__(self) -> str:
        names = ("input_size", "num_hidden_units", "dtype", "gradient", "lengths", "platforms")
        return f"Program({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    def __call__(self, x: Any, h0: Any = None, lengths: Any = None) -> tuple[jax.Array, jax.Array]:
        """Runs the program.

        Args:
          x: inputs, shape (*batch, time, channels), at least one sequence and one step.
          h0: initial state, shape (*batch, H), or (H,) for all sequences; zeros by default.
          lengths: integers (*batch,), if it was exported with them; all of time by default.

        Returns:
          (y, hidden), as of `gru_jax.gru`.

        Raises:
          TypeError: an argument is of a wrong type, or of a wider one than the program.
          ValueError: shapes do not fit, lengths are not taken, there is no gradient, or this
            platform is not among `platforms`.
        """
        need_x64(self.dtype, "this program is")
        sizes = Sizes(self.num_hidden_units, self.input_size, None, None, AFTER)
        x = self._typed(_arguments.check_x(x, sizes, ndim=2))
        *batch, time = x.shape[:-1]
        if 0 in x.shape[:-1]:
            raise ValueError(
                "x must have at least one sequence and one step for an exported program, got shape "
                f"{x.shape}. There is nothing to run: leave out the call."
            )
        if h0 is None:
            h0 = jnp.zeros(self.num_hidden_units, self.exported.in_avals[1].dtype)
        h0 = _arguments.check_state("h0", h0, tuple(batch), self.num_hidden_units)
        arguments = [x, h0.astype(self.exported.in_avals[1].dtype)]
        if self.lengths:
            steps = _arguments.check_lengths(lengths, None, x.shape[:-1])
            steps = jnp.full(batch, time, jnp.int32) if steps is None else steps.astype(jnp.int32)
            arguments.append(steps)
        elif lengths is not None:
            raise ValueError("lengths were not exported: use to_stablehlo(params, lengths=True).")
        return self._run(*(_flat(a, len(batch)) for a in arguments), batch=tuple(batch))

    def _typed(self, x: jax.Array) -> jax.Array:
        """X in the program's type, where `gru` would compute in that type too."""
        if _checks.promote(x.dtype, self.dtype) != self.dtype:
            raise TypeError(
                f"x must be {self.dtype}, for which this program was exported, got {x.dtype}: pass "
                f"x.astype({self.dtype.name!r}), or export parameters of the wider type."
            )
        return x.astype(self.dtype)

    @functools.cached_property
    def _run(self) -> Callable:
        """The program with any batch axes, compiled."""
        call = _with_rules(self.exported)

        @functools.partial(jax.jit, static_argnames="batch")
        def run(*arguments: jax.Array, batch: tuple) -> tuple:
            return tuple(a.reshape(*batch, *a.shape[1:]) for a in call(*arguments))

        return run


def _with_rules(exported: jax_export.Exported) -> Callable:
    """The program as a function for `jax.vmap`, and for `jax.grad` if its derivative is there."""
    run = _mapped(exported.call)

    @jax.custom_vjp
    def call(*arguments: jax.Array) -> tuple:
        return run(*arguments)

    def forward(*arguments: jax.Array) -> tuple:
        if not exported.has_vjp():
            raise ValueError(
                "this program cannot be differentiated here: export it with to_stablehlo(params, "
                "gradient=True), which serves one derivative, in reverse mode."
            )
        return call(*arguments), arguments

    def backward(arguments: tuple, cotangents: tuple) -> tuple:
        found = iter(_with_rules(exported.vjp())(*arguments, *cotangents))
        return tuple(
            next(found) if jnp.isdtype(a.dtype, "real floating") else None for a in arguments
        )

    call.defvjp(forward, backward)
    return call


def _flat(a: jax.Array, axes: int) -> jax.Array:
    """The first axes of an array as one."""
    return a.reshape(math.prod(a.shape[:axes]), *a.shape[axes:])


def _mapped(function: Callable) -> Callable:
    """A function of arrays, batch first, that `jax.vmap` maps by lengthening that axis."""

    @jax.custom_batching.custom_vmap
    def mapped(*arrays: jax.Array) -> tuple:
        leaves = jax.tree.leaves(function(*arrays))
        return tuple(a for a in leaves if a.dtype != jax.dtypes.float0)  # of an integer argument

    @mapped.def_vmap
    def rule(size: int, in_batched: list, *arrays: jax.Array) -> tuple:
        whole = (
            a if batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, batched in zip(arrays, in_batched, strict=True)
        )
        out = mapped(*(_flat(a, 2) for a in whole))
        return tuple(a.reshape(size, -1, *a.shape[1:]) for a in out), (True,) * len(out)

    return mapped


def need_x64(dtype: Any, subject: str) -> None:
    """Raises where JAX would round float64 numbers; `subject` has them."""
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{subject} float64, which JAX would round to float32: switch its 64-bit mode on, "
            'jax.config.update("jax_enable_x64", True) or JAX_ENABLE_X64=1; or use float32.'
        )
