"""Who takes part in the benchmark on a GPU, and in which dtype.

All have the reset mode "recurrent-bias-after-multiplication", that of PyTorch and linen, except
nnx, which has no recurrent bias. In float32 JAX multiplies in TF32 unless told otherwise;
PyTorch's GRU takes part with TF32 and without it.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gru_jax
from examples.benchmarks import jax_grus, other_grus
from examples.benchmarks.contestants import OURS, Contestant
from examples.benchmarks.problem import AFTER, RECURRENT_BIAS, Weights
from examples.benchmarks.runners import JaxGRU

DTYPES = ("float32", "bfloat16", "float16")
PALLAS, NNX, TORCH, TF32 = "pallas", "nnx", "torch", "torch TF32"
SCANS, UNROLLS = (1, 8, 16), (1, 2, 4, 8, 16, 32)
GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE"}
JACOBIANS = ("full", "diagonal")


class Entry(NamedTuple):
    """A contestant in one dtype."""

    contestant: Contestant
    dtype: str
    ragged: bool = False  # takes sequences of different lengths

    @property
    def name(self) -> str:
        """Returns the name in the records."""
        return self.contestant.name

    @property
    def key(self) -> str:
        """Returns what tells it apart from the others."""
        return f"{self.name} {self.dtype}"

    def who(self) -> dict[str, str]:
        """Returns the fields of a record that say whose it is."""
        return self.contestant.who() | {"dtype": self.dtype}

    def made(self, weights: Weights, lengths: np.ndarray, device: str) -> Any:
        """Returns the GRU with its weights."""
        if self.contestant.mode == AFTER:
            bias = np.zeros_like(weights.recurrent_bias)
            weights = weights._replace(mode=AFTER, recurrent_bias=bias)
        one = self.contestant
        if self.ragged:
            one = one._replace(build=partial(one.build, lengths=lengths))
        gru = one.made(weights, device)
        if isinstance(gru, JaxGRU):
            cast = partial(jnp.asarray, dtype=self.dtype)
            gru = gru._replace(params=jax.tree.map(cast, gru.params))
        return gru

    def prepare(self) -> None:
        """Sets what it shares with others, before it runs."""
        if self.contestant.kind == "torch":
            allow_tf32(self.name.startswith(TF32))

    def why_absent(self, device: str) -> str | None:
        """Returns why it does not take part here, or None."""
        if self.name.startswith(PALLAS) and device == "cpu":
            return "its kernels run on GPUs only"
        return self.contestant.why_absent(device)


def allow_tf32(allowed: bool) -> None:
    """Tells cuDNN whether the GRUs of PyTorch in float32 may multiply in TF32."""
    import torch

    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "rnn"):
        cudnn.rnn.fp32_precision = "tf32" if allowed else "ieee"
    else:  # before PyTorch 2.9
        cudnn.allow_tf32 = allowed


def _ours(name: str, dtypes: Iterable[str] = DTYPES, **options: Any) -> list[Entry]:
    """The library's GRU under some options, in some dtypes."""
    one = Contestant(name, RECURRENT_BIAS, partial(jax_grus.ours, **options))
    return [Entry(one, dtype) for dtype in dtypes]


def _scan(unroll: int, dtypes: Iterable[str] = DTYPES) -> list[Entry]:
    return _ours(f"scan {unroll}", dtypes, implementation="scan", unroll=unroll)


def _torch(name: str, dtype: str) -> Entry:
    build = partial(other_grus.TorchGRU, dtype=dtype)
    return Entry(Contestant(name, RECURRENT_BIAS, build, ("torch",), "torch"), dtype)


def _ragged(entries: Iterable[Entry], suffix: str) -> list[Entry]:
    return [
        Entry(e.contestant._replace(name=f"{e.name}, {suffix}"), e.dtype, ragged=True)
        for e in entries
    ]


def entries() -> list[Entry]:
    """Returns all contestants of the main comparison."""
    pallas, default = _ours(PALLAS, implementation=PALLAS), _ours(OURS)
    torch = [_torch(TF32, DTYPES[0]), *(_torch(TORCH, dtype) for dtype in DTYPES)]
    linen = Contestant("linen", RECURRENT_BIAS, jax_grus.linen, ("flax",))
    nnx = Contestant(NNX, AFTER, jax_grus.nnx, ("flax",))
    return [
        *pallas,
        *default,
        *(entry for unroll in SCANS for entry in _scan(unroll, DTYPES[:1])),
        *_scan(8, DTYPES[1:2]),
        *torch,
        *(Entry(nnx, dtype) for dtype in DTYPES),
        Entry(linen, DTYPES[0]),
        *_ragged([*pallas[:2], default[0]], "lengths"),
        *_ragged([torch[0], torch[2]], "packed"),
    ]


def sweep() -> list[Entry]:
    """Returns the library's scan by steps per iteration, also as graphs of the driver."""
    scans = {unroll: _scan(unroll, DTYPES[:2]) for unroll in UNROLLS}
    graphs = []
    for unroll in (1, 8):
        one = scans[unroll][0].contestant
        build = partial(_compiled, one.build)
        graphs.append(Entry(one._replace(name=f"{one.name}, graphs", build=build), DTYPES[0]))
    return [*_ours(OURS, DTYPES[:2]), *(e for pair in scans.values() for e in pair), *graphs]


def _compiled(build: Any, weights: Weights) -> JaxGRU:
    """Returns a GRU of the library whose loop is recorded as a graph, where XLA does that."""
    return build(weights)._replace(options=GRAPHS)


def parallel() -> list[Entry]:
    """Returns the scan, and the library's GRU in parallel over time."""
    found = [*_scan(8, DTYPES[:1]), *_ours(OURS, DTYPES[:1])]
    for jacobian in JACOBIANS:
        build = partial(_parallel, jacobian)
        one = Contestant(f"parallel {jacobian}", RECURRENT_BIAS, build, lacks=_why_not_parallel)
        found.append(Entry(one, DTYPES[0]))
    return found


def _why_not_parallel() -> str | None:
    return None if hasattr(gru_jax, "gru_parallel") else "gru_jax has no gru_parallel"


def _parallel(jacobian: str, weights: Weights) -> JaxGRU:
    """Returns `gru_jax.gru_parallel`."""
    run: Any = getattr(gru_jax, "gru_parallel")  # noqa: B009
    gru = jax_grus.ours(weights)
    return gru._replace(apply=lambda p, x: run(p, x, jacobian=jacobian)[0])


def taking_part(
    found: Sequence[Entry], device: str, names: Sequence[str] | None
) -> tuple[list[Entry], dict[str, str]]:
    """Returns who of those with some of these names takes part, and of the absent, why."""
    asked = [e for e in found if names is None or e.name in names]
    absent = {e.key: reason for e in asked if (reason := e.why_absent(device))}
    return [e for e in asked if e.key not in absent], absent
