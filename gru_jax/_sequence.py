"""`gru`: a sequence through the recurrence, with lengths, masks, resets, either direction."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gru_jax import _arguments, _cell, _checks, _loop, _products
from gru_jax._loop import Flags, Loop
from gru_jax._newton import Newton, ParallelInfo, nothing_to_do
from gru_jax._params import GRUParams
from gru_jax._segments import given_to, segments
from gru_jax._trajectory import states as states_in_parallel

# The 16-bit type in which a GPU kernel multiplies, by the dtype of the result.
HALVES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float16"}
# Where the kernel was measured to be faster than the loop: (half, *batch, T, H). None so far.
MEASURED: frozenset[tuple] = frozenset()


class Options(NamedTuple):
    """The static side of a call."""

    output_mode: str
    reverse: bool
    unroll: int | None
    checkpoint: int | str | None
    precision: Any
    implementation: str | None


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
    unroll: int | None = None,
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
      unroll: steps per iteration of the loop, as in `jax.lax.scan`. None: 8 on CUDA GPUs, else 1.
      checkpoint: what the backward pass keeps beside the inputs. None: the states, and five numbers
        for each of them if that is at most 512 MiB. 1: the states alone, recomputing the gates. An
        integer n > 1: the state at every n-th step, recomputing everything in between; weight
        gradients then add up once per n steps. "sqrt": n = ⌈√T⌉.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      implementation: "scan": the loop that XLA compiles, anywhere. "pallas": one GPU kernel for
        the whole sequence, see `gru_jax._gpu`; it can be traced and lowered anywhere, and run on
        Hopper GPUs. It multiplies in 16 bits (float16, or bfloat16 for bfloat16 results; the
        backward loop always in bfloat16) and sums in float32; states or recurrent weights beyond
        float16's 65,504 give NaN. Of arrays sharded over GPUs each computes the whole, unless it is
        called inside `jax.shard_map`. "parallel": all steps at once, by
        Newton's method; `gru_parallel` without its info. None: the kernel where it has been
        measured to be faster, else the loop.

    Returns:
      y: outputs in the promoted dtype of `x` and the parameters, shape (*batch, T, H), or
        (*batch, H) for "last".
      hidden: the final state, shape (*batch, H), in that dtype but at least float32, so that
        a sequence run in chunks gives what one run gives.

    Raises:
      TypeError: `params` are no `GRUParams`, `x` or `h0` is not floating-point, flags are not
        booleans, lengths not integers.
      ValueError: shapes do not fit, an option is unknown, lengths leave 0..T, both `lengths` and
        `mask` are given, or the implementation that was asked for cannot run this.

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
    return run_with_info(options, Newton(), params, x, h0, back, lengths, mask, resets)[:2]


def run_with_info(
    options: Options, newton: Newton, params: GRUParams, x: Any, h0: Any, back: Any,
    lengths: Any, mask: Any, resets: Any,
) -> tuple[jax.Array, jax.Array, ParallelInfo | None]:  # fmt: skip
    """The same; in parallel over time, it also tells how Newton's method went."""
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
    options = _checked(options, shape[-1])
    return _gru(options, newton, params, x, h0, back, lengths, mask, resets)


def _checked(options: Options, T: Any) -> Options:
    stored = Options(
        _checks.output_mode("output_mode", options.output_mode),
        _checks.flag("reverse", options.reverse),
        _checks.size("unroll", options.unroll, None),
        _checks.checkpoint("checkpoint", options.checkpoint),
        _checks.precision("precision", options.precision),
        _checks.implementation("implementation", options.implementation),
    )
    if stored.implementation == "parallel":
        _checks.parallel(stored.unroll, stored.checkpoint, T)
    if not isinstance(T, int) and (
        stored.unroll not in (None, 1) or stored.checkpoint not in (None, 1)
    ):
        raise ValueError(
            f"unroll = {stored.unroll} and checkpoint = {stored.checkpoint!r} need a fixed number "
            f"of steps, but the time axis is symbolic ({T}): "
            "pass unroll=None or 1, checkpoint=None or 1."
        )
    return stored


