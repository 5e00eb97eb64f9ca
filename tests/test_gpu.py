"""The GPU kernels without a GPU: that they lower for one, and what they compute.

Their numbers come from the whole `gru`, run with the bodies of the kernels on the CPU: by
`cluster`, with any number of blocks and hostile timing, and by the interpreter of Pallas, with one
block, where JAX has it in public.
"""

import contextlib
import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_dict, as_params, assert_close, random_params, relative_error
from cluster import on_the_cpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec
from reference import MODES, gru_ref, gru_ref_grads

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import _gpu, _gpu_backward, _gpu_forward, _loop, _sequence

AFTER, BEFORE, WITH_BIAS = MODES
DTYPES = ("float32", "float16", "bfloat16")
T, INPUTS = 6, 3


# Lowering


def lowered(function, *arguments, platform="cuda"):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(function, *arguments, platform="cuda"):
    """How many kernels the function launches."""
    return len(
        re.findall("custom_call @mosaic_gpu", lowered(function, *arguments, platform=platform))
    )


def shapes(H, B, mode, dtype, steps=T):
    params = jax.eval_shape(
        lambda key: gru_jax.init_params(key, H, INPUTS, reset_gate_mode=mode, dtype=dtype),
        jax.random.key(0),
    )
    return params, jax.ShapeDtypeStruct((B, steps, INPUTS), dtype)


def loss(params, x, h0=None, implementation="pallas", **options):
    y, hidden = gru_jax.gru(params, x, h0, implementation=implementation, **options)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(hidden**2)


def variants(B):
    yield "plain", {}
    yield "lengths", {"lengths": np.arange(B) % (T + 1)}
    yield "resets", {"resets": np.arange(B * T).reshape(B, T) % 4 == 1}
    yield "reverse", {"reverse": True}


def both_directions(params, x):
    layer = gru_jax.linen.BidirectionalGRULayer(
        params.recurrent_weights.shape[1],
        implementation="pallas",
        reset_gate_mode=params.reset_gate_mode,
    )
    variables = {"params": {"forward": params.arrays(), "backward": params.arrays()}}
    variables = jax.tree.map(lambda a: a, variables, is_leaf=lambda a: a is None)
    for direction in variables["params"].values():
        for name in [name for name, array in direction.items() if array is None]:
            del direction[name]
    return jnp.sum(layer.apply(variables, x).astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [64, 128, 192, 256, 320, 384, 448])
@pytest.mark.parametrize("mode", [AFTER, WITH_BIAS])
def test_everything_lowers_for_cuda(mode, H, dtype):
    trained = H <= 256
    for B in (1, 16, 33):
        params, x = shapes(H, B, mode, dtype)
        calls = {name: partial(loss, **options) for name, options in variants(B)}
        for name, call in (calls | {"bidirectional": both_directions}).items():
            function = jax.grad(call, argnums=(0, 1)) if trained else call
            assert kernels(function, params, x) == 1 + trained, (name, B)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_forward_and_a_backward_kernel_lower(mode, dtype):
    params, x = shapes(70, 33, mode, dtype)
    for _, options in variants(33):
        assert kernels(partial(loss, **options), params, x) == 1
        assert kernels(jax.grad(partial(loss, **options), argnums=(0, 1)), params, x) == 2
    assert kernels(both_directions, params, x) == 1
    assert kernels(jax.grad(both_directions), params, x) == 2


@pytest.mark.parametrize("mode", MODES)
def test_the_largest_layers_and_the_widest_tiles_lower(mode):
    resets = {"resets": np.ones((1, T), bool)}
    assert kernels(partial(loss, **resets), *shapes(448, 1, mode, "float32")) == 1
    assert kernels(jax.grad(partial(loss, **resets)), *shapes(320, 1, mode, "float32")) == 2
    # Above, the backward loop is XLA's.
    assert kernels(jax.grad(loss), *shapes(448, 1, mode, "float32")) == 1
    batch = _gpu.AT_ONCE[4] * 16 + 1  # one row more than narrow tiles can hold at once
    assert _gpu_forward.tiles_for((batch, 256), "float16").columns == 32
    assert kernels(loss, *shapes(256, batch, mode, "float32")) == 1
    batch = _gpu.AT_ONCE[2] * 16 + 1
    assert _gpu_backward.tiles_for(mode != BEFORE, (batch, 128)).columns == 32
    assert kernels(jax.grad(loss), *shapes(128, batch, mode, "float32")) == 2


