"""What per-gate learn rates do: fine-tuning on new speakers without forgetting the old ones.

A GRU first learns to tell five speakers of the Japanese Vowels recordings apart, then, with a new
dense layer, the four others. The old dense layer stays as it was, so its accuracy on the old
speakers tells how much of the GRU's first job has survived. The second training is done once for
each choice of learn-rate factors (reset, update, candidate), from the same start, for all seeds:

    plain              1  1  1      every gate learns at the full rate
    slow               0.1 0.1 0.1  every gate learns at a tenth of it
    update only        0  1  0      reset gate and candidate are frozen, bit by bit
    candidate only     0  0  1      both gates are frozen
    frozen             0  0  0      the GRU stays as it is, only the new dense layer learns

    pip install -e ".[examples]"
    python examples/per_gate_training.py                # seeds 0-4
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.table import Table

from gru_jax import linen, optim, ragged
from japanese_vowels import CHANNELS, Recordings, load, seed_range

OLD, NEW = range(5), range(5, 9)  # speakers
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
GATES = ("reset", "update", "candidate")
FACTORS = {
    "plain": (1.0, 1.0, 1.0),
    "slow": (0.1, 0.1, 0.1),
    "candidate only": (0.0, 0.0, 1.0),
    "update only": (0.0, 1.0, 0.0),
    "frozen": (0.0, 0.0, 0.0),
}
COLORS = dict(zip(FACTORS, ("#ee6677", "#ccbb44", "#aa3377", "#228833", "#4477aa"), strict=True))

Params = dict[str, Any]


class Task(NamedTuple):
    """Padded recordings of some speakers, numbered from 0."""

    x: jax.Array  # (recordings, steps, 12)
    lengths: jax.Array  # (recordings,)
    labels: jax.Array  # (recordings,)


class Speakers(nn.Module):
    """GRU (its last output) and a dense layer; the three factors hold for all arrays of the GRU."""

    num_hidden_units: int
    num_speakers: int
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Maps (*batch, steps, 12) to logits (*batch, num_speakers)."""
        gru = linen.GRULayer(
            self.num_hidden_units,
            output_mode="last",
            input_weights_learn_rate_factor=self.factors,
            recurrent_weights_learn_rate_factor=self.factors,
            bias_learn_rate_factor=self.factors,
            name="gru",
        )
        return nn.Dense(self.num_speakers, name="dense")(gru(x, lengths=lengths))


def tasks(training: Recordings, other: Recordings, speakers: range) -> tuple[Task, Task]:
    """Returns both sets for some speakers; channels are scaled by the whole training set."""
    steps = np.concatenate(training.sequences)
    mean, deviation = steps.mean(axis=0), steps.std(axis=0)

    def task(part: Recordings) -> Task:
        rows = np.flatnonzero(np.isin(part.labels, speakers))
        x, lengths = ragged.pad((part.sequences[row] - mean) / deviation for row in rows)
        return Task(*map(jnp.asarray, (x, lengths, part.labels[rows] - speakers[0])))

    return task(training), task(other)


def predict(model: Speakers, params: Params, task: Task) -> Any:
    """Returns the logits of the speakers."""
    return model.apply({"params": params}, task.x, task.lengths)


def accuracy(model: Speakers, params: Params, task: Task) -> jax.Array:
    """Returns the part of the recordings whose speaker is recognised."""
    return jnp.mean(predict(model, params, task).argmax(axis=-1) == task.labels)


