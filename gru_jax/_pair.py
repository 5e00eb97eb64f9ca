"""Both directions of a bidirectional layer in one kernel launch.

The layers of the two directions are called twice: first their calls are only taken down, then the
results of the one common run are handed to them. The common run is the ordinary one under
`jax.vmap`, where the direction that runs backwards sees its sequences turned round in time.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gru_jax import _arguments
from gru_jax._blocks import TIME
from gru_jax._layer import BidirectionalOptions, options_of
from gru_jax._sequence import Options, run, within
from gru_jax._watch import Call, watch


def call_directions(options: BidirectionalOptions, layers: Sequence[Callable[[], Any]]) -> list:
    """What the calls of the layers return; `layers` call one each."""
    if options.implementation != "pallas":
        return [layer() for layer in layers]
    calls = [call for layer in layers for call in _taken_down(layer)]
    how = [options_of(call.options) for call in calls]
    arrays = [_forward(*pair) for pair in zip(how, calls, strict=True)]
    kinds = {(jax.tree.structure(each), *map(jnp.shape, jax.tree.leaves(each))) for each in arrays}
    if len(calls) != 2 or len(kinds) != 1:  # somebody's own layer, or layers of two sizes
        return [layer() for layer in layers]
    answers = _run_together(how, arrays)
    return [_answered(*pair) for pair in zip(layers, answers, strict=True)]


class _StopError(Exception):
    """Leaves a layer's call before it is run."""


def _taken_down(layer: Callable[[], Any]) -> list[Call]:
    calls = []

    def see(call: Call) -> None:
        calls.append(call)
        raise _StopError

    with contextlib.suppress(_StopError), watch(see):
        layer()
    return calls


def _answered(layer: Callable[[], Any], answer: tuple) -> Any:
    """The layer's call with `answer` for its run, unless somebody outside answers."""

    def see(call: Call) -> Any:
        return outside(call) or answer

    with watch(see) as outside:
        return layer()


def _forward(how: Options, call: Call) -> tuple:
    """The arrays of a call, turned round in time if it runs backwards."""
    x, shape = call.x, call.x.shape[:-1]
    lengths = _arguments.check_lengths(call.lengths, call.mask, shape)
    mask = _arguments.check_flags("mask", call.mask, shape)
    resets = _arguments.check_flags("resets", call.resets, shape)
    mask = mask if lengths is None else within(lengths, shape)
    if how.reverse:
        x = jnp.flip(x, TIME)
        mask, resets = (None if a is None else jnp.flip(a, -1) for a in (mask, resets))
    return call.params, x, call.h0, call.back, mask, resets


def _run_together(how: Sequence[Options], arrays: Sequence[tuple]) -> list[tuple]:
    """Runs calls that differ in their arrays alone, each turned forwards."""
    forward = how[0]._replace(reverse=False)

    def each(params: Any, x: Any, h0: Any, back: Any, mask: Any, resets: Any) -> tuple:
        return run(forward, params, x, h0, back, None, mask, resets)

    y, final = jax.vmap(each)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays))
    turn = [one.reverse and one.output_mode == "sequence" for one in how]
    return [(jnp.flip(y[i], TIME) if turn[i] else y[i], final[i]) for i in range(len(how))]
