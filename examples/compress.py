"""A trained GRU made smaller: how many learnables can go before it forgets who is speaking?

The network of `japanese_vowels.py` (GRU(100), 34,809 learnables) is trained, projected onto the
subspaces that its data really use, and fine-tuned. That is done for several goals, in four ways:

    pca            both projectors, sizes from one common goal of explained variance
    inputs dense   only the recurrent weights are projected
    sizes by loss  of all sizes that save enough, those with the smallest loss on the training set
    output         the sizes of pca, but the maps that change the output of the layer the least

Beside them stand smaller GRUs with as many learnables, trained from scratch for as many epochs in
all: is projecting better than shrinking? The fine-tuning (40 epochs of Adam, 1e-3) was chosen on
the validation split of `japanese_vowels.py`; the goals were fixed before.

    pip install -e ".[examples]"
    python examples/compress.py                # seeds 0-4, and a picture: about four minutes
    python examples/compress.py --quick        # two epochs each, to see that it works
"""

import argparse
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gru_jax
from gru_jax import projection
from japanese_vowels import (
    CHANNELS,
    SPEAKERS,
    LinenNetwork,
    Padded,
    Params,
    Recordings,
    deviations,
    evaluate,
    init,
    linen_network,
    load,
    prepare,
    random_offsets,
    seed_range,
    train,
)

FINE_TUNING_RATE = 1e-3
GOALS = (0.4, 0.597, 0.75, 0.83)  # parts of the learnables that go
WAYS: dict[str, dict[str, Any]] = {
    "pca": {},
    "inputs dense": {"input_projector_size": None},
    "sizes by loss": {},
    "output": {"method": "output"},
}
PAGES = {"input_projector_size": 9, "output_projector_size": 25}  # the example of MATLAB's page
COLORS = {
    "pca": "#4477aa",
    "inputs dense": "#228833",
    "sizes by loss": "#ccbb44",
    "output": "#aa3377",
    "smaller": "#888888",
}


class Trained(NamedTuple):
    """A network after training, with the analysis of what its GRU does on the training set."""

    params: Params
    accuracy: float
    pca: dict[tuple[str, ...], projection.NeuronPCA]
    key: jax.Array


class Compressed(NamedTuple):
    """What came out of one projection."""

    info: projection.ProjectionInfo
    unfolded: float  # accuracy right after projection, the mean not folded into the bias
    projected: float  # accuracy right after projection
    tuned: float  # accuracy after fine-tuning
    microseconds: float  # of one time step


class Setting(NamedTuple):
    """What all runs have in common."""

    num_hidden_units: int
    epochs: int
    tuning_epochs: int
    training: Padded
    test: Padded


network = functools.cache(linen_network)  # the same functions, so that nothing compiles twice


def train_dense(setting: Setting, num_hidden_units: int, seed: int, epochs: int) -> tuple:
    """Trains a network from scratch, as `japanese_vowels.py` does; returns it and a key."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, num_hidden_units)
    return train(network(num_hidden_units), params, setting.training, train_key, epochs), train_key


def accuracy(setting: Setting, params: Params) -> float:
    """Returns the accuracy on the test set; the layer computes with the leaves that it finds."""
    made = network(params["dense"]["kernel"].shape[0])
    return float(evaluate(made, params, setting.test)[0].accuracy)


def train_and_analyse(setting: Setting, seed: int) -> Trained:
    """Trains the large network and analyses its layers."""
    params, key = train_dense(setting, setting.num_hidden_units, seed, setting.epochs)
    batches = [(setting.training.x, setting.training.lengths)]
    model = LinenNetwork(setting.num_hidden_units)
    pca = projection.neuron_pca_of(model, params, batches, key=jax.random.fold_in(key, 1))
    return Trained(params, accuracy(setting, params), pca, key)


def sizes_by_loss(setting: Setting, trained: Trained, goal: float) -> dict[str, Any]:
    """Returns the projector sizes with the smallest loss on shifted training recordings."""
    data = setting.training
    offsets = random_offsets(jax.random.fold_in(trained.key, 3), deviations(data), len(data.labels))
    shifted = data._replace(x=data.x + offsets)
    leaves: dict[str, Any] = trained.params["gru"]
    gru, (pca,) = gru_jax.GRUParams(**leaves), trained.pca.values()

    def loss(dense: gru_jax.GRUParams) -> Any:
        params = trained.params | {"gru": dense.arrays()}
        return evaluate(network(setting.num_hidden_units), params, shifted)[0].loss

    whole, layer = map(gru_jax.num_learnables, (trained.params, gru))
    goal = min(goal * whole / layer, 0.99)
    _, info = projection.project(gru, pca, learnables_reduction_goal=goal, loss=loss)
    sizes = info.layers[0].sizes[1]
    return {name: getattr(sizes, name) for name in PAGES}


def compress(setting: Setting, trained: Trained, way: str, goal: float | None) -> Compressed:
    """Projects a trained network, to a goal or else to the pages' sizes, and fine-tunes it."""
    goals: dict[str, Any] = PAGES if goal is None else {"learnables_reduction_goal": goal}
    how = goals | WAYS[way]
    if way == "sizes by loss" and goal is not None:
        how = sizes_by_loss(setting, trained, goal)
    model = LinenNetwork(setting.num_hidden_units)
    _, params, info = projection.project_model(model, trained.params, trained.pca, **how)
    bias = trained.params["gru"]["bias"]
    unmended = {**params, "gru": {**params["gru"], "bias": bias}}
    tuned = train(
        network(setting.num_hidden_units),
        params,
        setting.training,
        jax.random.fold_in(trained.key, 2),
        setting.tuning_epochs,
        learning_rate=FINE_TUNING_RATE,
    )
    unfolded, projected, final = (accuracy(setting, p) for p in (unmended, params, tuned))
    return Compressed(info, unfolded, projected, final, step_time(params))


