"""What the two GPU kernels share: who may run them, tiles, packing, and the exchange.

A cluster of C thread blocks runs a whole sequence of N batch rows, block c the 64 hidden units
64 c … 64 c + 63. Matrix products put units in rows and the batch in columns, so a batch of one
wastes 15 columns and not 63 rows. R stays in the blocks' shared memory for all T steps; what every
block needs of the others, it is sent: at each step each block writes its 64 × N numbers into the
shared memory of all C, and a barrier there counts the arrivals. The host is not involved.

    hidden units      C = 4 blocks, e. g. H = 256           batch: one cluster for each N rows
      0 …  63   ┌ block 0: rows of R, its h ┐
     64 … 127   │ block 1                   │ every step: own 64 × N numbers to all four
    128 … 191   │ block 2                   │
    192 … 255   └ block 3                   ┘

Written for Hopper (compute capability 9.0: wgmma, clusters, TMA), with Pallas' Mosaic GPU.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir

from gru_jax import _activations, _products
from gru_jax._products import Equations, Learnables

UNITS = 64  # of a block: the rows of one wgmma
TILES = (16, 32)  # batch rows of a cluster
# How many clusters of so many blocks an H200 holds at once; a cluster stays within one of its
# groups of 16 or 18 multiprocessors.
AT_ONCE = {1: 132, 2: 66, 3: 40, 4: 32, 5: 24, 6: 16, 7: 16, 8: 16}
SHARED_BYTES = 232_448  # of a block
BARRIER_BYTES = 1024  # at most, for all barriers of a block
FLAGS = 32  # numbers in a row of flags: it begins where a copy may begin, at 128 bytes
GATES: dict[Callable, Callable] = {
    _activations.GATE["sigmoid"]: lambda a: 1.0 / (1.0 + jnp.exp(-a)),
    _activations.GATE["hard-sigmoid"]: _activations.hard_sigmoid,
}
STATES: dict[Callable, Callable] = {
    _activations.STATE["tanh"]: lambda a: 2.0 / (1.0 + jnp.exp(-2.0 * a)) - 1.0,
    _activations.STATE["softsign"]: lambda a: a / (1.0 + jnp.abs(a)),
}


class Tiles(NamedTuple):
    """How a layer lies on the GPU: static, hashable."""

    blocks: int  # C
    columns: int  # N
    operand: str  # the 16-bit type of what is multiplied


def tiles_for(shape: tuple[int, ...], operand: str, shared_bytes: Callable) -> Tiles | None:
    """The narrowest tiles that put all states (*batch, H) on the GPU at once; None if none fit.

    `shared_bytes(C, N)`: the shared memory that a block needs.
    """
    *batch, H = shape
    C = -(-H // UNITS)
    fit = [N for N in TILES if shared_bytes(C, N) + BARRIER_BYTES <= SHARED_BYTES]
    if C not in AT_ONCE or not fit:
        return None
    at_once = [N for N in fit if -(-math.prod(batch) // N) <= AT_ONCE[C]]
    return Tiles(C, (at_once or fit[-1:])[0], operand)


def pack(tiles: Tiles, *arrays: jax.Array) -> jax.Array:
    """Arrays (B, T, H), n of them, to (B / N, T, C, 64 n, N); zeros fill tile and block."""
    B, T, H = arrays[0].shape
    C, N = tiles.blocks, tiles.columns
    rows, n = -(-B // N), len(arrays)
    a = jnp.stack(arrays, axis=2)
    a = jnp.pad(a, ((0, rows * N - B), (0, 0), (0, 0), (0, C * UNITS - H)))
    a = jnp.transpose(a.reshape(rows, N, T, n, C, UNITS), (0, 2, 4, 3, 5, 1))
    return a.reshape(rows, T, C, n * UNITS, N)


def unpack(a: jax.Array, B: int, H: int) -> jax.Array:
    """Undoes `pack` of one array."""
    rows, T, C, U, N = a.shape
    a = jnp.transpose(a, (0, 4, 1, 2, 3)).reshape(rows * N, T, C * U)
    return a[:B, :, :H]


def pack_state(tiles: Tiles, a: jax.Array) -> jax.Array:
    """(B, H) to (B / N, C, 64, N)."""
    return pack(tiles, a[:, None])[:, 0]


def pack_flags(tiles: Tiles, a: jax.Array) -> jax.Array:
    """(B, T) booleans to (B / N, T, N), 1.0 for True."""
    B, T = a.shape
    rows = -(-B // tiles.columns)
    a = jnp.pad(a.astype(jnp.float32), ((0, rows * tiles.columns - B), (0, 0)))
    return jnp.swapaxes(a.reshape(rows, tiles.columns, T), 1, 2)


def pad_units(a: jax.Array, C: int, axes: tuple[int, ...]) -> jax.Array:
    """The array with zeros for the units that fill the last block, along `axes`."""
    widths = [(0, C * UNITS - n if i in axes else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, widths)


def in_range(a: jax.Array, operand: str) -> jax.Array:
    """The array, NaN where `operand` would make it infinite: rather no number than a wrong one."""
    most = float(jnp.finfo(operand).max)
    return jnp.where(jnp.abs(a) <= most, a, jnp.nan)


def shared(shape: tuple[int, ...], dtype: Any, N: int) -> Any:
    """Shared memory tiled as wgmma and TMA want it: alike for all that meets in one product."""
    dtype = jnp.dtype(dtype)
    transforms = plgpu.TilingTransform((8, N)), plgpu.SwizzleTransform(N * dtype.itemsize)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def product(pairs: list[tuple[Any, Any]], shape: tuple[int, int]) -> jax.Array:
    """The sum of products of arrays in shared memory, in float32."""

    def multiply(accumulator: Any) -> jax.Array:
        for matrix, columns in pairs:
            plgpu.wgmma(accumulator, matrix, columns)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def load(source: Any, place: Any, barrier: Any) -> None:
    """Copies from the GPU's memory to shared memory, and waits."""
    plgpu.copy_gmem_to_smem(source, place, barrier)
    plgpu.barrier_wait(barrier)


