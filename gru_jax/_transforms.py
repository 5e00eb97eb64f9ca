"""The transforms of Optax that the pages need and Optax lacks."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from gru_jax import _checks
from gru_jax._models import path_of

UNCHANGED = -0.0  # what leaves every parameter as it is when added to it, 0.0 and -0.0 too


def scale_by_learn_rate_factors(factors: Any) -> optax.GradientTransformation:
    """Multiplies each update by its factor; factor 0 freezes the parameter bitwise.

    It belongs behind the solver: scaled before it, adaptive solvers would cancel the factor. Where
    the factor is 0 the update is selected, not multiplied, so that not even NaN gets through.

    Args:
      factors: a tree like the parameters of nonnegative arrays that broadcast against them, or of
        numbers for whole sub-trees.

    Returns:
      The transformation, without state.

    Raises:
      ValueError: a factor is negative or not finite; at the first update, a leaf has no factor or
        one of a wrong shape.

    Example:
      >>> import jax, optax, gru_jax
      >>> from gru_jax import optim
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> factors = optim.gate_factors(params, recurrent_weights=(1, 0, 1))  # update gate frozen
      >>> solver = optax.chain(optax.adam(1e-3), optim.scale_by_learn_rate_factors(factors))
    """
    factor_of = _lookup(factors)

    def scale(keys: tuple, update: Any) -> Any:
        if not _learnable(update):
            return update
        factor = factor_of(keys, update).astype(update.dtype)
        return _where(factor, update * factor, UNCHANGED)

    return optax.stateless(lambda updates, _: tree_map_with_path(scale, updates))


def add_l2_regularization(l2: Any, factors: Any) -> optax.GradientTransformation:
    """Adds l2 · factor · p to the gradient of each parameter p: coupled, as on the pages.

    It belongs before the solver, whatever the solver; decay behind it (AdamW) is something else.

    Args:
      l2: λ, the global L2 factor.
      factors: as in `scale_by_learn_rate_factors`. Where they are 0 the gradient stays as it is.

    Returns:
      The transformation, without state; `update` needs the parameters.

    Raises:
      TypeError: `l2` is no number.
      ValueError: `l2` is negative or not finite, `update` was called without parameters, or as in
        `scale_by_learn_rate_factors`.

    Example:
      >>> import jax, optax, gru_jax
      >>> from gru_jax import optim
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> decay = optim.add_l2_regularization(1e-4, optim.l2_factors(None, params))
      >>> solver = optax.chain(decay, optax.adam(1e-3))
    """
    l2, factor_of = _checks.number("l2", l2), _lookup(factors)

    def add(keys: tuple, update: Any, param: Any) -> Any:
        if not _learnable(update):
            return update
        factor = factor_of(keys, update).astype(update.dtype)
        term = jnp.asarray(l2, update.dtype) * factor * param.astype(update.dtype)
        return _where(factor, update + term, update)

    def update_all(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("params are missing: call update(gradients, state, params).")
        return tree_map_with_path(add, updates, params)

    return optax.stateless(update_all)


def clip_by_l2_norm(threshold: Any) -> optax.GradientTransformation:
    """Scales each array whose own L2 norm is above a threshold down to that norm.

    Args:
      threshold: the largest norm of an array; of a stack of layers all at once.

    Returns:
      The transformation, without state.

    Raises:
      TypeError: `threshold` is no number.
      ValueError: `threshold` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from gru_jax import optim
      >>> clip = optim.clip_by_l2_norm(1.0)
      >>> gradients = {"large": jnp.array([3.0, 4.0]), "small": jnp.array([0.3, 0.4])}
      >>> clipped, _ = clip.update(gradients, clip.init(gradients))
      >>> print(clipped["large"].round(3), clipped["small"].round(3))
      [0.6 0.8] [0.3 0.4]
    """
    threshold = _checks.number("threshold", threshold, positive=True, most=math.inf)

    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda update: _clip_together(update, threshold), updates)
    )


def clip_by_global_norm(threshold: Any) -> optax.GradientTransformation:
    """As Optax's, but the squares of large or of float16 gradients do not overflow."""
    return optax.stateless(lambda updates, _: _clip_together(updates, threshold))


