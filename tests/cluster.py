"""A cluster of thread blocks on the CPU: runs the kernels' bodies, one Python thread a block.

What the interpreter of Pallas does not know, stores into the shared memory of other blocks, this
does, and it is hostile: a copy that has been started fills its target with NaN, ends after a random
time, and reads its source only then. Memory written by a block must be committed before wgmma or a
copy reads it. A barrier that completes twice before it is waited for, or never, is an error.
"""

import contextlib
import functools
import itertools
import random
import threading
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from gru_jax import _gpu, _gpu_backward, _gpu_forward

PATIENCE = 20.0  # seconds


class Ref:
    """Memory, or a part of it; `home` is the block's array that it is a part of."""

    def __init__(self, view, dirty=None, home: "Ref | None" = None, path: tuple = ()) -> None:
        self.view, self.home, self.path = view, home or self, path
        self.dirty = np.zeros(view.shape, bool) if dirty is None else dirty

    @property
    def at(self) -> "Ref":
        return Parts(self)

    def part(self, index: Any) -> "Ref":
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(
            slice(int(i.start), int(i.start) + i.size) if hasattr(i, "size") and i.size > 1
            else i if i is Ellipsis else int(i)
            for i in index
        )  # fmt: skip
        return Ref(self.view[index], self.dirty[index], self.home, (*self.path, index))

    def in_block(self, block: "Block") -> "Ref":
        """The same part of the same array in another block."""
        ref = block.twins[id(self.home)]
        for index in self.path:
            ref = Ref(ref.view[index], ref.dirty[index], ref.home)
        return ref

    def __getitem__(self, index: Any) -> jax.Array:
        return jnp.array(self.part(index).view)

    def __setitem__(self, index: Any, value: Any) -> None:
        part = self.part(index)
        part.view[...], part.dirty[...] = np.asarray(value), True


class Parts:
    def __init__(self, ref: Ref) -> None:
        self.ref = ref

    def __getitem__(self, index: Any) -> Ref:
        return self.ref.part(index)


class Barrier:
    def __init__(self, num_arrivals: int) -> None:
        self.arrivals, self.came, self.phases, self.waited = num_arrivals, 0, 0, 0
        self.condition = threading.Condition()

    def arrive(self) -> None:
        with self.condition:
            self.came += 1
            if self.came == self.arrivals:
                self.came, self.phases = 0, self.phases + 1
                assert self.phases <= self.waited + 1, "a barrier completed twice"
                self.condition.notify_all()

    def wait(self) -> None:
        with self.condition:
            self.waited += 1
            done = self.condition.wait_for(lambda: self.phases >= self.waited, PATIENCE)
            assert done, "a barrier was never completed"


class Barriers:
    """What `plgpu.Barrier` allocates: one barrier, or several behind `.at`."""

    def __init__(self, num_arrivals: int = 1, num_barriers: int = 1) -> None:
        self.all, self.at = [Barrier(num_arrivals) for _ in range(num_barriers)], self

    def __getitem__(self, slot: Any) -> Barrier:
        return self.all[int(slot)]


def one(barrier: Any) -> Barrier:
    return barrier if isinstance(barrier, Barrier) else barrier.all[0]


def assert_aligned(ref: Ref) -> None:
    begin, home = (a.__array_interface__["data"][0] for a in (ref.view, ref.home.view))
    assert (begin - home) % 128 == 0, "a copy begins at a place where the hardware allows none"


