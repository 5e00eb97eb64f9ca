"""Loops over time in blocks, on batch-major arrays (*batch, T, channels).

A block is small enough for its temporaries to stay in the cache, and not to be mapped anew by the
operating system at every call. Loops read and write single steps in place, without transposes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TIME = -2


class Blocks(NamedTuple):
    """T steps, processed in blocks of `size`; where they do not fit, the last one overlaps."""

    T: Any
    size: Any
    reverse: bool

    @property
    def number(self) -> Any:
        """How many."""
        return 1 if self.size == self.T else -(-self.T // self.size)

    def begin(self, k: Any) -> tuple[Any, Any]:
        """The first time of block k, and how many of its steps the block before has processed."""
        if self.number == 1:
            return 0, 0
        s, processed = k * self.size, 0
        if self.T % self.size:
            processed = jnp.maximum(s - (self.T - self.size), 0)
            s = s - processed
        return (self.T - self.size - s if self.reverse else s), processed

    def time(self, j: Any) -> Any:
        """Where in its block the j-th step in processing order stands."""
        return self.size - 1 - j if self.reverse else j

    def each(self, block: Callable, carry: Any) -> Any:
        """Runs carry = block(k, carry) for k = 0 … number − 1."""
        return block(0, carry) if self.number == 1 else lax.fori_loop(0, self.number, block, carry)


def blocks_of(T: Any, step: jax.Array, most_bytes: int, reverse: bool) -> Blocks:
    """Blocks in which three arrays of T times `step` take at most `most_bytes`, or little more.

    Of one size if a divisor of T is near. One block where a size is known only later.
    """
    step_bytes = 3 * math.prod(step.shape) * step.dtype.itemsize
    if not isinstance(T, int) or not isinstance(step_bytes, int):
        return Blocks(T, T, reverse)
    least = -(-T // max(most_bytes // max(step_bytes, 1), 1))
    number = next((n for n in range(least, 2 * least) if T % n == 0), least)
    return Blocks(T, -(-T // number), reverse)


def block_of(tree: Any, begin: Any, size: Any) -> Any:
    """The steps begin … begin + size − 1 of every array of a tree."""

    def block(a: jax.Array) -> jax.Array:
        if size == a.shape[TIME]:
            return a
        return lax.dynamic_slice_in_dim(a, begin, size, a.ndim + TIME, allow_negative_indices=False)

    return jax.tree.map(block, tree)


def at(tree: Any, t: Any) -> Any:
    """Step t of every array of a tree."""
    read = partial(lax.dynamic_index_in_dim, index=t, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(lambda a: read(a, axis=a.ndim + TIME), tree)


def put(tree: Any, values: Any, t: Any) -> Any:
    """The arrays with `values` as their step t."""
    write = partial(lax.dynamic_update_index_in_dim, index=t, allow_negative_indices=False)
    return jax.tree.map(lambda a, v: write(a, v, axis=a.ndim + TIME), tree, values)


def put_block(a: jax.Array, values: jax.Array, begin: Any) -> jax.Array:
    """The array with `values` from step `begin` on."""
    return lax.dynamic_update_slice_in_dim(
        a, values, begin, a.ndim + TIME, allow_negative_indices=False
    )


def space(like: jax.Array, T: Any, fill: float) -> jax.Array:
    """An array (*batch, T, C) to write into, typed like (*batch, C).

    Arrays that are used together differ in `fill`: of equal ones XLA makes one, and copies it.
    """
    step = jnp.expand_dims(jnp.full_like(like, fill), TIME)
    return jnp.broadcast_to(step, (*like.shape[:-1], T, like.shape[-1]))


def where(condition: jax.Array | None, yes: Any, no: jax.Array) -> jax.Array:
    """jnp.where; no condition at all means False everywhere."""
    return no if condition is None else jnp.where(condition, yes, no)