def test_transformations_launch_as_few_kernels_as_one_call():
    params, x = shapes(70, 4, AFTER, "float32")
    grad = jax.grad(loss)
    more = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), tree
    )
    assert kernels(jax.vmap(grad), more(params), more(x)) == 2
    assert kernels(jax.vmap(grad, (None, 0)), params, more(x)) == 2
    assert kernels(jax.vmap(grad, (0, None)), more(params), x) == 2
    assert kernels(jax.vmap(jax.vmap(grad, (None, 0)), (0, None)), more(params), more(x)) == 2
    assert kernels(partial(jax.grad(loss), checkpoint=1), params, x) == 2
    # Segments: forward, forward again and backward, in one loop each, and for what is left over.
    assert kernels(partial(jax.grad(loss), checkpoint=4), params, x) == 6
    # Forward mode: a kernel and a scan. Second derivatives: the scan under the first.
    assert kernels(lambda p, x: jax.jvp(loss, (p, x), (p, x)), params, x) == 1
    assert kernels(jax.grad(lambda p, x: jnp.sum(jax.grad(loss, 1)(p, x) ** 2)), params, x) >= 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_kernels_in_a_shard_map(check_vma):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, parts = PartitionSpec(), PartitionSpec("batch")
    summed = jax.shard_map(
        lambda params, x: jax.lax.psum(loss(params, x), "batch"),
        mesh=mesh, in_specs=(whole, parts), out_specs=whole, check_vma=check_vma,
    )  # fmt: skip
    assert kernels(jax.grad(summed), *shapes(70, 4, AFTER, "float32")) == 2


# Which program runs where


def test_unrolling_is_chosen_by_platform():
    params, x = shapes(16, 4, AFTER, "float32", steps=20)
    grad = lambda implementation, unroll: jax.grad(  # noqa: E731
        partial(loss, implementation=implementation, unroll=unroll)
    )
    for implementation in (None, "scan"):
        for platform, unroll in (("cuda", 8), ("cpu", 1), ("tpu", 1)):
            count = lambda unroll: [  # noqa: E731
                lowered(grad(implementation, unroll), params, x, platform=platform).count(word)  # noqa: B023
                for word in ("dot_general", "call @", "stablehlo.multiply")
            ]
            assert count(None) == count(unroll) != count(9 - unroll)


def test_bfloat16_results_multiply_bfloat16_on_cuda():
    grad = jax.grad(partial(loss, implementation="scan"))
    for dtype, platform, algorithms in (
        ("bfloat16", "cuda", True), ("bfloat16", "cpu", False), ("float32", "cuda", False)
    ):  # fmt: skip
        text = lowered(grad, *shapes(16, 4, AFTER, dtype), platform=platform)
        assert (text.count("algorithm = <lhs_precision_type = bf16") >= 10) is algorithms
    exact = partial(loss, implementation="scan", precision="highest")
    assert "bf16, rhs" not in lowered(jax.grad(exact), *shapes(16, 4, AFTER, "bfloat16"))


def test_only_what_was_measured_is_chosen():
    assert not _sequence.MEASURED  # no result of a GPU is in the repository
    params, x = shapes(64, 4, AFTER, "float32")
    grad = jax.grad(partial(loss, implementation=None))
    assert kernels(grad, params, x) == 0
    jax.clear_caches()
    measured = frozenset({("float16", 4, T, 64)})
    with mock.patch.object(_sequence, "MEASURED", measured):
        assert kernels(grad, params, x) == 0  # there is no Hopper GPU here
        jax.clear_caches()
        with mock.patch.object(_loop, "on_hopper", return_value=True):
            assert kernels(grad, params, x) == 2
            assert kernels(grad, params, x, platform="cpu") == 0
            assert kernels(grad, *shapes(64, 5, AFTER, "float32")) == 0
            assert kernels(grad, *shapes(64, 4, AFTER, "bfloat16")) == 0
    jax.clear_caches()


def test_hopper_is_recognised():
    assert not _loop.on_hopper()
    device = lambda capability: mock.Mock(compute_capability=capability)  # noqa: E731
    for capabilities, hopper in (
        (["9.0", "9.0"], True),
        (["9.0", "8.0"], False),
        (["10.0"], False),
    ):
        with mock.patch.object(jax, "devices", return_value=list(map(device, capabilities))):
            assert _loop.on_hopper() is hopper


