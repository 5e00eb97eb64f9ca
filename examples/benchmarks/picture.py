"""The bar chart: how much longer each peer takes, by size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.benchmarks.contestants import PEERS, PLAIN, SPECIAL
from examples.benchmarks.records import Record

COLORS = {
    "linen": "#4477aa",
    "nnx": "#66ccee",
    "equinox": "#228833",
    "haiku": "#aa3377",
    "keras": "#ccbb44",
    "torch": "#ee6677",
    "onnxruntime": "#ee8866",
    "openvino": "#332288",
}
TITLES = {
    "forward": "Forward pass (above the line gru_jax is faster)",
    "training": "Training step: loss and gradients of the weights and of x",
}


def draw(records: Sequence[Record], path: Path, caption: str) -> bool:
    """Draws the ratios of forward pass and training step; returns whether there were any."""
    sections = [
        (section, found)
        for section in ("forward", "training")
        if (found := [r for r in records if r.section == section and _is_shown(r)])
    ]
    if not sections:
        return False
    figure = Figure(figsize=(12, 0.7 + 3.4 * len(sections)), layout="constrained")
    panels = figure.subplots(len(sections), 1, squeeze=False)[:, 0]
    for axes, (section, found) in zip(panels, sections, strict=True):
        sizes = list(dict.fromkeys(tuple(r.size) for r in found))
        names = [name for name in PEERS if any(r.contestant == name for r in found)]
        width = 0.84 / len(names)
        for i, name in enumerate(names):
            own = [r for r in found if r.contestant == name]
            places = [sizes.index(tuple(r.size)) + (i - (len(names) - 1) / 2) * width for r in own]
            ratios = np.array([r.ratio for r in own])
            axes.bar(
                places,
                ratios - 1,
                0.9 * width,
                bottom=1,
                color=COLORS.get(name, "#888888"),
                label=name,
            )
        axes.axhline(1, color="black", linewidth=1)
        _logarithmic(axes, [r.ratio or 1.0 for r in found])
        axes.set_xticks(range(len(sizes)), [", ".join(map(str, size)) for size in sizes])
        axes.set(xlim=(-0.55, len(sizes) - 0.45), ylabel="time / time of gru_jax")
        axes.set_title(TITLES[section], loc="left", fontsize=11)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel(f"batch, time, inputs, hidden units        {caption}")
    handles = {}
    for axes in panels:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles),
        frameon=False, fontsize=9, handlelength=1.0, columnspacing=1.4,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    return True


def _is_shown(record: Record) -> bool:
    return bool(record.ratio) and record.contestant in set(PEERS) - {PLAIN, SPECIAL}


def _logarithmic(axes, ratios: Sequence[float]) -> None:
    """Makes the axis of ratios logarithmic, with ticks at plain numbers."""
    axes.set_yscale("log")
    low, high = min(0.8, *ratios) / 1.1, max(2.0, *ratios) * 1.1
    ticks = [t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