def units_for(learnables: int) -> int:
    """Returns the most hidden units of a dense network with at most so many learnables."""
    units = 1
    while 3 * (units + 1) * (CHANNELS + units + 2) + SPEAKERS * (units + 2) <= learnables:
        units += 1
    return units


def step_time(params: Params) -> float:
    """Returns the microseconds of one time step for a single sequence, the least of 20 runs."""
    leaves: dict[str, Any] = params["gru"]
    gru = gru_jax.GRUParams(**leaves)
    x, steps = jnp.ones((1000, CHANNELS)), []
    for _ in range(21):
        start = time.perf_counter()
        jax.block_until_ready(gru_jax.gru(gru, x, output_mode="last"))
        steps.append(time.perf_counter() - start)
    return 1e6 * min(steps[1:]) / len(x)


def mean_and_range(values: Sequence[float]) -> str:
    """Returns "mean (least-most)"."""
    return f"{np.mean(values):.4f} ({min(values):.3f}-{max(values):.3f})"


class Row(NamedTuple):
    """One line of the table: all seeds of one way and goal."""

    way: str
    goal: float | None
    runs: list[Compressed]


def sweep(setting: Setting, trained: list[Trained], goals: Sequence[float]) -> list[Row]:
    """Projects and fine-tunes all networks, for every way and goal and for the pages' sizes."""
    jobs: list[tuple[str, float | None]] = [("pca", None), ("output", None)]
    jobs += [(way, goal) for way in WAYS for goal in goals]
    return [
        Row(way, goal, [compress(setting, one, way, goal) for one in trained])
        for way, goal in track(jobs, "projecting and fine-tuning")
    ]


class Smaller(NamedTuple):
    """A dense network with fewer hidden units, trained from scratch with all seeds."""

    learnables: int
    accuracies: list[float]
    microseconds: float


def shrink(
    setting: Setting, seeds: Sequence[int], goals: Sequence[float], learnables: int
) -> list[Smaller]:
    """Trains smaller networks from scratch."""
    epochs, results = setting.epochs + setting.tuning_epochs, []
    for goal in track(goals, "training smaller networks"):
        units = units_for(round((1 - goal) * learnables))
        networks = [train_dense(setting, units, seed, epochs)[0] for seed in seeds]
        count = gru_jax.num_learnables(networks[0])
        accuracies = [accuracy(setting, params) for params in networks]
        results.append(Smaller(count, accuracies, step_time(networks[0])))
    return results


def _listed(sizes: list[int | None]) -> str:
    """Returns the size of all seeds, or the range."""
    numbers = sorted(size for size in sizes if size)
    texts = [str(n) for n in dict.fromkeys((*numbers[:1], *numbers[-1:]))]
    return "-".join(texts) + "/dense" * (len(numbers) < len(sizes)) if texts else "dense"