def test_what_a_kernel_cannot_do_is_refused_with_the_reason():
    params, x = shapes(5, 2, AFTER, "float32")
    refused = partial(pytest.raises, ValueError)
    with refused(match="implementation 'pallas' cannot run this: .* precision is 'highest'"):
        jax.eval_shape(partial(loss, precision="highest"), params, x)
    with jax.default_matmul_precision("float32"), refused(match="precision is 'float32'"):
        jax.eval_shape(loss, params, x)
    with refused(match="no loop to unroll, and unroll is 2.* Pass implementation=None or 'scan'"):
        jax.eval_shape(partial(loss, unroll=2), params, x)
    with refused(match="449 hidden units do not fit"):
        jax.eval_shape(loss, *shapes(449, 2, AFTER, "float32"))
    with refused(match="does not suit float64"):
        jax.eval_shape(loss, *shapes(5, 2, AFTER, "float64"))
    with refused(match="activation functions that have names"):
        jax.eval_shape(loss, params.replace(state_activation_function=jnp.sin), x)
    (batch,) = jax.export.symbolic_shape("b")
    with refused(match="needs fixed sizes"):
        jax.eval_shape(loss, params, jax.ShapeDtypeStruct((batch, T, INPUTS), x.dtype))


def test_a_kernel_on_a_cpu_is_refused_with_the_way_out():
    arrays, x, *_ = case(AFTER, 5, 2)
    params = as_params(arrays, AFTER)
    refused = partial(
        pytest.raises, ValueError, match="runs on Hopper GPUs.*Pass implementation=None"
    )
    for function in (loss, jax.grad(loss)):
        with refused():
            function(params, x)
        with refused():
            jax.jit(function).lower(params, x)
    with refused(), jax.disable_jit():
        loss(params, x)


def test_nothing_to_do_needs_no_kernel():
    params, x = shapes(5, 0, AFTER, "float32")
    assert kernels(loss, params, x) == kernels(loss, *shapes(5, 2, AFTER, "float32", steps=0)) == 0


# Numbers


def case(mode, H, B, dtype="float32", seed=3, **sizes):
    rng = np.random.default_rng(seed)
    params = random_params(rng, H, INPUTS, mode, dtype=dtype, **sizes)
    x, h0 = rng.normal(size=(B, T, INPUTS)), rng.normal(size=(B, H)) / 2
    cy, ch = rng.normal(size=(B, T, H)), rng.normal(size=(B, H))
    return params, x.astype(dtype), h0.astype(dtype), cy, ch


def agrees(
    mode, H, B, tolerance, activations=("tanh", "sigmoid"), dtype="float32", sizes=None, **options
):
    """Compares outputs and gradients with the loops in float64."""
    arrays, x, h0, cy, ch = case(mode, H, B, dtype, **(sizes or {}))
    params = as_params(arrays, mode, *activations)

    def run(params, x, h0):
        y, hidden = gru_jax.gru(params, x, h0, implementation="pallas", **options)
        weights = jnp.asarray(cy[:, 0] if y.ndim == 2 else cy, jnp.float32)
        weighted = jnp.sum(y.astype(jnp.float32) * weights)
        return weighted + jnp.sum(hidden * jnp.asarray(ch, jnp.float32)), (y, hidden)

    (_, (y, hidden)), got = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(
        params, jnp.asarray(x), jnp.asarray(h0)
    )
    names = dict(zip(("state_activation", "gate_activation"), activations, strict=True))
    want_y, want_hidden = gru_ref(arrays, x, h0, mode=mode, **names, **options)
    assert_close({"y": y, "hidden": hidden}, {"y": want_y, "hidden": want_hidden}, tolerance)
    if options.get("output_mode") == "last":
        cy = cy[:, 0]
    want = gru_ref_grads(arrays, x, h0, cy, ch, mode=mode, **names, **options)
    assert_close(as_dict(got[0], x=got[1], h0=got[2]), want, 2 * tolerance)


@contextlib.contextmanager
def exact():
    """Kernels that multiply in float32: on the CPU they can."""
    with (
        jax.disable_jit(),
        on_the_cpu(),
        mock.patch.dict(_sequence.HALVES, {"float32": "float32"}),
        mock.patch.object(_gpu_backward, "OPERAND", "float32"),
    ):
        yield


@contextlib.contextmanager
def interpreted():
    """Kernels that the interpreter of Pallas runs."""
    here = lambda kernel, *arrays: kernel(*arrays)  # noqa: E731
    with (
        jax.disable_jit(),
        plgpu.force_gpu_interpret_mode(),
        mock.patch.object(_gpu, "elsewhere", here),
    ):
        yield


