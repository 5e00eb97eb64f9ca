"""The trace of a whole Flax model, in which every GRU layer is one equation."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from gru_jax import _arguments
from gru_jax._options import CellOptions, LayerOptions
from gru_jax._watch import Call, watch
from gru_jax.export import _ports

# (x, params, h0, lengths) -> y, hidden, flattened, time-major and with an axis for the direction:
# x (time, batch, I), y (time, 1, batch, H), hidden and h0 (1, batch, H), lengths int32 (batch,).
GRU = core.Primitive("gru_layer")
GRU.multiple_results = True


@GRU.def_abstract_eval
def _results(*leaves: Any, tree: Any, **options: Any) -> tuple[Any, Any]:
    """The shapes of both results."""
    x, params, *_ = jax.tree.unflatten(tree, leaves)
    state = (1, x.shape[1], params.recurrent_weights.shape[0] // 3)
    return jax.core.ShapedArray((x.shape[0], *state), x.dtype), jax.core.ShapedArray(state, x.dtype)


def answer(call: Call) -> tuple[jax.Array, jax.Array]:
    """What a layer returns while it is traced: the results of one equation."""
    options = _expressible(call)
    x = _arguments.check_x(call.x, _arguments.sizes_of(call.params), ndim=2)
    lengths = _arguments.check_lengths(call.lengths, None, x.shape[:-1])
    result, dtype = _arguments.result_dtypes(x, *call.params.arrays().values())
    params, x = jax.tree.map(lambda a: a.astype(dtype), (call.params, x))
    (*batch, T, _), H = x.shape, options.num_hidden_units
    count = math.prod(batch)
    x = jnp.swapaxes(x.reshape(count, *x.shape[-2:]), 0, 1)
    h0 = call.h0
    if h0 is not None:
        h0 = _arguments.check_state("h0", h0, tuple(batch), H).astype(dtype).reshape(1, count, H)
    if lengths is not None:
        lengths = lengths.astype(jnp.int32).reshape(count)
    leaves, tree = jax.tree.flatten((x, params, h0, lengths))
    y, hidden = GRU.bind(*leaves, tree=tree, reverse=options.reverse, path=_path(options))
    if h0 is not None and lengths is not None:  # the node returns zeros for an empty sequence
        hidden = jnp.where(lengths[None, :, None] > 0, hidden, h0)
    hidden = hidden.reshape(*batch, H)
    if options.output_mode == "last":
        return hidden.astype(result), hidden
    y = jnp.swapaxes(jnp.squeeze(y, 1), 0, 1).reshape(*batch, T, H)
    return y.astype(result), hidden


def _path(layer: Any) -> str:
    """Where a layer stands in its model; "gru" if it is the model."""
    names = layer.path if isinstance(layer, nn.Module) else layer.__dict__.get("_path", ())
    return "/".join(names) or "gru"


def _expressible(call: Call) -> LayerOptions:
    """The options of a layer; raises where no ONNX node does what the call asks for."""
    options, kind = call.options, type(call.options).__name__
    if not isinstance(options, LayerOptions):
        raise ValueError(
            f"a {kind} is called step by step, and only a layer can be one ONNX node: put a "
            "GRULayer in its place, which has the same learnables."
        )
    for name in ("mask", "resets"):
        if getattr(call, name) is not None:
            raise ValueError(
                f"a {kind} is called with {name}, which no ONNX node has: pad on the right and "
                "pass lengths, or start each sequence from its own state."
            )
    if options.stateful:
        raise ValueError(
            f"a stateful {kind} keeps its state between calls, and an ONNX model keeps nothing: "
            "make it with has_state_inputs=True and has_state_outputs=True, and hand the state on."
        )
    return options


class Trace(NamedTuple):
    """A model as equations; inputs and outputs by name, in order."""

    jaxpr: Any  # closed
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: dict[str, jax.ShapeDtypeStruct]


def trace(model: Any, params: Any, example: Any, axes: Mapping[str, str]) -> Trace:
    """Traces a model with symbolic sizes of batch and time; see `model_to_onnx`."""
    call = _caller(model, params)
    signature = inspect.signature(type(model).__call__)
    own, arguments = _bound(signature, model, example)
    leaves, tree = jax.tree.flatten(arguments)
    inputs = _ports.inputs(arguments, getattr(model, "data_format", "BTC"), axes)

    def run(*values: Any) -> Any:
        left = iter(values)
        filled = [next(left) if _ports.is_array(leaf) else leaf for leaf in leaves]
        arguments = own | dict(jax.tree.unflatten(tree, filled))
        bound = inspect.BoundArguments(signature, OrderedDict(arguments))
        return call(*bound.args[1:], **bound.kwargs)

    try:
        with watch(answer), _own_caches():
            jaxpr, result = jax.make_jaxpr(run, return_shape=True)(*inputs.values())
    except core.InconclusiveDimensionOperation as error:
        raise ValueError(
            "the model must know a size that the ONNX model leaves open, batch or time: call an "
            "axis that is to stay fixed otherwise than B and T, such as axes={'x': 'BFC'}. "
            + str(error).splitlines()[0]
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            "a GRU layer is called under jax.vmap, jax.grad or the like, where it is not one node: "
            f"give it further batch axes, or export what is differentiated alone. {error}"
        ) from error
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{name} {port.shape}" for name, port in inputs.items())
        error.add_note(f"The inputs were read as {shapes}: pass `axes` where that is wrong.")
        raise
    return Trace(jaxpr, inputs, _ports.outputs(result, inputs))


def _own_caches() -> Any:
    """A setting for which jax.jit has cached no ordinary call, and keeps what it sees apart."""
    config: Any = jax.config
    current = config.jax_default_matmul_precision
    return jax.default_matmul_precision("float32" if current == "highest" else "highest")


def _bound(signature: Any, model: Any, example: Any) -> tuple[dict[str, Any], OrderedDict]:
    """The model and the arguments of its call, by the names that its signature gives them."""
    if isinstance(example, Mapping):
        bound = signature.bind(model, **example)
    else:
        bound = signature.bind(model, *(example if isinstance(example, tuple) else (example,)))
    (own, itself), *arguments = bound.arguments.items()
    return {own: itself}, OrderedDict(arguments)


def _caller(model: Any, params: Any) -> Callable:
    """The model as a function of its arguments, with its learnables as constants."""
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)

        def call(*args: Any, **options: Any) -> Any:
            copy = nnx.merge(graph, state, copy=True)  # variables of this trace
            for path, module in nnx.iter_modules(copy):
                if isinstance(module, CellOptions):
                    object.__setattr__(module, "_path", tuple(map(str, path)))
            return copy(*args, **options)

        return call
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a linen or nnx module, got {type(model).__name__}.")
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be the variables of the linen model, or their collection 'params', got "
            f"{type(params).__name__}."
        )
    variables: Any = params if "params" in params else {"params": params}

    def apply(*args: Any, **options: Any) -> Any:
        return model.apply(variables, *args, **options)

    return apply