def _clip_together(updates: Any, threshold: Any) -> Any:
    """Scales all leaves alike where their norm, taken together, is above the threshold."""
    leaves = [leaf for leaf in jax.tree.leaves(updates) if _learnable(leaf)]
    if not leaves:
        return updates
    wide = _checks.promote(jnp.float32, *(jnp.abs(leaf).dtype for leaf in leaves))
    sizes = [jnp.abs(leaf).astype(wide) for leaf in leaves]
    largest = jnp.stack([jnp.max(size, initial=0) for size in sizes]).max()
    # Squares of the sizes could overflow; of a unit near the largest number, so would 1 / unit.
    unit = jnp.where(largest > 0, jnp.maximum(largest / 16, jnp.finfo(wide).tiny), 1)
    unit = jax.lax.stop_gradient(unit)  # it cancels out
    total = jnp.stack([jnp.sum(jnp.square(size / unit)) for size in sizes]).sum()
    root = jnp.sqrt(jnp.where(total == 0, 1, total))  # whose derivative at 0 is not finite
    if isinstance(threshold, float):
        threshold = min(threshold, float(jnp.finfo(wide).max))
    limit = jnp.asarray(threshold, wide)

    def clip(leaf: Any) -> Any:
        if not _learnable(leaf):
            return leaf
        own = _checks.promote(leaf.dtype, wide)
        clipped = (leaf.astype(own) / unit.astype(own)) * (limit / root).astype(own)
        return jnp.where((unit * root > limit) & (total != 0), clipped.astype(leaf.dtype), leaf)

    return jax.tree.map(clip, updates)


def sgdm(learning_rate: Any, momentum: Any = 0.9) -> optax.GradientTransformation:
    """Stochastic gradient descent with the learning rate inside the velocity.

        v ← momentum · v − learning_rate · gradient;    p ← p + v

    `optax.sgd` keeps it outside, which differs as soon as the rate changes.

    Args:
      learning_rate: a number, or a schedule: a function of the step.
      momentum: how much of the last velocity is kept, 0 to 1.

    Returns:
      The transformation.

    Raises:
      TypeError: an argument is no number.
      ValueError: an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from gru_jax import optim
      >>> solver = optim.sgdm(0.1)
      >>> velocity, state = solver.update(jnp.array(1.0), solver.init(jnp.array(0.0)))
      >>> velocity, state = solver.update(jnp.array(1.0), state)
      >>> print(f"{velocity:.2f}")
      -0.19
    """
    momentum = _checks.number("momentum", momentum, most=1.0)
    return optax.chain(
        optax.scale_by_learning_rate(_checks.rate("learning_rate", learning_rate)),
        optax.trace(decay=momentum),
    )


def freeze(factors: Any) -> optax.GradientTransformation:
    """Takes away what would be learnt where the factor is 0."""
    factor_of = _lookup(factors)

    def select(keys: tuple, update: Any) -> Any:
        return _where(factor_of(keys, update), update, 0.0)

    return optax.stateless(lambda updates, _: tree_map_with_path(select, updates))


def masked(
    transform: optax.GradientTransformation, factors: Any, test: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Returns the transform for the leaves whose factor passes a test; traced ones always do."""
    factor_of = _lookup(factors)

    def keep(keys: tuple, leaf: Any) -> bool:
        factor = factor_of(keys, leaf)
        return isinstance(factor, jax.core.Tracer) or bool(test(factor))

    return optax.masked(transform, lambda tree: tree_map_with_path(keep, tree))


# Factors meet leaves by path: Flax's trees with and without boxes then need not be told apart, and
# optax.MaskedNode, which has no leaves, passes.


def _lookup(factors: Any) -> Callable[[tuple, Any], Any]:
    """Returns a function of (keys, leaf) that finds the factor of a leaf, with the leaf's axes."""
    table = {path_of(keys): _checked(keys, leaf) for keys, leaf in tree_leaves_with_path(factors)}

    def factor_of(keys: tuple, leaf: Any) -> Any:
        path, shape = path_of(keys), jnp.shape(leaf)
        known = [path[:n] for n in range(len(path), -1, -1) if path[:n] in table]
        if not known:
            given = ", ".join(repr("/".join(other)) for other in list(table)[:5])
            raise ValueError(
                f"no factor for the leaf {'/'.join(path)!r}: there are some for {given}."
            )
        factor = table[known[0]]
        axes = zip(factor.shape[::-1], shape[::-1], strict=False)
        if factor.ndim > len(shape) or any(n not in (1, m) for n, m in axes):
            raise ValueError(
                f"the factor of {'/'.join(path)!r} must broadcast against shape {shape}, got "
                f"shape {factor.shape}."
            )
        return factor.reshape((1,) * (len(shape) - factor.ndim) + factor.shape)

    return factor_of


def _checked(keys: tuple, factor: Any) -> Any:
    """A factor as a NumPy float64 array, or unseen if a transformation traces it."""
    if isinstance(factor, jax.core.Tracer):
        return factor
    name = "/".join(path_of(keys))
    try:
        array = np.asarray(factor, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"the factor of {name!r} must be an array, got {factor!r}.") from None
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"the factor of {name!r} must be finite and nonnegative, got {array!r}.")
    return array


def _learnable(leaf: Any) -> bool:
    """Whether a gradient is one of numbers that can be learnt: not of integers."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _where(factor: Any, chosen: Any, otherwise: Any) -> Any:
    """`chosen` where the factor is not 0."""
    if not isinstance(factor, jax.core.Tracer) and factor.all():
        return chosen
    return jnp.where(factor != 0, chosen, otherwise)