RAGGED = {
    "lengths": np.array([6, 0, 3]),
    "resets": np.array([[1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1]], bool),
}
HOLES = {"mask": np.array([[1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]], bool)}


@pytest.mark.parametrize(
    "options", [{}, RAGGED | {"reverse": True}, HOLES | {"output_mode": "last"}], ids=len
)
@pytest.mark.parametrize("H", [5, 70, 130])
@pytest.mark.parametrize("mode", MODES)
def test_clusters_of_one_two_and_three_blocks_agree_with_the_loops(mode, H, options):
    with exact():
        agrees(mode, H, 3, 3e-6, **options)


def test_seven_blocks_and_three_tiles_agree_with_the_loops():
    with exact():
        params, x = as_params(case(AFTER, 448, 1)[0], AFTER), case(AFTER, 448, 1)[1]
        y, _ = gru_jax.gru(params, x[:, :3], implementation="pallas")
    want, _ = gru_ref(case(AFTER, 448, 1)[0], x[:, :3], mode=AFTER)
    assert relative_error(y, want) < 3e-6
    with exact():
        agrees(WITH_BIAS, 3, 33, 3e-6, resets=np.arange(33 * T).reshape(33, T) % 5 == 2)


def test_other_activations_and_projectors_agree_with_the_loops():
    with exact():
        agrees(WITH_BIAS, 5, 2, 3e-6, activations=("softsign", "hard-sigmoid"))
        agrees(BEFORE, 7, 2, 3e-6, sizes={"P_i": 2, "P_o": 4}, reverse=True)


@pytest.mark.parametrize("mode", MODES)
def test_rounding_to_16_bits_costs_less_than_a_thousandth(mode):
    with jax.disable_jit(), on_the_cpu():
        agrees(mode, 70, 3, 1e-3, **RAGGED)


def test_a_state_that_16_bits_cannot_hold_gives_no_number_rather_than_a_wrong_one():
    arrays, x, h0, *_ = case(AFTER, 5, 2)
    with jax.disable_jit(), on_the_cpu():
        params = as_params(arrays, AFTER)
        run = partial(gru_jax.gru, params, x, implementation="pallas")
        y, _ = run(jnp.asarray(h0).at[1, 2].set(1e5))
        # A layer that keeps its state between calls returns to another one than it enters with.
        back = jnp.asarray(h0).at[1, 2].set(1e5)
        options = _sequence.Options("sequence", False, None, None, None, "pallas")
        resets = np.arange(2 * T).reshape(2, T) % T == 3
        z, _ = _sequence.run(options, params, x, jnp.asarray(h0), back, None, None, resets)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert np.isfinite(z[0]).all()
    assert np.isfinite(z[1, :3]).all()
    assert np.isnan(z[1, 3:]).all()


@pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="jax before 0.11")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_the_interpreter_of_pallas_agrees_with_the_loops(mode, dtype):
    with interpreted():
        agrees(mode, 37, 3, 1e-2 if dtype == "bfloat16" else 1e-3, dtype=dtype, **RAGGED)
        agrees(mode, 64, 17, 1e-2 if dtype == "bfloat16" else 1e-3, dtype=dtype, reverse=True)


@pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="jax before 0.11")
def test_mapped_kernels_and_both_directions_agree_with_the_scan():
    params, x, h0, *_ = case(AFTER, 5, 2)
    params = as_params(params, AFTER)
    more = jax.tree.map(lambda a: jnp.stack([a, a / 2, -a]), (params, x, h0))
    forward = gru_jax.nnx.BidirectionalGRULayer(5, input_size=3, rngs=nnx_rngs())
    with interpreted():
        for axes in ((0, 0, 0), (None, 0, None), (0, None, None)):
            arrays = [
                m if a == 0 else o for m, o, a in zip(more, (params, x, h0), axes, strict=True)
            ]
            grads = [
                jax.grad(partial(loss, implementation=i), (0, 1, 2)) for i in ("pallas", "scan")
            ]
            got, want = (jax.vmap(grad, axes)(*arrays) for grad in grads)
            assert_close(leaves(got), leaves(want), 5e-3)
        both = gru_jax.nnx.BidirectionalGRULayer(
            5, input_size=3, rngs=nnx_rngs(), implementation="pallas"
        )
        lengths = jnp.array([6, 4])
        got, want = both(x, lengths=lengths), forward(x, lengths=lengths)
        assert relative_error(got, want) < 1e-3


def leaves(tree):
    return dict(enumerate(jax.tree.leaves(tree)))


def nnx_rngs():
    from flax import nnx

    return nnx.Rngs(0)
