"""`gru`: a sequence through the recurrence, with lengths, masks, resets, either direction."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import _arguments, _cell, _checks
from gru_jax._params import GRUParams
from gru_jax._recurrence import STATES, Ends, Loop, Steps, last_state, states


class Options(NamedTuple):
    """The static side of a call."""

    output_mode: str
    reverse: bool
    unroll: int
    checkpoint: int | str | None
    precision: Any
    implementation: str | None


class Inputs(NamedTuple):
    """What enters the loop, time first."""

    x: jax.Array  # (T, *batch, I)
    skip: jax.Array | None  # (T, *batch, 1)
    reset: jax.Array | None  # (T, *batch, 1)


def gru(
    params: GRUParams,
    x: Any,
    h0: Any = None,
    *,
    output_mode: str = "sequence",
    lengths: Any = None,
    mask: Any = None,
    resets: Any = None,
    reverse: bool = False,
    unroll: int = 1,
    checkpoint: int | str | None = None,
    precision: Any = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs a GRU over sequences: h_t = gru_cell(params, h_{t-1}, x_t) for t = 1 … T.

    T is the number of steps, H of hidden units, I of input channels; `*batch` stands for any
    number of leading axes, none included. A padded or masked step is as if it were not in the
    sequence: the state passes it unchanged, its output is 0, and not even NaN in it reaches an
    output or a gradient. Without `lengths` and `mask` the recurrence runs through all T steps, as
    in MATLAB.

    Differentiable in both modes and to any order in `params`, `x` and `h0`, by a rule of its own
    whose backward loop carries the cotangent of the state alone.

    Args:
      params: the learnables and the mode.
      x: inputs, shape (*batch, T, I).
      h0: initial state, shape (*batch, H), or (H,) for all sequences; zeros by default.
      output_mode: "sequence" for all outputs, "last" for the final one.
      lengths: integers in 0..T, shape (*batch,): right padding begins there. Checked where they
        are concrete; under `jit` they are clamped to 0..T. Length 0 gives h0.
      mask: booleans, shape (*batch, T), False at steps to skip, in any pattern. Not with `lengths`.
      resets: booleans, shape (*batch, T): before such a step the state returns to h0, whatever
        h0 is: where a long sequence comes in chunks, that is the state handed on.
      reverse: process from each sequence's own last step to its first; outputs stay aligned with
        inputs, "last" and `hidden` are the last in the order of processing.
      unroll: steps per iteration of the loop, as in `jax.lax.scan`.
      checkpoint: what the backward pass keeps. None: all that it needs. 1: the state of every step,
        recomputing the gates. An integer n > 1: the state at every n-th step, recomputing
        everything in between; weight gradients then add up once per n steps. "sqrt": n = ⌈√T⌉.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      implementation: None to choose, or "scan".

    Returns:
      y: outputs in the promoted dtype of `x` and the parameters, shape (*batch, T, H), or
        (*batch, H) for "last".
      hidden: the final state, shape (*batch, H), in that dtype but at least float32, so that
        a sequence run in chunks gives what one run gives.

    Raises:
      TypeError: `params` are no `GRUParams`, `x` or `h0` is not floating-point, flags are not
        booleans, lengths not integers.
      ValueError: shapes do not fit, an option is unknown, lengths leave 0..T, or both `lengths`
        and `mask` are given.

    References:
      Cho et al. 2014, arXiv:1406.1078.

    Example:
      >>> import jax, jax.numpy as jnp, gru_jax
      >>> params = gru_jax.init_params(jax.random.key(0), 5, 3)
      >>> x = jax.random.normal(jax.random.key(1), (2, 7, 3))
      >>> y, hidden = gru_jax.gru(params, x, lengths=jnp.array([7, 4]))
      >>> y.shape, hidden.shape, bool((y[1, 4:] == 0).all()), bool((y[1, 3] == hidden[1]).all())
      ((2, 7, 5), (2, 5), True, True)
    """
    options = Options(output_mode, reverse, unroll, checkpoint, precision, implementation)
    return run(options, params, x, h0, None, lengths, mask, resets)