def make_solver(model: Speakers, params: Params, steps: int) -> optax.GradientTransformation:
    """Adam with the pages' L2 factor and clipping, and a rate that falls along half a cosine."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    example = jax.ShapeDtypeStruct((1, 1, CHANNELS), "float32")
    return optim.training_solver(
        "adam", model, params, example, learning_rate=schedule, gradient_threshold=1.0
    )


def train(
    model: Speakers, params: Params, task: Task, key: jax.Array, epochs: int, check: Callable
) -> tuple[Params, Any]:
    """Trains from `params` on; returns the learnables, and `check(params)` after each epoch."""
    batches = len(task.labels) // BATCH_SIZE
    solver = make_solver(model, params, epochs * batches)

    def loss(params: Params, batch: Task) -> jax.Array:
        logits = predict(model, params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def step(carry: tuple, rows: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        batch = Task(*(array[rows] for array in task))
        updates, state = solver.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: tuple, key: jax.Array) -> tuple[tuple, Any]:
        order = jax.random.permutation(key, len(task.labels))[: batches * BATCH_SIZE]
        carry, _ = lax.scan(step, carry, order.reshape(batches, BATCH_SIZE))
        return carry, check(carry[0])

    carry, checks = lax.scan(epoch, (params, solver.init(params)), jax.random.split(key, epochs))
    return carry[0], checks


class Tuned(NamedTuple):
    """What one choice of factors led to; the first axis is that of the seeds."""

    new: np.ndarray  # accuracy on the new speakers, (seeds, epochs)
    old: np.ndarray  # accuracy on the old speakers, (seeds, epochs)
    moved: np.ndarray  # how far each gate moved, relative to its size, (seeds, 3)


def movement(before: Params, after: Params) -> jax.Array:
    """Returns |after - before| / |before| of the rows of each gate, in all arrays of a GRU."""

    def blocks(tree: Params) -> jax.Array:
        return jnp.concatenate([leaf.reshape(3, -1) for leaf in tree.values()], axis=1)

    difference = jnp.linalg.norm(blocks(after) - blocks(before), axis=1)
    return difference / jnp.linalg.norm(blocks(before), axis=1)


def learn_old(
    model: Speakers, sets: tuple[Task, Task], keys: jax.Array, epochs: int
) -> tuple[Params, np.ndarray]:
    """Trains on the old speakers, one run for each key; returns learnables and accuracies."""
    task, test = sets

    def run(key: jax.Array) -> tuple[Params, jax.Array]:
        init_key, train_key = jax.random.split(key)
        params: Any = model.init(init_key, task.x[:1])["params"]
        return train(model, params, task, train_key, epochs, lambda p: accuracy(model, p, test))

    params, accuracies = jax.jit(jax.vmap(run))(keys)
    return params, np.asarray(accuracies)


def learn_new(
    model: Speakers,
    sets: tuple[Task, Task],
    old: tuple[Speakers, Params, Task],
    keys: jax.Array,
    epochs: int,
) -> Tuned:
    """Fine-tunes the GRU on the new speakers with a new dense layer, one run for each key."""
    (task, test), (old_model, old_params, old_test) = sets, old

    def run(key: jax.Array, old_params: Params) -> tuple[Any, jax.Array]:
        init_key, train_key = jax.random.split(jax.random.fold_in(key, 1))
        fresh = model.init(init_key, task.x[:1])["params"]

        def check(params: Params) -> tuple[jax.Array, jax.Array]:
            mixed = {"gru": params["gru"], "dense": old_params["dense"]}
            return accuracy(model, params, test), accuracy(old_model, mixed, old_test)

        start = {"gru": old_params["gru"], "dense": fresh["dense"]}
        params, checks = train(model, start, task, train_key, epochs, check)
        return checks, movement(old_params["gru"], params["gru"])

    (new, kept), moved = jax.jit(jax.vmap(run))(keys, old_params)
    return Tuned(*map(np.asarray, (new, kept, moved)))


def plot(before: float, results: dict[str, Tuned], path: str) -> None:
    """Draws accuracies against each other and over time, and how far the gates moved."""
    figure = Figure(figsize=(13, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12))
    plane, time, bars = figure.subplots(1, 3)
    for n, (name, result) in enumerate(results.items()):
        color, new, old = COLORS[name], result.new, result.old
        plane.scatter(old[:, -1], new[:, -1], s=14, color=color, alpha=0.45, linewidths=0)
        plane.scatter(old[:, -1].mean(), new[:, -1].mean(), s=70, color=color, label=name)
        epochs = range(1, old.shape[1] + 1)
        time.plot(epochs, old.mean(axis=0), color=color)
        time.fill_between(epochs, old.min(axis=0), old.max(axis=0), color=color, alpha=0.08, lw=0)
        bars.bar(np.arange(3) + 0.16 * (n - 2), result.moved.mean(axis=0), 0.16, color=color)
    time.axhline(before, color="black", linewidth=0.8, linestyle="--")
    time.text(1, before, "before", va="bottom", size=9)
    plane.set(
        title="What was learnt, and what was kept",
        xlabel="accuracy on the old speakers",
        ylabel="accuracy on the new speakers",
    )
    plane.legend(frameon=False, loc="lower left", title="large: mean, small: seeds")
    time.set(title="Old speakers, while learning the new", xlabel="epoch", ylabel="accuracy")
    bars.set(
        title="How far each gate moved",
        ylabel="change relative to its size",
        xticks=range(3),
        xticklabels=GATES,
    )
    for axes in (plane, time, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="y" if axes is bars else "both")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def tabulate(results: dict[str, Tuned]) -> Table:
    """Returns the mean accuracies after the last epoch, and the range over the seeds."""
    table = Table("", "factors of r, z, h̃", "new speakers", "old speakers")
    for name, result in results.items():
        cells = [
            f"{a.mean():.4f} ({a.min():.3f}–{a.max():.3f})"
            for a in (result.new[:, -1], result.old[:, -1])
        ]
        table.add_row(name, ", ".join(f"{f:g}" for f in FACTORS[name]), *cells)
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a GRU with learn rates for each gate.")
    parser.add_argument("--hidden", type=int, default=100, help="number of hidden units")
    parser.add_argument("--epochs", type=int, default=60, help="of each of the two trainings")
    parser.add_argument("--seeds", type=seed_range, default="0-4", help="one run for each")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it works")
    parser.add_argument("--output", default="per_gate_training.png", help="where the figure goes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example, prints its figures and returns them."""
    options, console = parse(argv), Console()
    epochs = 2 if options.quick else options.epochs
    training, test = (Recordings(*part) for part in load())
    old_sets, new_sets = (tasks(training, test, speakers) for speakers in (OLD, NEW))
    keys = jax.vmap(jax.random.key)(jnp.array(options.seeds))

    old_model = Speakers(options.hidden, len(OLD))
    old_params, before = learn_old(old_model, old_sets, keys, epochs)
    console.print(f"accuracy on the old speakers, before: {before[:, -1].mean():.4f}")
    old, results = (old_model, old_params, old_sets[1]), {}
    for name, factors in FACTORS.items():
        model = Speakers(options.hidden, len(NEW), factors)
        results[name] = learn_new(model, new_sets, old, keys, epochs)
    console.print(tabulate(results))
    plot(before[:, -1].mean(), results, options.output)
    console.print(f"figure: {options.output}")
    return {"before": before, **{name: result._asdict() for name, result in results.items()}}


if __name__ == "__main__":
    main()
