"""Who is speaking? A GRU names the speaker of real recordings of Japanese vowels.

Nine men say the vowels /ae/; every recording is a sequence of 7 to 29 steps with 12 channels. The
network is sequence input -> GRU(100, the last output) -> dense(9) -> softmax: 34,809 learnables.

A run trains twice from the same initial values:

1. on two thirds of the training set, to see the accuracy on the held-out third, which holds the
   last ten recordings of each speaker: neighbouring recordings are alike, so a random third would
   be too easy;
2. on the whole training set, for the test set, which is used once, at the end.

Then the stateful layer hears the test recordings one step at a time, as a microphone would deliver
them, and must come to the same decisions.

The recordings of a speaker differ from each other mostly by a constant offset in every channel.
Training therefore shifts each recording by a random offset with the covariance of these
differences, anew in every epoch. It is the only regularisation.

    pip install "gru_jax[examples]"
    python examples/japanese_vowels.py                  # Flax linen
    python examples/japanese_vowels.py --face nnx       # the same figures from Flax nnx
    python examples/japanese_vowels.py --seeds 0-4      # the mean of five runs
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import gru_jax.linen
import gru_jax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gru_jax import ragged
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

CHANNELS, SPEAKERS = 12, 9
HELD_OUT = 10  # recordings of each speaker in the validation set
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
OFFSET_SCALE = 1.4

Params = dict[str, dict[str, jax.Array]]


# Data


class Recordings(NamedTuple):
    """Sequences of different lengths, and who speaks in each: 0 to 8."""

    sequences: list[np.ndarray]  # each (steps, 12), float32
    labels: np.ndarray  # (recordings,)

    def take(self, rows: np.ndarray) -> "Recordings":
        """Returns the recordings of these rows, or where a boolean array is True."""
        rows = np.arange(len(self.labels))[rows]
        return Recordings([self.sequences[row] for row in rows], self.labels[rows])

    def deviations(self) -> np.ndarray:
        """Returns the mean of each recording, less the mean of its speaker: (recordings, 12)."""
        means = np.stack([sequence.mean(axis=0) for sequence in self.sequences])
        speakers = {label: means[self.labels == label].mean(axis=0) for label in set(self.labels)}
        return means - np.stack([speakers[label] for label in self.labels])


class Padded(NamedTuple):
    """Recordings in one array, with their true lengths."""

    x: jax.Array  # (recordings, steps, 12)
    lengths: jax.Array  # (recordings,)
    labels: jax.Array  # (recordings,)


def load() -> tuple[Recordings, Recordings]:
    """Returns the training set and the test set, 270 and 370 recordings."""
    from aeon.datasets import load_japanese_vowels

    def read(part: str) -> Recordings:
        sequences, labels = load_japanese_vowels(split=part)
        steps_first = [np.asarray(sequence.T, np.float32) for sequence in sequences]
        return Recordings(steps_first, labels.astype(int) - 1)

    return read("train"), read("test")


def held_out(labels: np.ndarray) -> np.ndarray:
    """Returns a boolean array that is True at the last ten recordings of each speaker."""
    held = np.zeros(len(labels), bool)
    for label in set(labels):
        held[np.flatnonzero(labels == label)[-HELD_OUT:]] = True
    return held


def standardise(*sets: Recordings) -> list[Recordings]:
    """Scales all sets to mean 0 and deviation 1 in every channel of the first, the training set."""
    steps = np.concatenate(sets[0].sequences)
    mean, deviation = steps.mean(axis=0), steps.std(axis=0)
    return [
        Recordings([(sequence - mean) / deviation for sequence in part.sequences], part.labels)
        for part in sets
    ]


def pad(recordings: Recordings) -> Padded:
    """Pads the recordings to the longest of them."""
    x, lengths = ragged.pad(recordings.sequences)
    return Padded(jnp.asarray(x), jnp.asarray(lengths), jnp.asarray(recordings.labels))


# The network, once for each of the two Flax APIs


class Network(NamedTuple):
    """A network as two functions of its learnables."""

    predict: Callable[[Params, jax.Array, jax.Array], jax.Array]  # (params, x, lengths) -> logits
    stream: Callable[[Params, np.ndarray], jax.Array]  # (params, one sequence) -> logits


class LinenNetwork(nn.Module):
    """The network in Flax linen."""

    num_hidden_units: int
    stateful: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the nine speakers: (*batch, steps, 12) to (*batch, 9)."""
        gru = gru_jax.linen.GRULayer(
            self.num_hidden_units, output_mode="last", stateful=self.stateful, name="gru"
        )
        return nn.Dense(SPEAKERS, name="dense")(gru(x, lengths=lengths))


