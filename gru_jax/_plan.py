"""Which projector sizes the layers of a model get, and what that comes to."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gru_jax import _arguments, _checks
from gru_jax._activity import NeuronPCA
from gru_jax._models import Path
from gru_jax._params import GRUParams, Sizes
from gru_jax._subspaces import (
    METHODS,
    SIDES,
    Side,
    count,
    expand,
    explained,
    fit,
    operations,
    project_to,
)  # fmt: skip

Fixed = dict[Side, int | None]


class LayerInfo(NamedTuple):
    """What became of one layer; pairs are (before, after)."""

    name: str
    sizes: tuple[Sizes, Sizes]
    learnables: tuple[int, int]
    operations: tuple[int, int]  # multiplications and additions of one step's matrix products
    input_explained_variance: float  # the part inside the projector's subspace, 1 without one
    output_explained_variance: float
    kept_dense: tuple[str, ...]  # the projectors it has not: asked for, or it would have grown

    @property
    def explained_variance(self) -> float:
        """The smaller of the two."""
        return min(self.input_explained_variance, self.output_explained_variance)


class ProjectionInfo(NamedTuple):
    """The record of a projection."""

    learnables_reduction: float  # of the layer, or of the whole model: 1 − after / before
    explained_variance: float  # the smallest of all projectors
    layer_names: tuple[str, ...]  # of the layers that were projected
    learnables: tuple[int, int]  # before, after
    layers: tuple[LayerInfo, ...]


class Plan:
    """A projection of several layers at once, under common goals."""

    def __init__(
        self, layers: Mapping[Path, tuple[GRUParams, NeuronPCA]], learnables: int, method: str
    ) -> None:
        if not layers:
            raise ValueError("pca must hold the analysis of at least one layer, got none.")
        self.dense = {path: params for path, (params, _) in layers.items()}
        self.pcas = {path: pca for path, (_, pca) in layers.items()}
        self.before = {
            path: _checked(path, params, self.pcas[path]) for path, params in self.dense.items()
        }
        self.learnables = learnables
        self.others = learnables - sum(map(count, self.before.values()))
        self.method = _checks.choice("method", method, METHODS)

    def sizes(
        self, variance: Any, reduction: Any, options: Mapping[str, Any], loss: Callable | None
    ) -> dict[Path, Sizes]:
        """Chooses the sizes by one of the two goals."""
        fixed = _fixed(options, self.before)
        if variance is not None and reduction is not None:
            raise ValueError(
                "give explained_variance_goal or learnables_reduction_goal, not both of them."
            )
        if loss is not None and reduction is None:
            raise ValueError("loss chooses sizes under a learnables_reduction_goal: give one.")
        if reduction is None:
            goal = check_fraction("explained_variance_goal", 0.95 if variance is None else variance)
            return self._fit(goal, fixed)
        reduction = check_fraction("learnables_reduction_goal", reduction)
        if loss is not None:
            return self._by_loss(reduction, fixed, loss)
        return self._by_reduction(reduction, fixed)

    def carry_out(
        self, sizes: Mapping[Path, Sizes]
    ) -> tuple[dict[Path, GRUParams], ProjectionInfo]:
        """Returns the projected parameters and the record."""
        projected, layers = {}, []
        for path, after in sizes.items():
            small = project_to(self.dense[path], self.pcas[path], after, self.method)
            projected[path], before = small, self.before[path]
            dense = tuple(side.projector for side in SIDES if side.size(after) is None)
            layers.append(
                LayerInfo(
                    "/".join(path),
                    (before, after),
                    (count(before), count(after)),
                    (operations(before), operations(after)),
                    explained(small, self.pcas[path], SIDES[0]),
                    explained(small, self.pcas[path], SIDES[1]),
                    dense,
                )
            )
        changed = [layer for layer in layers if len(layer.kept_dense) < len(SIDES)]
        total = self.others + sum(layer.learnables[1] for layer in layers)
        info = ProjectionInfo(
            1.0 - total / self.learnables,
            min(layer.explained_variance for layer in layers),
            tuple(layer.name for layer in changed),
            (self.learnables, total),
            tuple(layers),
        )
        return projected, info

    def _fit(self, goal: float, fixed: Fixed) -> dict[Path, Sizes]:
        return {path: fit(self.before[path], pca, goal, fixed) for path, pca in self.pcas.items()}

    def _reduction(self, sizes: Mapping[Path, Sizes]) -> float:
        return 1.0 - (self.others + sum(map(count, sizes.values()))) / self.learnables

    def _by_reduction(self, reduction: float, fixed: Fixed) -> dict[Path, Sizes]:
        """The largest common goal of explained variance that saves enough."""
        curves = [
            side.moments(pca).explained_variance
            for pca in self.pcas.values()
            for side in SIDES
            if side not in fixed
        ]
        goals = np.unique(np.concatenate([[0.0], *curves]))
        low, high = 0, len(goals)  # the first goal saves the most
        while high - low > 1:
            middle = (low + high) // 2
            enough = self._reduction(self._fit(goals[middle], fixed)) >= reduction
            low, high = (middle, high) if enough else (low, middle)
        return self._enough(self._fit(goals[low], fixed), reduction)

    def _by_loss(self, reduction: float, fixed: Fixed, loss: Callable) -> dict[Path, Sizes]:
        """Of every input size, with the largest output size that saves enough, the best."""
        ((path, dense),) = self.dense.items()
        inputs, outputs = SIDES
        tried = []
        for size in _smaller(self.before[path], inputs, fixed):
            part = inputs.resize(self.before[path], size)
            options = [outputs.resize(part, k) for k in _smaller(part, outputs, fixed)]
            allowed = [sizes for sizes in options if self._reduction({path: sizes}) >= reduction]
            if allowed:
                small = project_to(dense, self.pcas[path], allowed[0], self.method)
                tried.append((_finite(loss(expand(small))), allowed[0]))
        if not tried:
            return self._enough(self._fit(0.0, fixed), reduction)
        return {path: min(tried, key=lambda pair: pair[0])[1]}

    def _enough(self, sizes: dict[Path, Sizes], reduction: float) -> dict[Path, Sizes]:
        reached = self._reduction(sizes)
        if reached < reduction:
            raise ValueError(
                f"learnables_reduction_goal = {reduction} cannot be reached: the smallest sizes "
                f"that are allowed here save {reached:.4f}."
            )
        return sizes


def _smaller(sizes: Sizes, side: Side, fixed: Fixed) -> list[int | None]:
    """The sizes that a projector may have: the given one, or none, or any that saves something."""
    if side in fixed:
        return [fixed[side]]
    most = side.most(sizes)
    saving = [k for k in range(most, 0, -1) if count(side.resize(sizes, k)) < count(sizes)]
    return [None, *saving]


def _finite(loss: Any) -> float:
    value = float(loss)
    if not np.isfinite(value):
        raise ValueError(f"loss must be finite, got {value}.")
    return value


def check_fraction(option: str, value: Any) -> float:
    """Returns a goal that lies between 0 and 1."""
    try:
        number = float("text" if isinstance(value, str | bool) else value)
    except (TypeError, ValueError):
        raise TypeError(f"{option} must be a number between 0 and 1, got {value!r}.") from None
    if not 0 < number < 1:
        raise ValueError(f"{option} must lie between 0 and 1, both excluded, got {value}.")
    return number


def _fixed(options: Mapping[str, Any], layers: Mapping[Path, Sizes]) -> Fixed:
    """The sizes that are given, by side."""
    fixed: Fixed = {}
    for side in SIDES:
        option, value = f"{side.projector}_size", options[side.projector]
        if isinstance(value, str) and value == "auto":
            continue
        fixed[side] = value = None if value is None else _checks.positive_int(option, value)
        for sizes in layers.values():
            if value is not None and value > side.most(sizes):
                raise ValueError(f"{option} must be at most {side.most(sizes)}, got {value}.")
    return fixed


def _checked(path: Path, params: GRUParams, pca: NeuronPCA) -> Sizes:
    """Returns the sizes of a layer that can be projected and that its analysis fits."""
    name = f"the layer at {'/'.join(path)!r}" if path else "params"
    _checks.made_by("neuron_pca", "pca", pca, NeuronPCA)
    sizes = _arguments.sizes_of(params)
    if any(side.size(sizes) for side in SIDES):
        raise ValueError(f"{name} must be dense, but has projectors: unproject it first.")
    found = (len(pca.inputs.mean), len(pca.states.mean), pca.reset_gate_mode)
    expected = (sizes.input_size, sizes.num_hidden_units, sizes.reset_gate_mode)
    if found != expected:
        raise ValueError(
            f"pca must be of the same GRU as {name}: input size, hidden units and reset mode are "
            f"{expected} there, but {found} in the analysis."
        )
    return sizes


def summary(info: ProjectionInfo) -> str:
    """Returns a table of the learnables and operations of each layer, before and after.

    Args:
      info: the record of a projection.

    Returns:
      Text of several lines. Operations are the multiplications and additions in the matrix
      products of one time step.

    Example:
      >>> import jax, gru_jax
      >>> from gru_jax import projection
      >>> params = gru_jax.init_params(jax.random.key(0), 100, 12)
      >>> pca = projection.neuron_pca(params, [jax.random.normal(jax.random.key(1), (32, 50, 12))])
      >>> _, info = projection.project(
      ...     params, pca, input_projector_size=9, output_projector_size=25)
      >>> print(projection.summary(info))
      layer  P_i  P_o      learnables  reduction      operations  variance
      GRU      9   25  33900 -> 13108      61.3%  67200 -> 25616     ...
    """
    _checks.made_by("project or project_model", "info", info, ProjectionInfo)
    head = ["layer", "P_i", "P_o", "learnables", "reduction", "operations", "variance"]
    rows = [head]
    for layer in info.layers:
        sizes = [str(side.size(layer.sizes[1]) or "dense") for side in SIDES]
        changes = [*_change(layer.learnables), _change(layer.operations)[0]]
        variance = f"{layer.explained_variance:.1%}"
        rows.append([layer.name or "GRU", *sizes, *changes, variance])
    if info.layers[0].learnables != info.learnables or len(info.layers) > 1:
        rows.append(["whole model", "", "", *_change(info.learnables), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    form = f"{{:<{first}}}" + "".join(f"  {{:>{width}}}" for width in others)
    return "\n".join(form.format(*row).rstrip() for row in rows)


def _change(pair: tuple[int, int]) -> tuple[str, str]:
    return f"{pair[0]} -> {pair[1]}", f"{1 - pair[1] / pair[0]:.1%}"