def tabulate(dense: list[Trained], rows: list[Row], smaller: list[Smaller]) -> Table:
    """Returns the table of all runs."""
    columns = "", "P_i, P_o", "learnables", "fewer", "µs a step", "projected", "fine-tuned"
    table = Table(*columns)
    count = gru_jax.num_learnables(dense[0].params)
    accuracies = mean_and_range([one.accuracy for one in dense])
    table.add_row("dense", "", f"{count:,}", "", f"{step_time(dense[0].params):.1f}", accuracies)
    for row in rows:
        sizes = [run.info.layers[0].sizes[1] for run in row.runs]
        table.add_row(
            row.way if row.goal else f"{row.way}, as the page",
            ", ".join(_listed([getattr(one, name) for one in sizes]) for name in PAGES),
            f"{np.mean([run.info.learnables[1] for run in row.runs]):,.0f}",
            f"{np.mean([run.info.learnables_reduction for run in row.runs]):.1%}",
            f"{np.mean([run.microseconds for run in row.runs]):.1f}",
            mean_and_range([run.projected for run in row.runs]),
            mean_and_range([run.tuned for run in row.runs]),
        )
    for one in smaller:
        fewer, steps = f"{1 - one.learnables / count:.1%}", f"{one.microseconds:.1f}"
        accuracies = mean_and_range(one.accuracies)
        table.add_row("smaller", "", f"{one.learnables:,}", fewer, steps, "", accuracies)
    return table


def plot(dense: list[Trained], rows: list[Row], smaller: list[Smaller], path: str) -> None:
    """Draws accuracy against learnables before and after fine-tuning, and the variance curves."""
    figure = Figure(figsize=(13, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12))
    before, after, curves = figure.subplots(1, 3)
    mean = np.mean([one.accuracy for one in dense])
    for axes, stage in ((before, "projected"), (after, "tuned")):
        for way in WAYS:
            picked = [row for row in rows if row.way == way and row.goal]
            counts = [np.mean([run.info.learnables[1] for run in row.runs]) for row in picked]
            means = [np.mean([getattr(run, stage) for run in row.runs]) for row in picked]
            axes.plot(counts, means, "o-", color=COLORS[way], label=way, markersize=5)
        axes.axhline(mean, color="black", linewidth=0.8, linestyle="--", label="before")
        axes.set(xlabel="learnables of the network", ylabel="test accuracy")
    counts = [one.learnables for one in smaller]
    after.plot(
        counts,
        [np.mean(one.accuracies) for one in smaller],
        "s-",
        color=COLORS["smaller"],
        label="smaller, from scratch",
    )
    before.set(title="Right after projection")
    after.set(title="After fine-tuning")
    pca = next(iter(dense[0].pca.values()))
    for name, moments, color in (
        ("inputs", pca.inputs, "#ee6677"),
        ("states", pca.states, "#4477aa"),
    ):
        curve = moments.explained_variance
        curves.plot(
            np.arange(1, len(curve) + 1), curve, "o-", color=color, markersize=3, label=name
        )
    curves.axhline(0.95, color="black", linewidth=0.8, linestyle="--")
    curves.set(title="Explained variance", xlabel="directions", xscale="log")
    for axes in (before, after, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compress a GRU by projection.")
    parser.add_argument("--hidden", type=int, default=100, help="number of hidden units")
    parser.add_argument("--epochs", type=int, default=80, help="of the training")
    parser.add_argument("--tuning-epochs", type=int, default=40, help="of the fine-tuning")
    parser.add_argument("--seeds", type=seed_range, default="0-4", help="one run for each")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it works")
    parser.add_argument("--output", default="compress.png", help="where the figure goes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example, prints its figures and returns them."""
    options, console = parse(argv), Console(width=120)
    epochs = (2, 2) if options.quick else (options.epochs, options.tuning_epochs)
    goals = GOALS[1:2] if options.quick else GOALS
    setting = Setting(options.hidden, *epochs, *prepare(*(Recordings(*part) for part in load())))
    seeds = track(options.seeds, "training")
    dense = [train_and_analyse(setting, seed) for seed in seeds]
    rows = sweep(setting, dense, goals)
    learnables = gru_jax.num_learnables(dense[0].params)
    smaller = shrink(setting, options.seeds, goals, learnables)
    console.print(tabulate(dense, rows, smaller))
    console.print(projection.summary(rows[0].runs[0].info))
    folded, unfolded = (
        np.mean([getattr(run, name) for row in rows for run in row.runs if row.way == "pca"])
        for name in ("projected", "unfolded")
    )
    console.print(
        f"pca, mean of all sizes right after projection: {folded:.4f}; with the bias as it was, "
        f"the mean not folded in: {unfolded:.4f}"
    )
    plot(dense, rows, smaller, options.output)
    console.print(f"figure: {options.output}")
    return {"dense": dense, "rows": rows, "smaller": smaller}


if __name__ == "__main__":
    main()