def registers(source: Any, staging: Any, barrier: Any) -> jax.Array:
    """A value from the GPU's memory, by way of shared memory that may be overwritten at once."""
    load(source, staging, barrier)
    value = staging[...]
    plgpu.commit_smem()  # every warp has read
    return value


def write(value: jax.Array, staging: Any, place: Any) -> None:
    """Starts copying a value to the GPU's memory, by way of shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, place)


def send(value: jax.Array, buffer: Any, row: Any, barrier: Any, blocks: int) -> None:
    """Starts writing 64 × N numbers to `buffer`, from `row` on, of all blocks of the cluster."""
    place = pl.ds(row, UNITS)
    if blocks == 1:
        buffer[place] = value
        return
    first = lax.axis_index("block")
    for other in range(blocks):
        plgpu.async_store_smem(
            value,
            buffer.at[place],
            barrier,
            cluster_idx=lax.rem(first + other, jnp.int32(blocks)),
            cluster_dim="block",
        )


def receive(barrier: Any, blocks: int) -> None:
    """Waits until all blocks have written to this one, and shows it to wgmma and TMA."""
    if blocks > 1:
        plgpu.barrier_wait(barrier)
    plgpu.commit_smem()


def elsewhere(kernel: Callable, *arrays: jax.Array) -> list:
    """What stands in a program in place of a kernel on other platforms: it cannot be lowered."""
    return _elsewhere_p.bind(*arrays, out=tuple(jax.make_jaxpr(kernel)(*arrays).out_avals))


def _refuse(*_: Any, **__: Any) -> Any:
    raise ValueError(
        "implementation 'pallas' runs on Hopper GPUs, and this is to run elsewhere too. Pass "
        "implementation=None or 'scan', or lower for CUDA alone: lowering_platforms=('cuda',)."
    )


_elsewhere_p = Primitive("gru_kernel_elsewhere")
_elsewhere_p.multiple_results = True
_elsewhere_p.def_impl(_refuse)
_elsewhere_p.def_abstract_eval(lambda *_, out: list(out))
mlir.register_lowering(_elsewhere_p, _refuse)


def launch(body: Callable, tiles: Tiles, out: Any, scratch: tuple) -> Callable:
    """Returns (weights, data) -> out: the kernel on arrays with leading axes.

    Those of `weights` begin with (nets,), those of `data` and `out` with (nets, tiles); `vmap` adds
    to the first where weights are mapped, else to the second. `body` is told its net, tile and
    block before it is given the arrays and the scratch memory.
    """

    def run(weights: tuple, data: tuple) -> tuple:
        nets, rows = data[0].shape[:2]

        def placed(*refs: Any) -> None:
            i, many = lax.axis_index("cluster"), jnp.int32(rows)  # in one axis: others are short
            body(lax.div(i, many), lax.rem(i, many), lax.axis_index("block"), *refs)

        kernel = plgpu.kernel(
            placed,
            out_type=[jax.ShapeDtypeStruct((nets, rows, *a.shape), a.dtype) for a in out],
            scratch_types=scratch,
            grid=(nets * rows,),
            grid_names=("cluster",),
            cluster=(tiles.blocks,),
            cluster_names=("block",),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
        )
        arrays = (*weights, *data)
        results = lax.platform_dependent(*arrays, cuda=kernel, default=partial(elsewhere, kernel))
        alike = jnp.sum(jnp.zeros_like(data[0]))  # typed as the data; costs nothing once compiled
        return tuple(a + alike for a in results)

    call = custom_vmap(run)

    @call.def_vmap
    def fold(size: int, mapped: Any, weights: tuple, data: tuple) -> tuple:
        axis = 0 if any(jax.tree.leaves(mapped[0])) else 1

        def join(a: jax.Array, is_mapped: bool) -> jax.Array:
            a = a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
            a = jnp.moveaxis(a, 0, axis)
            return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])

        def split(a: jax.Array) -> jax.Array:
            a = a.reshape(*a.shape[:axis], size, -1, *a.shape[axis + 1 :])
            return jnp.moveaxis(a, axis, 0)

        if axis == 0:
            weights = jax.tree.map(join, weights, mapped[0])
        result = call(weights, jax.tree.map(join, data, mapped[1]))
        return jax.tree.map(split, result), jax.tree.map(lambda _: True, result)

    return call


def flat(a: jax.Array, kept: int) -> jax.Array:
    """The array with its batch axes, all but the last `kept` ones, made one."""
    return a.reshape(math.prod(a.shape[: a.ndim - kept]), *a.shape[a.ndim - kept :])


def dense(eq: Equations, learn: Learnables) -> jax.Array:
    """R_r, R_z, R_h̃ as (3, H, H); with an output projector the products R_g Q_oᵀ."""
    return _products.dense(eq, learn).reshape(3, -1, learn.R.shape[0] // 3)
