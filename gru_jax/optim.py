"""Training as the pages mean it: factors per gate, coupled L2, clipping, and their three solvers.

Factors are trees like the parameters, see `learn_rate_factors`, `l2_factors` and `gate_factors`.
Everything else is an `optax.GradientTransformation` and goes with those of Optax.
"""

import math
from typing import Any

import optax

from gru_jax import _checks
from gru_jax._factors import L2, LEARN_RATE, factors_of
from gru_jax._factors import gate_factors as gate_factors
from gru_jax._factors import l2_factors as l2_factors
from gru_jax._factors import learn_rate_factors as learn_rate_factors
from gru_jax._models import find_layers
from gru_jax._transforms import add_l2_regularization as add_l2_regularization
from gru_jax._transforms import clip_by_global_norm, freeze, masked
from gru_jax._transforms import clip_by_l2_norm as clip_by_l2_norm
from gru_jax._transforms import scale_by_learn_rate_factors as scale_by_learn_rate_factors
from gru_jax._transforms import sgdm as sgdm

__all__ = [
    "add_l2_regularization",
    "clip_by_l2_norm",
    "gate_factors",
    "l2_factors",
    "learn_rate_factors",
    "scale_by_learn_rate_factors",
    "sgdm",
    "training_solver",
]
SOLVERS = ("sgdm", "adam", "rmsprop")
CLIP_METHODS = ("l2norm", "global-l2norm", "absolute-value")


def training_solver(
    solver: str | optax.GradientTransformation,
    model: Any,
    params: Any,
    *inputs: Any,
    learning_rate: Any = None,
    l2_regularization: Any = 1e-4,
    gradient_threshold: Any = math.inf,
    gradient_threshold_method: str = "l2norm",
    learn_rate_factors: Any = None,
    l2_factors: Any = None,
) -> optax.GradientTransformation:
    """Returns what `trainingOptions` of the pages does with a gradient, for a whole model.

        gradient → + l2_regularization · L2 factor · p → clip → solver → · learn-rate factor

    Where a learn-rate factor is 0 nothing is learnt: gradient and L2 term are 0 before clipping,
    so that they count in no norm and the solver's moments stay at 0, and the parameter keeps its
    bits. Schedules, `optax.inject_hyperparams`, `nnx.Optimizer` and linen's `TrainState` take it.

    Args:
      solver: "sgdm" (momentum 0.9), "adam" (0.9, 0.999, ε 1e-8), "rmsprop" (0.9, ε 1e-8), or any
        `optax.GradientTransformation`, which brings its own learning rate.
      model: see `learn_rate_factors`; so are `params` and `inputs`.
      params: the parameters.
      *inputs: what linen's `model.init` takes after the key.
      learning_rate: a number or a schedule; 0.01 for "sgdm" and 0.001 otherwise if None.
      l2_regularization: λ, the global L2 factor.
      gradient_threshold: where clipping begins; infinity for none.
      gradient_threshold_method: "l2norm" (each array by its own norm), "global-l2norm" (all by one
        norm) or "absolute-value" (each number).
      learn_rate_factors: a tree of factors in place of those of the model.
      l2_factors: likewise.

    Returns:
      The transformation; `update` needs the parameters.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an option is unknown or outside its range, or the factors cannot be found: see
        `learn_rate_factors`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gru_jax import linen, optim
      >>> layer = linen.GRULayer(100, recurrent_weights_learn_rate_factor=(1, 0, 1))
      >>> x = jnp.ones((2, 7, 12))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> solver = optim.training_solver("adam", layer, params, x, gradient_threshold=1.0)
      >>> state = solver.init(params)
      >>> updates, state = solver.update(params, state, params)  # any gradient
      >>> bool((updates["recurrent_weights"][100:200] == 0).all())
      True
    """
    if learn_rate_factors is None or l2_factors is None:
        found = find_layers(model, params, inputs)
        if learn_rate_factors is None:
            learn_rate_factors = factors_of(LEARN_RATE, found)
        if l2_factors is None:
            l2_factors = factors_of(L2, found)
    decay = add_l2_regularization(
        _checks.number("l2_regularization", l2_regularization), l2_factors
    )
    scale = scale_by_learn_rate_factors(learn_rate_factors)
    return optax.chain(
        masked(decay, l2_factors, lambda factor: (factor != 0).any()),
        masked(freeze(learn_rate_factors), learn_rate_factors, lambda factor: not factor.all()),
        _clip(gradient_threshold_method, gradient_threshold),
        _solver(solver, learning_rate),
        masked(scale, learn_rate_factors, lambda factor: (factor != 1).any()),
    )


def _clip(method: str, threshold: Any) -> optax.GradientTransformation:
    option = "gradient_threshold"
    threshold = _checks.number(option, threshold, positive=True, most=math.inf)
    method = _checks.choice(f"{option}_method", method, CLIP_METHODS)
    if isinstance(threshold, float) and math.isinf(threshold):
        return optax.identity()
    if method == "l2norm":
        return clip_by_l2_norm(threshold)
    return optax.clip(threshold) if method == "absolute-value" else clip_by_global_norm(threshold)


def _solver(solver: Any, learning_rate: Any) -> optax.GradientTransformation:
    if isinstance(solver, optax.GradientTransformation):
        if learning_rate is not None:
            raise ValueError(
                "learning_rate must be None where solver is an optax.GradientTransformation, which "
                f"brings its own; got {learning_rate!r}."
            )
        return solver
    if not isinstance(solver, str):
        hint = ": call it, with its learning rate" if callable(solver) else ""
        raise TypeError(
            f"solver must be an optax.GradientTransformation or a name, got {solver!r}{hint}."
        )
    solver = _checks.choice("solver, if no optax.GradientTransformation,", solver, SOLVERS)
    if learning_rate is None:
        learning_rate = 0.01 if solver == "sgdm" else 0.001
    rate = _checks.rate("learning_rate", learning_rate)
    if solver == "sgdm":
        return sgdm(rate)
    return optax.adam(rate) if solver == "adam" else optax.rmsprop(rate, eps_in_sqrt=False)
