"""What is checked on a GPU: calls of the library with fresh numbers, and the right answers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gru_jax
from examples.benchmarks import oracle
from examples.benchmarks.gpu_contestants import DTYPES
from examples.benchmarks.problem import MODES, Size

LIMITS = {"float32": 1e-3, "float16": 1e-3, "bfloat16": 1e-2}
OPTIONS = ("lengths", "mask", "resets", "reverse", "last", "no h0", "soft")
SOFT = ("softsign", "hard-sigmoid")


class Case(NamedTuple):
    """A call of `gru`, or of a bidirectional layer, whose numbers are still to be drawn."""

    size: Size
    mode: str
    dtype: str
    options: tuple[str, ...] = ()  # of OPTIONS, or "forward only", "bidirectional"

    @property
    def variant(self) -> str:
        """Returns the options as text."""
        return ", ".join(self.options) or "plain"

    @property
    def key(self) -> str:
        """Returns what tells it apart from the others."""
        return f"checks {self.size}, {self.mode}, {self.dtype}, {self.variant}"


class Numbers(NamedTuple):
    """What a case is run with; the leaves of a bidirectional layer are two."""

    leaves: list[dict[str, np.ndarray]]
    x: np.ndarray
    h0: np.ndarray | None
    cy: np.ndarray
    ch: list[np.ndarray]
    flags: dict[str, np.ndarray]  # lengths or mask, resets


def cases(rng: np.random.Generator, quick: bool) -> Iterator[Case]:
    """Yields all cases, the plain ones first; batches and times are drawn."""
    after, before, recurrent = MODES

    def size(H: int, T: int = 0) -> Size:
        B = int(rng.choice([1, 3, 16, 33, 50, 130]))
        return Size(B, T or int(rng.integers(20, 60)), int(rng.integers(1, 2 * H)), H)

    if quick:
        small, (float32, bfloat16, float16) = Size(3, 6, 4, 5), DTYPES
        yield Case(small, recurrent, float32, ("lengths", "resets", "reverse"))
        yield Case(small, after, float16, ("mask", "last"))
        yield Case(small, after, bfloat16, ("bidirectional", "lengths"))
        yield Case(small, before, float32, ("no h0", "soft"))
        yield Case(small, recurrent, bfloat16, ("forward only", "mask", "reverse"))
        return
    for H in (64, 128, 256, 100, 192, 250):
        for number, dtype in enumerate(DTYPES):
            yield Case(size(H), (recurrent, after)[(H + number) % 2], dtype)
    for dtype in DTYPES:
        yield from (Case(size(72), recurrent, dtype, (option,)) for option in OPTIONS)
        yield Case(size(200), after, dtype, ("lengths", "resets", "reverse"))
        yield Case(size(130), after, dtype, ("bidirectional", "lengths"))
        yield Case(size(256, T=700), recurrent, dtype)
        yield from (Case(size(H), before, dtype) for H in (64, 120))
        for H in (72, 136, 300, 384, 448):
            yield Case(size(H), recurrent, dtype, ("forward only",))


def draw(case: Case, rng: np.random.Generator) -> Numbers:
    """Draws numbers that `dtype` can hold; weights of order 1/√columns, no bias or state zero."""
    B, T, I, H = case.size  # noqa: E741

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(scale * rng.standard_normal(shape), jnp.dtype(case.dtype))

    rows = (6 if case.mode.startswith("recurrent") else 3) * H
    two = "bidirectional" in case.options
    leaves = [
        {
            "input_weights": normal(3 * H, I, scale=I**-0.5),
            "recurrent_weights": normal(3 * H, H, scale=H**-0.5),
            "bias": normal(rows, scale=0.5),
        }
        for _ in range(1 + two)
    ]
    x, flags = normal(B, T, I), {}
    if "lengths" in case.options:
        flags["lengths"] = rng.integers(0, T, B, dtype=np.int32, endpoint=True)
        x[~_kept(case, flags)] = np.nan
    if "mask" in case.options:
        flags["mask"] = rng.random((B, T)) < 0.7
        x[~flags["mask"]] = np.nan
    if "resets" in case.options:
        flags["resets"] = rng.random((B, T)) < 0.1
    h0 = None if two or "no h0" in case.options else rng.standard_normal((B, H), np.float32)
    cy = normal(*((B, H) if "last" in case.options else (B, T, (1 + two) * H)))
    ch = [rng.standard_normal((B, H), np.float32) for _ in range(1 + two)]
    return Numbers(leaves, x, h0, cy, ch, flags)


def _kept(case: Case, flags: dict[str, np.ndarray]) -> np.ndarray:
    """Booleans (B, T), False at skipped steps."""
    B, T = case.size[:2]
    if "lengths" in flags:
        return np.arange(T) < flags["lengths"][:, None]
    return flags.get("mask", np.ones((B, T), bool))


def right(case: Case, numbers: Numbers) -> dict[str, Any]:
    """Returns outputs, final states and gradients in float64, named as in `call`."""
    B, T, _, H = case.size
    last, two = "last" in case.options, "bidirectional" in case.options
    zeros = np.zeros((B, H))
    kinds = SOFT if "soft" in case.options else ("tanh", "sigmoid")
    found = []
    for i, leaves in enumerate(numbers.leaves):
        cy = np.zeros((B, T, H)) if last else _wide(numbers.cy)[..., i * H : (i + 1) * H]
        found.append(
            oracle.solve(
                oracle.Call(
                    case.mode,
                    {name: _wide(leaf) for name, leaf in leaves.items()},
                    _wide(numbers.x),
                    zeros if numbers.h0 is None else numbers.h0,
                    cy,
                    numbers.ch[i] + (_wide(numbers.cy) if last else 0.0),
                    _kept(case, numbers.flags),
                    numbers.flags.get("resets"),
                    ("reverse" in case.options) != bool(i),
                    *kinds,
                )
            )
        )
    y = found[0].hidden if last else np.concatenate([one.y for one in found], axis=-1)
    result: dict[str, Any] = {"y": y, "hidden": [one.hidden for one in found]}
    if "forward only" in case.options:
        return result
    result["gradients"] = {"leaves": [one.leaves for one in found], "x": sum(o.x for o in found)}
    if numbers.h0 is not None and not two:
        result["gradients"]["h0"] = found[0].h0
    return result


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def call(case: Case, implementation: str | None) -> Any:
    """Returns a function of `Numbers` that returns what `right` returns, of the library."""
    run = _layer if "bidirectional" in case.options else _sequence

    def both(numbers: Numbers) -> dict[str, Any]:
        leaves, x, h0, cy, ch, flags = numbers

        def outputs(leaves: list, x: Any, h0: Any) -> tuple:
            return run(case, implementation, leaves, x, h0, flags)

        if "forward only" in case.options:
            y, hidden = outputs(leaves, x, h0)
            return {"y": y, "hidden": hidden}
        (y, hidden), back = jax.vjp(outputs, leaves, x, h0)
        d_leaves, d_x, d_h0 = back((cy, ch))
        gradients = {"leaves": d_leaves, "x": d_x} | ({} if h0 is None else {"h0": d_h0})
        return {"y": y, "hidden": hidden, "gradients": gradients}

    return both


def _options(case: Case, implementation: str | None) -> dict[str, Any]:
    mode = "last" if "last" in case.options else "sequence"
    reverse = "reverse" in case.options
    return {"output_mode": mode, "reverse": reverse, "implementation": implementation}


def _sequence(
    case: Case, implementation: str | None, leaves: list, x: Any, h0: Any, flags: dict
) -> tuple:
    """`gru_jax.gru`: y and the final state."""
    kinds = SOFT if "soft" in case.options else ("tanh", "sigmoid")
    names = ("state_activation_function", "gate_activation_function")
    options: dict[str, Any] = dict(zip(names, kinds, strict=True))
    params = gru_jax.GRUParams(**leaves[0], reset_gate_mode=case.mode, **options)
    y, hidden = gru_jax.gru(params, x, h0, **flags, **_options(case, implementation))
    return y, [hidden]


def _layer(
    case: Case, implementation: str | None, leaves: list, x: Any, h0: None, flags: dict
) -> tuple:
    """`gru_jax.linen.BidirectionalGRULayer`: y and the two final states."""
    layer = gru_jax.linen.BidirectionalGRULayer(
        case.size.hidden,
        reset_gate_mode=case.mode,
        has_state_outputs=True,
        **_options(case, implementation),
    )
    params = dict(zip(("forward", "backward"), leaves, strict=True))
    y, hidden = layer.apply({"params": params}, x, **flags)
    return y, list(hidden)
