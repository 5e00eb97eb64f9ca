"""What is printed and written: aligned tables, a Markdown table, JSON."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.benchmarks.contestants import JAX_PEERS, OURS, PLAIN, SPECIAL
from examples.benchmarks.problem import AFTER, BEFORE, RECURRENT_BIAS
from examples.benchmarks.records import Record

SHORT = {AFTER: "after", BEFORE: "before", RECURRENT_BIAS: "recurrent bias"}
PACKAGES = (
    "gru_jax", "jax", "jaxlib", "flax", "torch", "keras", "dm-haiku", "equinox", "onnx",
    "onnxruntime", "openvino", "numpy",
)  # fmt: skip
Cell = Callable[[Record], str]


def machine(device: str) -> dict[str, Any]:
    """Returns what the figures depend on: processor, GPU, system, versions."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": jax.devices()[0].device_kind if device == "gpu" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _cpu() -> str:
    """Returns the model name of the processor."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def file_name(device: str, about: dict[str, Any], quick: bool) -> str:
    """Returns the name of the file of the results."""
    name = (about["gpu"] or about["cpu"]).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return f"{device}-{slug}{'-quick' * quick}.json"


def as_json(head: dict[str, Any], records: Sequence[Record]) -> str:
    """Returns everything as JSON, one record per line."""
    text = json.dumps(head, indent=2, ensure_ascii=False)
    lines = [json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in records]
    return text[:-2] + ',\n  "records": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"


def table(title: str, records: Sequence[Record], cell: Cell) -> str:
    """Returns an aligned table: contestants down, sizes across."""
    columns = list(dict.fromkeys((tuple(r.size), r.variant) for r in records))
    rows = list(dict.fromkeys((r.contestant, r.mode) for r in records))
    if not rows:
        return ""
    found = {(r.contestant, r.mode, tuple(r.size), r.variant): r for r in records}
    lines = [["", *(",".join(map(str, size)) for size, _ in columns)]]
    if any(variant for _, variant in columns):
        lines.append(["", *(variant for _, variant in columns)])
    for row in rows:
        cells = [found.get((*row, *column)) for column in columns]
        texts = ["" if r is None else "failed" if r.value is None else cell(r) for r in cells]
        lines.append([f"{row[0]}, {SHORT[row[1]]}", *texts])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
        for first, *rest in lines
    ]
    return "\n".join(["", title, "", *texts])


def _seconds(unit: float, digits: int) -> Cell:
    """Returns how a time and its ratio are shown."""

    def cell(record: Record) -> str:
        ratio = "" if record.ratio is None else f"{record.ratio:5.2f}"
        return f"{(record.value or 0.0) * unit:.{digits}f} {ratio:>5}"

    return cell


def tables(records: Sequence[Record]) -> str:
    """Returns the tables of all sections that were measured."""

    def of(section: str) -> list[Record]:
        return [r for r in records if r.section == section]

    milliseconds = _seconds(1e3, 2)
    ratio = "ratio to gru_jax in the same mode"
    parts = []
    for section in ("forward", "training"):
        parts.append(table(f"{section}: ms, {ratio}", of(section), milliseconds))
        own = [r for r in of(section) if r.floor_fraction and r.contestant == OURS]
        title = f"{section}: fraction of the measured product rate"
        parts.append(table(title, own, lambda r: f"{r.floor_fraction or 0.0:.2f}"))
    by_variant: dict[str, list[Record]] = {}
    for record in of("streaming"):
        by_variant.setdefault(record.variant, []).append(record)
    for variant, found in by_variant.items():
        shown = [dataclasses.replace(r, variant="") for r in found]
        parts.append(table(f"streaming, {variant}: µs, {ratio}", shown, _seconds(1e6, 1)))
    parts.append(table(f"compile, training step: s, {ratio}", of("compile"), _seconds(1, 3)))
    parts.append(
        table(
            "memory, training step: MiB of temporaries, ratio to plain autodiff",
            of("memory"),
            lambda r: f"{(r.value or 0.0) / 2**20:.2f} {r.ratio_to_plain or np.nan:5.2f}",
        )
    )
    parts.append(table("modes: ms, ratio to dense", of("modes"), milliseconds))
    parts.append(
        table("accuracy: error against float64", of("accuracy"), lambda r: f"{r.value or 0.0:.0e}")
    )
    errors = [
        f"{r.section} {r.contestant} at {tuple(r.size)}: {r.error}" for r in records if r.error
    ]
    parts.append("\n".join(["", "failed:", "", *errors]) if errors else "")
    return "\n".join(filter(None, parts))


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the figures to be held against the aims: geometric means and largest ratios."""
    result: dict[str, Any] = {}
    for section in ("forward", "training"):
        best = [b for size in _sizes(records) if (b := best_jax(records, section, size))]
        if best:
            result[f"{section}: best JAX peer / gru_jax, geometric mean"] = _geometric_mean(best)
        before = _before_over_after([r for r in records if r.section == section], OURS)
        if before:
            result[f"{section}: before / after, per size"] = before
    special = {
        ",".join(map(str, size)): 1 / ratio
        for size in _sizes(records)
        if (ratio := _find(records, "training", size, SPECIAL, "ratio"))
    }
    if special:
        result["training: general rule / special rule, per size"] = special
    for kind in ("forward", "training"):
        found = [r for r in records if r.section == "modes" and r.variant == kind]
        for name in dict.fromkeys(r.contestant for r in found):
            before = _before_over_after(found, name)
            if before:
                result[f"modes, {kind}, {name}: before / after"] = before
    return result