@partial(jax.jit, static_argnums=(0, 1))
def _gru(
    options: Options, newton: Newton, params: GRUParams, x: jax.Array, h0: Any, back: Any,
    lengths: Any, mask: Any, resets: Any,
) -> tuple[jax.Array, jax.Array, ParallelInfo | None]:  # fmt: skip
    batch = x.shape[:-2]
    if batch and math.prod(batch) == 1:  # one sequence: without axes for it, no step copies h
        axes = tuple(range(len(batch)))
        arrays = (x, h0, back, lengths, mask, resets)
        arrays = (None if a is None else jnp.squeeze(a, axes) for a in arrays)
        results = _gru(options, newton, params, *arrays)
        return jax.tree.map(lambda a: jnp.expand_dims(a, axes), results)

    result, dtype = _arguments.result_dtypes(x, *params.arrays().values())
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    T, H = x.shape[-2], params.recurrent_weights.shape[0] // 3
    h0 = jnp.zeros((*x.shape[:-2], H), dtype) if h0 is None else h0.astype(dtype)
    in_parallel = options.implementation == "parallel"
    if T == 0:
        y = h0 if options.output_mode == "last" else jnp.zeros((*x.shape[:-1], H), dtype)
        return y.astype(result), h0, nothing_to_do(h0) if in_parallel else None

    if lengths is not None:
        mask = within(lengths, x.shape[:-1])
    skip = None if mask is None else ~mask[..., None]
    reset = None if resets is None else resets[..., None]
    if skip is not None:
        x, reset = jnp.where(skip, 0.0, x), None if reset is None else reset & ~skip
    first = lax.index_in_dim(x, 0, x.ndim - 2, keepdims=False)
    h0 = _typed(params, h0, first, options.precision)
    if reset is not None:  # inside shard_map they may vary where nothing else does
        h0 = jnp.where(lax.index_in_dim(reset, 0, x.ndim - 2, keepdims=False), h0, h0)
    back = h0 if back is None else back.astype(dtype)
    loop = _settled(options, params, result, (*x.shape[:-1], H))
    flags, info = Flags(skip, reset), None
    if in_parallel:
        loop, given = given_to(loop, params, x, h0, back)
        (hs, hidden), info = states_in_parallel(loop, newton, given, flags)
    else:
        hs, hidden = segments(options.checkpoint, loop, params, x, h0, back, flags)
    if hs is None:
        return hidden.astype(result), hidden, info
    return (hs if skip is None else jnp.where(skip, 0.0, hs)).astype(result), hidden, info


def within(lengths: jax.Array, shape: tuple) -> jax.Array:
    """Booleans (*batch, T), True before each length. T may not fit a small integer type."""
    T = shape[-1]
    if isinstance(T, int):
        most = min(T, jnp.iinfo(lengths.dtype).max)
        lengths = jnp.minimum(lengths, jnp.asarray(most, lengths.dtype))
    lengths = lengths.astype(jnp.int32)
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < lengths[..., None]


def _settled(options: Options, params: GRUParams, result: Any, shape: tuple) -> Loop:
    """How to run the loop for states of such a shape, (*batch, T, H)."""
    eq = _products.equations(params, options.precision)
    half = HALVES.get(jnp.dtype(result).name)
    kernel = options.implementation == "pallas" and 0 not in shape
    if kernel:
        from gru_jax import _gpu_forward

        _gpu_forward.check(eq, half, options.unroll, shape)
    elif options.implementation is None and (half, *shape) in MEASURED:
        kernel = None if _loop.on_hopper() else False
    sequence, keep = options.output_mode == "sequence", options.checkpoint != 1
    return Loop(eq, options.reverse, options.unroll, sequence, keep, half, kernel)


def _typed(params: GRUParams, h: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    """h, typed as one step would return it (sharding, mapped axes); costs nothing once compiled."""
    eq, learn = _products.equations(params, precision), _products.learnables(params)
    thirds, by = _products.thirds(learn), _products.in_loop(eq, learn)
    parts = _products.input_parts(eq, thirds)(_products.project_inputs(params, x, precision))
    return h + jnp.zeros_like(_cell.step(eq, learn, by, h, parts)[0])
