"""A GRU trained in PyTorch, taken to JAX, made smaller, and taken on to ONNX Runtime and to C.

A `torch.nn.GRU` learns to predict the next sample of noisy oscillations. Its weights come to JAX
with `convert.from_torch` and give the same numbers; `projection` makes the GRU smaller; `export`
writes both as an ONNX model and as a C header. All of them run on the same recordings, and are
compared: how far are their outputs from PyTorch's, how well do they predict, how large is what has
to be shipped, and how long does one step of a stream take?

    pip install -e ".[examples,onnx,torch]"    # and a C compiler, if the C rows are wanted
    python examples/from_torch.py              # half a minute, and a picture
    python examples/from_torch.py --quick      # hardly trained, to see that it works
"""

import argparse
import ctypes
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import gru_jax
from gru_jax import convert, export, projection

CHANNELS, UNITS = 6, 64
GOAL = 0.5  # of the learnables go


class Row(NamedTuple):
    """What runs where, and what came out."""

    name: str
    learnables: int
    difference: float  # largest, from PyTorch's outputs
    loss: float  # mean square of the prediction error
    kilobytes: float | None  # to ship
    microseconds: float  # a step of a stream


class Way(NamedTuple):
    """A way to run a GRU: over a batch of recordings, and a single step."""

    run: Callable[[np.ndarray], np.ndarray]  # (batch, time, channels) to (batch, time, H)
    step: Callable[[], Any]  # one step of one stream, state included
    kilobytes: float | None = None