class Block:
    """What a block sees as `plgpu`, `pl` and `lax`."""

    def __init__(self, cluster: "Cluster", index: dict[str, int]) -> None:
        self.cluster, self.index, self.errors = cluster, index, cluster.errors
        self.twins: dict[int, Any] = {}
        self.stores: list[threading.Thread] = []

    def later(self, do: Any) -> threading.Thread:
        def run() -> None:
            time.sleep(random.random() * 2e-3)
            try:
                do()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def copy_gmem_to_smem(self, source: Ref, place: Ref, barrier: Any) -> None:
        assert_aligned(place)
        place.view[...] = np.nan

        def do() -> None:
            place.view[...] = source.view
            one(barrier).arrive()

        self.later(do)

    def copy_smem_to_gmem(self, source: Ref, place: Ref) -> None:
        assert_aligned(source)
        assert not source.dirty.any(), "written memory was copied before it was committed"
        self.stores.append(self.later(lambda: place.view.__setitem__(..., source.view)))

    def wait_smem_to_gmem(self, left: int, wait_read_only: bool = False) -> None:
        for thread in self.stores:
            thread.join(PATIENCE)
        self.stores.clear()

    def async_store_smem(self, value, ref, barrier, *, cluster_idx, cluster_dim) -> None:
        assert cluster_dim == "block"
        other = self.cluster.blocks[int(cluster_idx)]
        place = ref.in_block(other)
        slot = next((b, n) for b in self.barriers for n, a in enumerate(b.all) if a is one(barrier))
        barrier = other.twins[id(slot[0])].all[slot[1]]
        place.view[...] = np.nan

        def do() -> None:
            place.view[...], place.dirty[...] = np.asarray(value), True
            barrier.arrive()

        self.later(do)

    def barrier_wait(self, barrier: Any) -> None:
        one(barrier).wait()

    def commit_smem(self) -> None:
        for array in self.arrays:
            array.dirty[...] = False

    def wgmma(self, accumulator: Ref, a: Ref, b: Ref) -> None:
        assert not b.dirty.any(), "written memory was multiplied before it was committed"
        accumulator.view[...] += a.view.astype(np.float32) @ b.view.astype(np.float32)

    def ACC(self, shape: tuple, dtype: Any) -> Ref:  # noqa: N802
        return Ref(np.zeros(shape, dtype))

    def run_scoped(self, run: Any, accumulator: Ref) -> Any:
        return run(accumulator)

    def when(self, condition: Any) -> Any:
        return lambda run: run() if condition else None

    def axis_index(self, name: str) -> int:
        return self.index[name]

    def rem(self, a: Any, b: Any) -> int:
        return int(a) % int(b)

    def fori_loop(self, begin: int, end: int, body: Any, carry: Any) -> Any:
        for i in range(begin, end):
            carry = body(i, carry)
        return carry

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.lax, name)

    def ds(self, start: Any, size: int) -> slice:
        return type("Slice", (), {"start": start, "size": size})()


class Cluster:
    def __init__(self, C: int, scratch: Any, grid: tuple[int, int]) -> None:
        self.errors: list[BaseException] = []
        self.blocks = [Block(self, {"net": grid[0], "tile": grid[1], "block": c}) for c in range(C)]
        memory = [[make() for make in scratch] for _ in range(C)]
        for block, own in zip(self.blocks, memory, strict=True):
            block.memory = own
            block.arrays = [a for a in own if isinstance(a, Ref)]
            block.barriers = [b for b in own if isinstance(b, Barriers)]
            for other in memory:
                block.twins |= {id(a): b for a, b in zip(other, own, strict=True)}


local = threading.local()


class Here:
    """Stands for `plgpu`, `pl` and `lax`: whatever block asks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(local.block, name)


def launch(body: Any, tiles: Any, out: Any, scratch: Any) -> Any:
    """As `_gpu.launch`."""

    def run(weights: tuple, data: tuple) -> tuple:
        grid = data[0].shape[:2]
        arrays = [Ref(np.array(a)) for a in (*weights, *data)]
        outs = [Ref(np.full((*grid, *a.shape), np.nan, a.dtype)) for a in out]
        for index in itertools.product(*map(range, grid)):
            cluster = Cluster(tiles.blocks, scratch, index)
            threads = []
            for block in cluster.blocks:
                threads.append(threading.Thread(target=work, args=(block, body, arrays + outs)))
                threads[-1].start()
            for thread in threads:
                thread.join(2 * PATIENCE)
                assert not thread.is_alive()
            if cluster.errors:
                raise cluster.errors[0]
        return tuple(jnp.asarray(a.view) for a in outs)

    return run


def work(block: Block, body: Any, arrays: list) -> None:
    local.block = block
    try:
        body(*block.index.values(), *arrays, *block.memory)
        assert not block.stores
        assert all(b.came == 0 and b.phases == b.waited for bs in block.barriers for b in bs.all)
    except BaseException as error:
        block.errors.append(error)


class Outside:
    """`plgpu` where scratch memory is described, and inside a block whatever it offers."""

    SMEM = staticmethod(
        lambda shape, dtype, transforms=(): lambda: Ref(np.full(shape, np.nan, jnp.dtype(dtype)))
    )
    Barrier = staticmethod(lambda **numbers: functools.partial(Barriers, **numbers))
    TilingTransform = SwizzleTransform = staticmethod(lambda *_: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(local.block, name)


@contextlib.contextmanager
def on_the_cpu() -> Any:
    """Within this, kernels run here."""
    here, fake = Here(), Outside()
    with contextlib.ExitStack() as stack:
        put = lambda module, name, value: stack.enter_context(  # noqa: E731
            mock.patch.object(module, name, value)
        )
        put(_gpu, "launch", launch)
        for module in (_gpu, _gpu_forward, _gpu_backward):
            put(module, "plgpu", fake)
            put(module, "pl", here)
            put(module, "lax", here)
        yield