def run(
    options: Options, params: GRUParams, x: Any, h0: Any, back: Any,
    lengths: Any, mask: Any, resets: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`gru` where resets return to the state `back`, if given, as a stateful layer needs it."""
    sizes = _arguments.sizes_of(params)
    x = _arguments.check_x(x, sizes, ndim=2)
    shape, H = x.shape[:-1], sizes.num_hidden_units
    if h0 is not None:
        h0 = _arguments.check_state("h0", h0, shape[:-1], H)
    if back is not None:
        back = _arguments.check_state("hidden_state", back, shape[:-1], H)
    lengths = _arguments.check_lengths(lengths, mask, shape)
    mask = _arguments.check_flags("mask", mask, shape)
    resets = _arguments.check_flags("resets", resets, shape)
    return _gru(_checked(options, shape[-1]), params, x, h0, back, lengths, mask, resets)


def _checked(options: Options, T: Any) -> Options:
    stored = Options(
        _checks.output_mode("output_mode", options.output_mode),
        _checks.flag("reverse", options.reverse),
        _checks.positive_int("unroll", options.unroll),
        _checks.checkpoint("checkpoint", options.checkpoint),
        _checks.precision("precision", options.precision),
        _checks.implementation("implementation", options.implementation),
    )
    if not isinstance(T, int) and (stored.unroll > 1 or stored.checkpoint not in (None, 1)):
        raise ValueError(
            f"unroll = {stored.unroll} and checkpoint = {stored.checkpoint!r} need a fixed number "
            f"of steps, but the time axis is symbolic ({T}): pass unroll=1, checkpoint=None or 1."
        )
    return stored


@partial(jax.jit, static_argnums=0)
def _gru(
    options: Options, params: GRUParams, x: jax.Array, h0: Any, back: Any,
    lengths: Any, mask: Any, resets: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    result, dtype = _arguments.result_dtypes(x, *params.arrays().values())
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    T, H = x.shape[-2], params.recurrent_weights.shape[0] // 3
    h0 = jnp.zeros((*x.shape[:-2], H), dtype) if h0 is None else h0.astype(dtype)
    if T == 0:
        y = h0 if options.output_mode == "last" else jnp.zeros((*x.shape[:-1], H), dtype)
        return y.astype(result), h0

    if lengths is not None:
        mask = _within(lengths, x.shape[:-1])
    skip = None if mask is None else _time_first(~mask[..., None])
    reset = None if resets is None else _time_first(resets[..., None])
    x = _time_first(x) if skip is None else jnp.where(skip, 0.0, _time_first(x))
    h0 = _typed(params, h0, x[0], options.precision)
    ends = Ends(h0, h0 if back is None else back.astype(dtype))
    hs, hidden = _segments(options, params, ends, Inputs(x, skip, reset))
    if hs is None:
        return hidden.astype(result), hidden
    y = hs if skip is None else jnp.where(skip, 0.0, hs)
    return jnp.moveaxis(y, 0, -2).astype(result), hidden


def _within(lengths: jax.Array, shape: tuple) -> jax.Array:
    """Booleans (*batch, T), True before each length. T may not fit a small integer type."""
    T = shape[-1]
    if isinstance(T, int):
        most = min(T, jnp.iinfo(lengths.dtype).max)
        lengths = jnp.minimum(lengths, jnp.asarray(most, lengths.dtype))
    lengths = lengths.astype(jnp.int32)
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < lengths[..., None]


def _time_first(a: jax.Array) -> jax.Array:
    """(*batch, T, C) to (T, *batch, C)."""
    return jnp.moveaxis(a, -2, 0)


def _segments(
    options: Options, params: GRUParams, ends: Ends, inputs: Inputs
) -> tuple[jax.Array | None, jax.Array]:
    """Runs all time in one piece, or in pieces whose inner states the backward pass recomputes."""
    piece = partial(_piece, options, params)
    if options.checkpoint is None:
        return piece(ends, inputs)
    if options.checkpoint == 1:
        policy = jax.checkpoint_policies.save_only_these_names(STATES)
        return jax.checkpoint(piece, policy=policy)(ends, inputs)

    T = inputs.x.shape[0]
    n = math.ceil(math.sqrt(T)) if isinstance(options.checkpoint, str) else options.checkpoint
    n = min(n, T)
    whole, rest = _cut(inputs, n, options.reverse)

    def body(h: jax.Array, now: Inputs) -> tuple:
        hs, h = jax.checkpoint(piece)(Ends(h, ends.back), now)
        return h, hs

    h, hs = lax.scan(body, ends.enter, whole, reverse=options.reverse)
    tail, h = jax.checkpoint(piece)(Ends(h, ends.back), rest) if T % n else (None, h)
    if hs is None:
        return None, h
    hs = hs.reshape(T - T % n, *hs.shape[2:])
    if tail is not None:
        hs = lax.concatenate((tail, hs) if options.reverse else (hs, tail), 0)
    return hs, h


def _cut(inputs: Inputs, n: int, reverse: bool) -> tuple[Inputs, Inputs]:
    """Whole segments of n steps, (T // n, n, …), and the T % n steps that are processed last."""
    T = inputs.x.shape[0]
    rest = T % n
    border = rest if reverse else T - rest
    first, second = slice(0, border), slice(border, T)
    whole, last = (second, first) if reverse else (first, second)
    pieces = jax.tree.map(lambda a: a[whole].reshape(T // n, n, *a.shape[1:]), inputs)
    return pieces, jax.tree.map(lambda a: a[last], inputs)


def _piece(
    options: Options, params: GRUParams, ends: Ends, inputs: Inputs
) -> tuple[jax.Array | None, jax.Array]:
    """Runs the recurrence over some steps, time first."""
    eq = _cell.equations(params, options.precision)
    steps = Steps(_cell.input_parts(params, inputs.x, eq.precision), inputs.skip, inputs.reset)
    loop = Loop(eq, options.reverse, options.unroll)
    arguments = (loop, _cell.recurrent(params), ends, steps)
    if options.output_mode == "last":
        return None, last_state(*arguments)
    return states(*arguments)


def _typed(params: GRUParams, h: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    """h, typed as one step would return it (sharding, mapped axes); costs nothing once compiled."""
    one = _cell.step(
        _cell.equations(params, precision),
        _cell.recurrent(params),
        h,
        _cell.input_parts(params, x, precision),
    )
    return h + jnp.zeros_like(one)