class NnxNetwork(nnx.Module):
    """The network in Flax nnx."""

    def __init__(self, num_hidden_units: int, *, stateful: bool = False, rngs: nnx.Rngs) -> None:
        self.gru = gru_jax.nnx.GRULayer(
            num_hidden_units,
            input_size=CHANNELS,
            output_mode="last",
            stateful=stateful,
            rngs=rngs,
        )
        self.dense = nnx.Linear(num_hidden_units, SPEAKERS, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the nine speakers: (*batch, steps, 12) to (*batch, 9)."""
        return self.dense(self.gru(x, lengths=lengths))


def linen_network(num_hidden_units: int) -> Network:
    """Returns the network in Flax linen, where the caller holds learnables and state."""
    model = LinenNetwork(num_hidden_units)
    online = LinenNetwork(num_hidden_units, stateful=True)

    def predict(params: Params, x: jax.Array, lengths: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, lengths)

    @jax.jit
    def step(params: Params, state: dict[str, Any], x: jax.Array) -> tuple[jax.Array, Any]:
        return online.apply({"params": params, **state}, x[None], mutable=["state"])

    def stream(params: Params, sequence: np.ndarray) -> jax.Array:
        logits, state = None, {}  # without a state the layer starts from zeros
        for x in sequence:
            logits, state = step(params, state, x)
        return logits

    return Network(predict, stream)


def nnx_network(num_hidden_units: int) -> Network:
    """Returns the network in Flax nnx, where the layers hold learnables and state."""
    graph = nnx.graphdef(NnxNetwork(num_hidden_units, rngs=nnx.Rngs(0)))
    online = NnxNetwork(num_hidden_units, stateful=True, rngs=nnx.Rngs(0))

    def predict(params: Params, x: jax.Array, lengths: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x, lengths)

    @nnx.jit
    def step(online: NnxNetwork, x: jax.Array) -> jax.Array:
        return online(x[None])

    def stream(params: Params, sequence: np.ndarray) -> jax.Array:
        nnx.update(online, params)
        online.gru.reset_state()
        logits = None
        for x in sequence:
            logits = step(online, x)
        return logits

    return Network(predict, stream)


NETWORKS = {"linen": linen_network, "nnx": nnx_network}


def init(key: jax.Array, num_hidden_units: int) -> Params:
    """Draws the initial values, which are the same for both APIs."""
    gru_key, dense_key = jax.random.split(key)
    kernel = jax.nn.initializers.glorot_uniform()(dense_key, (num_hidden_units, SPEAKERS))
    return {
        "gru": gru_jax.init_params(gru_key, num_hidden_units, CHANNELS).arrays(),
        "dense": {"kernel": kernel, "bias": jnp.zeros(SPEAKERS)},
    }


# Training


class Score(NamedTuple):
    """How well a network does on a set of recordings."""

    loss: float
    accuracy: float


def score(logits: jax.Array, labels: jax.Array) -> Score:
    """Returns mean cross entropy and accuracy."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return Score(loss, jnp.mean(logits.argmax(axis=-1) == labels))


@partial(jax.jit, static_argnums=0)
def evaluate(network: Network, params: Params, data: Padded) -> tuple[Score, jax.Array]:
    """Returns the score and the logits."""
    logits = network.predict(params, data.x, data.lengths)
    return score(logits, data.labels), logits


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with clipped gradients; its learning rate falls along half a cosine."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def random_offsets(key: jax.Array, deviations: jax.Array, count: int) -> jax.Array:
    """Draws offsets (count, 1, 12) with the covariance of the deviations, scaled."""
    weights = jax.random.normal(key, (count, len(deviations))) / len(deviations) ** 0.5
    return OFFSET_SCALE * (weights @ deviations)[:, None]


def batches_per_epoch(recordings: int) -> int:
    """Returns the number of whole batches."""
    return max(recordings // BATCH_SIZE, 1)


@partial(jax.jit, static_argnums=(0, 1))
def train_epoch(
    network: Network,
    steps: int,
    params: Params,
    optimizer_state: optax.OptState,
    data: Padded,
    deviations: jax.Array,
    key: jax.Array,
) -> tuple[Params, optax.OptState, Score]:
    """Takes one step for each batch, in random order; `steps` are those of the whole training."""
    optimizer = make_optimizer(steps)
    order_key, offset_key = jax.random.split(key)
    batches = batches_per_epoch(len(data.labels))
    order = jax.random.permutation(order_key, len(data.labels))[: batches * BATCH_SIZE]

    def step(carry: tuple, rows_and_key: tuple) -> tuple[tuple, Score]:
        params, optimizer_state = carry
        rows, key = rows_and_key
        x = data.x[rows] + random_offsets(key, deviations, len(rows))

        def loss(params: Params) -> tuple[jax.Array, Score]:
            result = score(network.predict(params, x, data.lengths[rows]), data.labels[rows])
            return result.loss, result

        gradients, result = jax.grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), result

    rows_and_keys = order.reshape(batches, -1), jax.random.split(offset_key, batches)
    carry, results = lax.scan(step, (params, optimizer_state), rows_and_keys)
    return *carry, jax.tree.map(jnp.mean, results)


def train(
    network: Network,
    params: Params,
    recordings: Recordings,
    key: jax.Array,
    epochs: int,
    after_epoch: Callable[[Params, Score], None],
) -> Params:
    """Trains on standardised recordings, and calls `after_epoch` with each epoch's score."""
    data, deviations = pad(recordings), jnp.asarray(recordings.deviations())
    steps = epochs * batches_per_epoch(len(data.labels))
    optimizer_state = make_optimizer(steps).init(params)
    for epoch_key in jax.random.split(key, epochs):
        params, optimizer_state, result = train_epoch(
            network, steps, params, optimizer_state, data, deviations, epoch_key
        )
        after_epoch(params, result)
    return params


# One run


class Run(NamedTuple):
    """What came out of one run."""

    params: Params
    curves: dict[str, list[Score]]  # "training" and "validation", one score for each epoch
    test: Score
    logits: np.ndarray  # of the test recordings, (370, 9)
    seconds: float


def run(
    network: Network,
    sets: tuple[Recordings, Recordings],
    num_hidden_units: int,
    epochs: int,
    seed: int,
    progress: Progress,
) -> Run:
    """Trains with a validation set, then on the whole training set, and tests."""
    start = time.perf_counter()
    init_key, train_key = jax.random.split(jax.random.key(seed))
    initial = init(init_key, num_hidden_units)
    training, test = sets
    curves: dict[str, list[Score]] = {"training": [], "validation": []}

    held = held_out(training.labels)
    part, validation = standardise(training.take(~held), training.take(held))
    validation = pad(validation)
    task = progress.add_task(f"seed {seed}: with validation", total=epochs, note="")

    def record(params: Params, result: Score) -> None:
        checked, _ = evaluate(network, params, validation)
        curves["training"].append(Score(*map(float, result)))
        curves["validation"].append(Score(*map(float, checked)))
        progress.update(task, advance=1, note=f"validation accuracy {checked.accuracy:.3f}")

    train(network, initial, part, train_key, epochs, record)

    whole, test = standardise(training, test)
    final_task = progress.add_task(f"seed {seed}: whole training set", total=epochs, note="")
    params = train(
        network, initial, whole, train_key, epochs,
        lambda _, result: progress.update(final_task, advance=1, note=f"loss {result.loss:.3f}"),
    )  # fmt: skip
    result, logits = evaluate(network, params, pad(test))
    progress.update(final_task, note=f"test accuracy {result.accuracy:.3f}")
    seconds = time.perf_counter() - start
    return Run(params, curves, Score(*map(float, result)), np.asarray(logits), seconds)


def stream(network: Network, params: Params, recordings: Recordings) -> np.ndarray:
    """Returns the logits at the end of each recording, heard one step at a time."""
    return np.stack([network.stream(params, sequence) for sequence in recordings.sequences])


def confusion(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Counts recordings by true speaker (rows) and predicted speaker (columns)."""
    counts = np.zeros((SPEAKERS, SPEAKERS), int)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def plot(result: Run, labels: np.ndarray, path: str) -> None:
    """Draws the curves of loss and accuracy, and the confusion matrix of the test set."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss_axes, accuracy_axes, matrix_axes = figure.subplots(1, 3)
    for (name, scores), color in zip(result.curves.items(), ("#4477aa", "#ee6677"), strict=True):
        epochs = range(1, len(scores) + 1)
        loss_axes.semilogy(epochs, [item.loss for item in scores], color=color, label=name)
        accuracy_axes.plot(epochs, [item.accuracy for item in scores], color=color, label=name)
    accuracy_axes.axhline(result.test.accuracy, color="#228833", linestyle="--", label="test")
    loss_axes.set(title="Cross entropy", xlabel="epoch")
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylim=(None, 1.005))
    for axes in (loss_axes, accuracy_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    counts = confusion(labels, result.logits.argmax(axis=-1))
    matrix_axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmax=1.1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if row == column else "#aa3322"
        if count:
            matrix_axes.text(column, row, count, ha="center", va="center", color=color, size=9)
    names = range(1, SPEAKERS + 1)
    matrix_axes.set(
        title=f"Test set: {np.trace(counts)} of {counts.sum()} correct",
        xlabel="predicted speaker",
        ylabel="true speaker",
        xticks=range(SPEAKERS),
        yticks=range(SPEAKERS),
        xticklabels=names,
        yticklabels=names,
    )
    matrix_axes.tick_params(length=0)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train a GRU on the Japanese Vowels recordings.")
    parser.add_argument("--face", choices=NETWORKS, default="linen", help="which Flax API")
    parser.add_argument("--hidden", type=int, default=100, help="number of hidden units")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", help="several runs, such as 0-4, instead of --seed")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it works")
    parser.add_argument("--output", default="japanese_vowels.png", help="where the figure goes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example and returns its figures."""
    options = parse(argv)
    first, _, last = (options.seeds or str(options.seed)).partition("-")
    seeds = range(int(first), int(last or first) + 1)
    epochs = 2 if options.quick else options.epochs
    training, test = load()
    network = NETWORKS[options.face](options.hidden)
    learnables = gru_jax.num_learnables(init(jax.random.key(0), options.hidden))

    console = Console()
    console.print(f"{len(training.labels)} training and {len(test.labels)} test recordings")
    console.print(f"network of Flax {options.face}: {learnables:,} learnables")
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        runs = [
            run(network, (training, test), options.hidden, epochs, seed, progress)
            for seed in seeds
        ]
    validation = [item.curves["validation"][-1].accuracy for item in runs]
    tested = [item.test.accuracy for item in runs]
    for seed, item in zip(seeds, runs, strict=True):
        console.print(
            f"seed {seed}: validation accuracy {item.curves['validation'][-1].accuracy:.4f}, "
            f"test accuracy {item.test.accuracy:.4f}, {item.seconds:.1f} s"
        )
    if len(runs) > 1:
        console.print(
            f"mean: validation accuracy {np.mean(validation):.4f}, "
            f"test accuracy {np.mean(tested):.4f}"
        )

    streamed = stream(network, runs[0].params, standardise(training, test)[1])
    alike = int(np.sum(streamed.argmax(axis=-1) == runs[0].logits.argmax(axis=-1)))
    difference = float(np.abs(streamed - runs[0].logits).max())
    console.print(
        f"one step at a time: {alike} of {len(test.labels)} predictions the same, "
        f"logits within {difference:.1e}"
    )
    plot(runs[0], test.labels, options.output)
    console.print(f"figure: {options.output}")
    return {
        "learnables": learnables,
        "validation_accuracy": validation,
        "test_accuracy": tested,
        "mean_test_accuracy": float(np.mean(tested)),
        "stream_agreement": alike / len(test.labels),
        "stream_difference": difference,
        "seconds": [item.seconds for item in runs],
        "confusion": confusion(test.labels, runs[0].logits.argmax(axis=-1)),
    }


if __name__ == "__main__":
    main()
