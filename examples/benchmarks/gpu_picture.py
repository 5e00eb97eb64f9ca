"""The picture of a GPU: µs per step over H, for each batch, forward pass and training step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from examples.benchmarks.contestants import OURS
from examples.benchmarks.gpu_contestants import NNX, PALLAS, TF32, TORCH
from examples.benchmarks.records import Record

COLORS = {
    PALLAS: "#aa3377",
    OURS: "#4477aa",
    "scan 8": "#66ccee",
    TORCH: "#ee6677",
    TF32: "#ccbb44",
    NNX: "#228833",
    "linen": "#bbbbbb",
}
STYLES: dict[str, tuple[Any, str]] = {
    "float32": ("-", "o"),
    "bfloat16": ("--", "s"),
    "float16": (":", "^"),
}
TITLES = {"forward": "forward pass", "training": "training step"}


def draw(records: Sequence[Record], path: Path, caption: str) -> bool:
    """Draws the longest sequences measured; returns whether there were any."""
    shown = [
        r
        for r in records
        if r.section in TITLES and r.contestant in COLORS and "us_per_step" in (r.details or {})
    ]
    if not shown:
        return False
    steps = max(r.size[1] for r in shown)
    shown = [r for r in shown if r.size[1] == steps]
    batches = sorted({r.size[0] for r in shown})
    figure = Figure(figsize=(2 + 3.1 * len(batches), 7.2), layout="constrained")
    panels = figure.subplots(2, len(batches), squeeze=False, sharex=True, sharey="row")
    for row, section in zip(panels, TITLES, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            own = [r for r in shown if r.section == section and r.size[0] == batch]
            _lines(axes, own)
            axes.set_title(f"{TITLES[section]}, B = {batch}", loc="left", fontsize=10)
        row[0].set_ylabel("µs per step")
    widths = sorted({r.size[3] for r in shown})
    for axes in panels[-1]:
        axes.set_xlabel("hidden units H")
        axes.xaxis.set_major_locator(FixedLocator(widths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda h, _: f"{h:g}"))
        axes.tick_params(axis="x", labelrotation=45)
    figure.legend(handles=_handles(shown), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"{caption}; I = H, T = {steps}", fontsize=11)
    figure.savefig(path, dpi=150)
    return True


def _lines(axes: Any, records: Sequence[Record]) -> None:
    """Draws one line for each contestant and dtype, with the quartiles as a band."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, dtype in dict.fromkeys((r.contestant, r.dtype) for r in records):
        own = [r for r in records if (r.contestant, r.dtype) == (name, dtype)]
        own.sort(key=lambda r: r.size[3])
        style, marker = STYLES[dtype]
        widths = [r.size[3] for r in own]
        scale = 1e6 / own[0].size[1]
        axes.plot(
            widths,
            [scale * (r.value or 0.0) for r in own],
            style,
            color=COLORS[name],
            marker=marker,
            markersize=3.5,
            linewidth=2.2 if name == PALLAS else 1.2,
            zorder=3 if name == PALLAS else 2,
        )
        low, high = zip(*(r.quartiles or (r.value, r.value) for r in own), strict=True)
        band = [[scale * v for v in side] for side in (low, high)]
        axes.fill_between(widths, *band, color=COLORS[name], alpha=0.15, linewidth=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(records: Sequence[Record]) -> list[Line2D]:
    """Returns the legend: a colour for each contestant, a stroke for each dtype."""
    names = [name for name in COLORS if any(r.contestant == name for r in records)]
    dtypes = [dtype for dtype in STYLES if any(r.dtype == dtype for r in records)]
    colors = [Line2D([], [], color=COLORS[name], label=name) for name in names]
    strokes = [
        Line2D([], [], color="#555555", linestyle=style, marker=marker, markersize=4, label=dtype)
        for dtype, (style, marker) in STYLES.items()
        if dtype in dtypes
    ]
    return [*colors, Line2D([], [], alpha=0, label=""), *strokes]
