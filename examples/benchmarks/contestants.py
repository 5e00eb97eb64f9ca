"""Who takes part: name, the packages it needs, the reset mode it computes, where it runs."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from examples.benchmarks import c_gru, jax_grus, other_grus
from examples.benchmarks.problem import AFTER, BEFORE, MODES, RECURRENT_BIAS, Size, Weights
from examples.benchmarks.runners import CORES, GRU

OURS, PLAIN, SPECIAL = "gru_jax", "plain autodiff", "hand-written reverse"


class Contestant(NamedTuple):
    """A GRU that can be built from weights of its mode."""

    name: str
    mode: str
    build: Callable[..., GRU]
    packages: tuple[str, ...] = ()
    kind: str = "jax"  # "jax", "torch" or "cpu": no part in what is measured of JAX or on a GPU
    sequences: Callable[[Size], bool] = lambda size: True  # runs whole sequences of that size
    streams: bool = True  # takes single steps
    steps: int = 1  # in one call where it streams
    lacks: Callable[[], str | None] = lambda: None  # returns what else it needs and is not there

    def made(self, weights: Weights, device: str) -> Any:
        """Returns the GRU with its weights."""
        return self.build(weights, device) if self.kind == "torch" else self.build(weights)

    def who(self) -> dict[str, str]:
        """Returns the fields of a record that say whose it is."""
        return {"contestant": self.name, "mode": self.mode}

    def why_absent(self, device: str) -> str | None:
        """Returns why it does not take part here, or None."""
        if self.kind == "cpu" and device != "cpu":
            return "measured on the CPU only"
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        return f"{', '.join(missing)} not installed" if missing else self.lacks()


CONTESTANTS = (
    *(Contestant(OURS, mode, jax_grus.ours) for mode in MODES),
    Contestant(f"{OURS} checkpoint=1", AFTER, partial(jax_grus.ours, checkpoint=1), streams=False),
    Contestant(f"{OURS} 512-bit vectors", AFTER, jax_grus.wide, streams=False),
    Contestant(
        f"{OURS}, batch over the cores",
        AFTER,
        jax_grus.over_cores,
        kind="cpu",
        sequences=lambda size: size.batch % CORES == 0,
        streams=False,
        lacks=lambda: "a single core" if CORES == 1 else None,
    ),
    Contestant(
        f"{OURS} as C",
        RECURRENT_BIAS,
        c_gru.CGRU,
        kind="cpu",
        sequences=lambda size: size.batch == 1,
        lacks=c_gru.why_absent,
    ),
    Contestant(
        f"{OURS} as C, loop in C",
        RECURRENT_BIAS,
        partial(c_gru.CGRU, steps=100),
        kind="cpu",
        sequences=lambda size: False,
        steps=100,
        lacks=c_gru.why_absent,
    ),
    Contestant(SPECIAL, RECURRENT_BIAS, jax_grus.special, streams=False),
    *(Contestant(PLAIN, mode, jax_grus.plain) for mode in MODES),
    Contestant("linen", RECURRENT_BIAS, jax_grus.linen, ("flax",)),
    Contestant("nnx", AFTER, jax_grus.nnx, ("flax",)),
    Contestant("equinox", RECURRENT_BIAS, jax_grus.equinox, ("equinox",)),
    Contestant("haiku", BEFORE, jax_grus.haiku, ("haiku",)),
    Contestant("keras", RECURRENT_BIAS, jax_grus.keras, ("keras",)),
    Contestant("torch", RECURRENT_BIAS, other_grus.TorchGRU, ("torch",), "torch"),
    Contestant(
        "torch cell",
        RECURRENT_BIAS,
        partial(other_grus.TorchGRU, cell=True),
        ("torch",),
        "torch",
        sequences=lambda size: False,
    ),
    Contestant(
        "onnxruntime",
        RECURRENT_BIAS,
        other_grus.OnnxRuntimeGRU,
        ("onnx", "onnxruntime"),
        "cpu",
    ),
    Contestant("openvino", RECURRENT_BIAS, other_grus.OpenVinoGRU, ("onnx", "openvino"), "cpu"),
)
PEERS = tuple(dict.fromkeys(c.name for c in CONTESTANTS if not c.name.startswith(OURS)))
JAX_PEERS = tuple(c.name for c in CONTESTANTS if c.kind == "jax" and c.packages)


def taking_part(device: str, peers: Sequence[str]) -> tuple[list[Contestant], dict[str, str]]:
    """Returns who takes part, and of those asked for but absent, why."""
    asked = [c for c in CONTESTANTS if c.name in peers or c.name.startswith(OURS)]
    absent = {c.name: reason for c in asked if (reason := c.why_absent(device))}
    return [c for c in asked if c.name not in absent], absent
