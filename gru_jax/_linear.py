"""A linear map of known numbers with a fast program for each direction.

JAX differentiates the time loop of the GRU through such a map: forward mode runs `forward`, reverse
mode `backward`, which JAX could only get by transposing `forward` operation by operation. Both may
be loops that write into buffers, which is fast and which JAX can differentiate only badly; whoever
differentiates the map once more gets the derivative of `smooth`, the same map as a `jax.lax.scan`.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class Linear(NamedTuple):
    """The programs of one map, out = L(known) · operand: static, hashable."""

    forward: Callable  # (static, known, operand) -> out
    backward: Callable  # (static, known, cotangent of out) -> cotangent of operand
    smooth: Callable  # the same as forward, from operations that JAX can differentiate well
    like: Callable  # (static, known) -> something with the types of the operand
    settled: Callable = lambda static, platform: static  # for the platform it is lowered for


class _Call(NamedTuple):
    """One use of a map: static, hashable."""

    linear: Linear
    static: Hashable
    transposed: bool
    known: Any  # tree structures
    operand: Any
    out: Any
    batch: tuple[tuple[int | None, ...], ...]  # axes of the known arrays, for each vmap
    types: tuple | None  # of the result, where they are known


def linear_call(linear: Linear, static: Hashable, known: Any, operand: Any) -> Any:
    """Returns L(known) · operand; `known` and `operand` are trees of arrays."""
    forward = partial(linear.forward, linear.settled(static, "default"))
    program, out = jax.make_jaxpr(forward, return_shape=True)(known, operand)
    out = jax.tree.structure(out)
    leaves, tree = jax.tree.flatten(known)
    operands, operand_tree = jax.tree.flatten(operand)
    types = tuple(program.out_avals)
    call = _Call(linear, static, False, tree, operand_tree, out, (), types)
    return jax.tree.unflatten(out, _linear_p.bind(*leaves, *operands, call=call))


def _flat(call: _Call, program: Callable) -> Callable:
    """`program` of trees as a function of arrays, mapped over all axes of `call.batch`."""

    def flat(known: tuple, operand: tuple) -> list:
        tree = call.out if call.transposed else call.operand
        return jax.tree.leaves(
            program(call.static, call.known.unflatten(known), tree.unflatten(operand))
        )

    for axes in call.batch:
        flat = jax.vmap(flat, in_axes=(axes, 0))
    return flat


def _run(*arrays: jax.Array, call: _Call, platform: str = "default") -> list:
    call = call._replace(static=call.linear.settled(call.static, platform))
    program = call.linear.backward if call.transposed else call.linear.forward
    return _flat(call, program)(*_cut(call, arrays))


def _run_here(*arrays: jax.Array, call: _Call) -> list:
    on_cuda = partial(_run, call=call, platform="cuda")
    return lax.platform_dependent(*arrays, cuda=on_cuda, default=partial(_run, call=call))


def _smooth(*arrays: jax.Array, call: _Call) -> list:
    linear = call.linear

    def transposed(static: Hashable, known: Any, cotangent: Any) -> Any:
        smooth = partial(linear.smooth, static, known)
        return jax.linear_transpose(smooth, linear.like(static, known))(cotangent)[0]

    return _flat(call, transposed if call.transposed else linear.smooth)(*_cut(call, arrays))


def _cut(call: _Call, arrays: Any) -> tuple[tuple, tuple]:
    n = call.known.num_leaves
    return tuple(arrays[:n]), tuple(arrays[n:])


def _types(*avals: Any, call: _Call) -> list:
    if call.types is not None:
        return list(call.types)
    return list(jax.make_jaxpr(lambda *arrays: _run(*arrays, call=call))(*avals).out_avals)


def _jvp(primals: tuple, tangents: tuple, *, call: _Call) -> tuple[list, list]:
    known, _ = _cut(call, primals)
    d_known, d_operand = _cut(call, tangents)
    out = _linear_p.bind(*primals, call=call)
    if all(isinstance(d, ad.Zero) for d in d_known):
        return out, _linear_p.bind(*known, *map(ad.instantiate_zeros, d_operand), call=call)
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    _, d_out = jax.jvp(lambda *arrays: _smooth(*arrays, call=call), primals, tangents)
    return out, d_out


def _transpose(cotangents: list, *arrays: Any, call: _Call) -> list:
    known, operand = _cut(call, arrays)
    wanted = [ad.is_undefined_primal(a) for a in operand]
    pairs = zip(operand, wanted, strict=True)
    types = tuple(a.aval if want else jax.typeof(a) for a, want in pairs)
    back_call = call._replace(transposed=not call.transposed, types=types)
    back = _linear_p.bind(*known, *map(ad.instantiate_zeros, cotangents), call=back_call)
    pairs = zip(back, wanted, strict=True)
    return [None] * len(known) + [ct if want else None for ct, want in pairs]


def _batch(arrays: tuple, axes: tuple, *, call: _Call) -> tuple[list, list]:
    mapped, axis = next(pair for pair in zip(arrays, axes, strict=True) if pair[1] is not None)
    known, operand = _cut(call, arrays)
    known_axes, operand_axes = _cut(call, axes)
    # Broadcast as vmap would: in an explicit mesh the new axis is sharded as the mapped one is.
    broadcast = jax.vmap(lambda _, a: a, in_axes=(axis, None))
    operand = (
        broadcast(mapped, a) if i is None else jnp.moveaxis(a, i, 0)
        for a, i in zip(operand, operand_axes, strict=True)
    )
    call = call._replace(batch=(*call.batch, known_axes), types=None)
    out = _linear_p.bind(*known, *operand, call=call)
    return out, [0] * len(out)


_linear_p = Primitive("gru_linear")
_linear_p.multiple_results = True
_linear_p.def_impl(jax.jit(_run_here, static_argnames="call"))
_linear_p.def_abstract_eval(_types)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
_on_cuda = mlir.lower_fun(partial(_run, platform="cuda"), multiple_results=True)
mlir.register_lowering(_linear_p, _on_cuda, platform="cuda")