def shown(value: float | dict[str, float]) -> str:
    """Returns a figure of the summary as text, or figures by size."""
    if isinstance(value, dict):
        return ", ".join(f"{number:.2f} at {size}" for size, number in value.items())
    return f"{value:.2f}"


def _before_over_after(records: Sequence[Record], name: str) -> dict[str, float]:
    """Returns the time of before-multiplication over that of after-multiplication, by size."""
    times = {(tuple(r.size), r.mode): r.value for r in records if r.contestant == name}
    sizes = dict.fromkeys(size for size, _ in times)
    pairs = {size: (times.get((size, BEFORE)), times.get((size, AFTER))) for size in sizes}
    return {",".join(map(str, s)): b / a for s, (b, a) in pairs.items() if a and b}


def _sizes(records: Sequence[Record]) -> list[tuple]:
    sections = ("forward", "training", "memory")
    return list(dict.fromkeys(tuple(r.size) for r in records if r.section in sections))


def best_jax(records: Sequence[Record], section: str, size: tuple) -> float | None:
    """Returns the least ratio of the JAX peers at one size."""
    ratios = [_find(records, section, size, name, "ratio") for name in JAX_PEERS]
    return min((r for r in ratios if r is not None), default=None)


def _find(
    records: Sequence[Record], section: str, size: tuple, name: str, field: str, mode: str = ""
) -> float | None:
    """Returns a field of the first record that fits."""
    for r in records:
        same = (r.section, tuple(r.size), r.contestant) == (section, size, name)
        if same and mode in ("", r.mode):
            return getattr(r, field)
    return None


def _geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def markdown(records: Sequence[Record]) -> str:
    """Returns the table of the README: each peer's time over the library's, and temporaries."""
    sizes, names = _sizes(records), ("torch", "linen", "nnx")
    if not sizes:
        return ""
    heads = [f"{section}: {', '.join(names)}, best JAX" for section in ("forward", "training")]
    heads += ["forward: ONNX Runtime, OpenVINO", "temporaries, with checkpoint=1"]
    lines = ["| B, T, I, H | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for size in sizes:
        cells = []
        for section in ("forward", "training"):
            ratios = [_find(records, section, size, name, "ratio") for name in names]
            cells.append([*ratios, best_jax(records, section, size)])
        others = ("onnxruntime", "openvino")
        cells.append([_find(records, "forward", size, name, "ratio") for name in others])
        own = (OURS, f"{OURS} checkpoint=1")
        cells.append(
            [_find(records, "memory", size, name, "ratio_to_plain", AFTER) for name in own]
        )
        texts = [", ".join("–" if r is None else f"{r:.2f}" for r in cell) for cell in cells]
        lines.append(f"| {', '.join(map(str, size))} | " + " | ".join(texts) + " |")
    note = f"\nTimes are the peer's over {OURS}'s in the same mode; temporaries {OURS}'s over "
    return "\n".join(["", *lines, note + f"{PLAIN}'s.", ""])