def oscillations(seed: int, count: int, steps: int) -> np.ndarray:
    """Draws recordings (count, steps, CHANNELS): damped oscillations, mixed, with noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)[:, None]
    frequency, phase = rng.uniform(0.05, 0.6, (count, 1, 4)), rng.uniform(0, 6.3, (count, 1, 4))
    sources = np.sin(frequency * t + phase) * np.exp(-t / rng.uniform(40, 400, (count, 1, 4)))
    mixed = sources @ np.random.default_rng(0).normal(size=(4, CHANNELS))
    return (mixed + 0.05 * rng.normal(size=mixed.shape)).astype(np.float32)


def train_torch(updates: int) -> tuple[torch.nn.GRU, torch.nn.Linear]:
    """Trains a GRU and a linear head in PyTorch to predict the next sample."""
    torch.manual_seed(0)
    gru, head = torch.nn.GRU(CHANNELS, UNITS, batch_first=True), torch.nn.Linear(UNITS, CHANNELS)
    optimizer = torch.optim.Adam([*gru.parameters(), *head.parameters()], lr=3e-3)
    for update in range(updates):
        x = torch.from_numpy(oscillations(update + 1, 32, 80))
        error = head(gru(x)[0])[:, :-1] - x[:, 1:]
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    return gru, head


def in_torch(gru: torch.nn.GRU) -> Way:
    """PyTorch itself."""
    x, h = torch.zeros(1, 1, CHANNELS), torch.zeros(1, 1, UNITS)

    @torch.no_grad()
    def run(x: np.ndarray) -> np.ndarray:
        return gru(torch.from_numpy(x))[0].numpy()

    return Way(run, torch.no_grad()(lambda: gru(x, h)))


def in_jax(params: gru_jax.GRUParams) -> Way:
    """This library: the sequence at once, and the cell."""
    params = jax.device_put(params)
    run, step = jax.jit(gru_jax.gru), jax.jit(gru_jax.gru_cell)
    h, x = jnp.zeros(UNITS), jnp.zeros(CHANNELS)
    return Way(
        lambda x: np.asarray(run(params, x)[0]),
        lambda: jax.block_until_ready(step(params, h, x)),
        4 * gru_jax.num_learnables(params) / 1000,
    )


def in_onnx(params: gru_jax.GRUParams) -> Way:
    """ONNX Runtime, from one native GRU node with ports for its state."""
    model = export.to_onnx(params).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    one = {"x": np.zeros((1, 1, CHANNELS), np.float32), "h0": np.zeros((1, UNITS), np.float32)}

    def run(x: np.ndarray) -> np.ndarray:
        h0 = np.zeros((len(x), UNITS), np.float32)
        return np.asarray(session.run(["y"], {"x": x, "h0": h0})[0])

    return Way(run, lambda: session.run(None, one), len(model) / 1000)


def in_c(params: gru_jax.GRUParams, folder: pathlib.Path, name: str) -> Way:
    """C: the header, compiled into a library, and called from Python; weights as a file."""
    (folder / f"{name}.h").write_text(export.to_c(params, name=name))
    (folder / f"{name}.c").write_text(
        f'#include "{name}.h"\n'
        f"void run({name}_state *s, const float *x, float *y, size_t steps)\n"
        f"{{ {name}_run(s, x, y, steps); }}\n"
    )
    flags = ["-std=c99", "-O3", "-march=native", "-shared", "-fPIC", "-Wall", "-Werror"]
    library = folder / f"{name}.so"
    subprocess.run(["cc", *flags, str(folder / f"{name}.c"), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).run
    function.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_size_t)

    def run(x: np.ndarray) -> np.ndarray:
        y = np.empty((*x.shape[:-1], UNITS), np.float32)
        for one, out in zip(np.ascontiguousarray(x), y, strict=True):
            state = np.zeros(UNITS, np.float32)  # the state of C holds nothing else
            function(state.ctypes.data, one.ctypes.data, out.ctypes.data, len(one))
        return y

    state, x, y = (np.zeros(n, np.float32) for n in (UNITS, CHANNELS, UNITS))
    pointers = state.ctypes.data, x.ctypes.data, y.ctypes.data
    kilobytes = len(export.c_weights(params)) / 1000
    return Way(run, lambda: function(*pointers, 1), kilobytes)


def microseconds(step: Callable[[], Any], seconds: float) -> float:
    """Returns the median duration of a call."""
    durations, end = [], time.perf_counter() + seconds
    while len(durations) < 20 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start)
    return float(np.median(durations)) * 1e6


def compare(
    ways: dict[str, tuple[gru_jax.GRUParams, Way]],
    head: torch.nn.Linear,
    x: np.ndarray,
    quick: bool,
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Runs all ways on the same recordings; returns the figures and the predictions."""
    weight, bias = (p.detach().numpy() for p in (head.weight, head.bias))
    rows, predictions, reference = [], {}, None
    for name, (params, way) in ways.items():
        y = way.run(x)
        reference = y if reference is None else reference
        predictions[name] = y @ weight.T + bias
        loss = float(np.mean((predictions[name][:, :-1] - x[:, 1:]) ** 2))
        difference = float(np.abs(y - reference).max())
        duration = microseconds(way.step, 0.02 if quick else 0.5)
        count = gru_jax.num_learnables(params)
        rows.append(Row(name, count, difference, loss, way.kilobytes, duration))
    return rows, predictions


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table."""
    table = Table(title="One GRU, in four places and two sizes")
    for column in ("", "learnables", "differs from PyTorch by", "loss", "kB", "µs a step"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        size = "" if row.kilobytes is None else f"{row.kilobytes:.0f}"
        figures = f"{row.difference:.1e}", f"{row.loss:.5f}", size, f"{row.microseconds:.1f}"
        table.add_row(row.name, f"{row.learnables:,}", *figures)
    console.print(table)


def picture(
    rows: Sequence[Row], predictions: dict[str, np.ndarray], x: np.ndarray, file: pathlib.Path
) -> None:
    """Draws a recording with the predictions of two ways, and the figures of all."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
    left.plot(x[0, 1:, 0], ".", color="#bbbbbb", label="recording")
    styles = {"PyTorch": ("#4477aa", "-", 2.5), rows[-1].name: ("#ee6677", "--", 1.4)}
    for name, (color, line, width) in styles.items():
        left.plot(predictions[name][0, :-1, 0], line, color=color, lw=width, label=name)
    left.set(title="the next sample, predicted", xlabel="step")
    left.legend(frameon=False)
    names = [row.name for row in rows]
    colors = ["#ee6677" if "projected" in name else "#4477aa" for name in names]
    for axes, values, title, digits in (
        (middle, [row.kilobytes or 0.0 for row in rows], "kB to ship", 0),
        (right, [row.microseconds for row in rows], "µs a step", 1),
    ):
        bars = axes.barh(names, values, color=colors)
        axes.bar_label(bars, [f"{v:.{digits}f}" if v else "" for v in values], padding=3)
        axes.set(title=title, xlim=(0, 1.25 * max(values)))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    right.set_yticklabels([])
    figure.savefig(file, dpi=130)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Trains, converts, compresses, exports and compares; returns the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="hardly train")
    parser.add_argument("--output", type=pathlib.Path, help="the picture")
    options = parser.parse_args(arguments)
    torch_gru, head = train_torch(20 if options.quick else 600)

    params = convert.from_torch(torch_gru.state_dict())
    pca = projection.neuron_pca(params, [oscillations(-seed % 997, 32, 80) for seed in (1, 2, 3)])
    small, info = projection.project(params, pca, learnables_reduction_goal=GOAL)
    small = jax.tree.map(np.asarray, small)

    x = oscillations(10_000, 16, 120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        ways = {"PyTorch": (params, in_torch(torch_gru))}
        for suffix, gru in (("", params), (", projected", small)):
            ways[f"gru_jax{suffix}"] = gru, in_jax(gru)
            ways[f"ONNX Runtime{suffix}"] = gru, in_onnx(gru)
            if shutil.which("cc"):
                ways[f"C{suffix}"] = gru, in_c(gru, folder, "small" if suffix else "large")
        rows, predictions = compare(ways, head, x, options.quick)
    console = Console(width=100)
    show(rows, console)
    console.print(f"{info.learnables_reduction:.0%} fewer learnables; {params.reset_gate_mode}")
    if options.output or not options.quick:
        file = options.output or pathlib.Path(__file__).with_suffix(".png")
        picture(rows, predictions, x, file)
    return rows


if __name__ == "__main__":
    main()
