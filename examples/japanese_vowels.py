"""Who is speaking? A GRU names the speaker of real recordings of Japanese vowels.

Nine men say the vowels /ae/; every recording is a sequence of 7 to 29 steps with 12 channels. The
network is sequence input -> GRU(100, its last output) -> dense(9) -> softmax: 34,809 learnables.

A run trains twice from the same initial values:

1. on two thirds of the training set, to see the accuracy on the last third of each speaker's
   recordings: neighbouring recordings are alike, so a random third would be too easy;
2. on the whole training set, for the test set, which is used once, at the end.

Then the stateful layer hears the test recordings one step at a time, as a microphone would deliver
them, and must come to the same decisions.

Recordings of one speaker differ in the means of their channels. Training therefore shifts each
recording by a random offset with the covariance of these differences, drawn anew every time. There
is no other regularisation.

    pip install -e ".[examples]"
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
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn

import gru_jax.linen
import gru_jax.nnx
from gru_jax import ragged

CHANNELS, SPEAKERS = 12, 9
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
OFFSET_SCALE = 1.4

Params = dict[str, dict[str, jax.Array]]


# Data


class Recordings(NamedTuple):
    """Sequences of different lengths, and who speaks in each: 0 to 8."""

    sequences: list[np.ndarray]  # each (steps, 12), float32
    labels: np.ndarray  # (recordings,)


class Padded(NamedTuple):
    """Recordings in one array, 0 after the end of each."""

    x: jax.Array  # (recordings, steps, 12)
    lengths: jax.Array  # (recordings,)
    labels: jax.Array  # (recordings,)


def load() -> tuple[Recordings, Recordings]:
    """Returns the training set and the test set, 270 and 370 recordings."""
    from aeon.datasets import load_japanese_vowels

    def read(part: str) -> Recordings:
        sequences, labels = load_japanese_vowels(split=part)[:2]
        steps_first = [np.asarray(sequence.T, np.float32) for sequence in sequences]
        return Recordings(steps_first, labels.astype(int) - 1)

    return read("train"), read("test")


def hold_out(recordings: Recordings) -> tuple[Recordings, Recordings]:
    """Splits off the last third of each speaker's recordings, for validation."""
    sequences, labels = recordings
    held = np.zeros(len(labels), bool)
    for speaker in range(SPEAKERS):
        rows = np.flatnonzero(labels == speaker)
        held[rows[len(rows) - len(rows) // 3 :]] = True
    parts = np.flatnonzero(~held), np.flatnonzero(held)
    kept, out = (Recordings([sequences[row] for row in part], labels[part]) for part in parts)
    return kept, out


def prepare(training: Recordings, other: Recordings) -> tuple[Padded, Padded]:
    """Scales both to mean 0 and deviation 1 in every channel of the training set, and pads them."""
    steps = np.concatenate(training.sequences)
    mean, deviation = steps.mean(axis=0), steps.std(axis=0)

    def scale_and_pad(part: Recordings) -> Padded:
        x, lengths = ragged.pad((sequence - mean) / deviation for sequence in part.sequences)
        return Padded(jnp.asarray(x), jnp.asarray(lengths), jnp.asarray(part.labels))

    return scale_and_pad(training), scale_and_pad(other)


# The network, in either of the two Flax APIs


class Network(NamedTuple):
    """A network as two functions of its learnables, which return the logits of the speakers."""

    predict: Callable[[Params, jax.Array, jax.Array], jax.Array]  # (params, x, lengths)
    stream: Callable[[Params, np.ndarray], jax.Array]  # (params, one recording), step by step


class LinenNetwork(nn.Module):
    """The network in Flax linen."""

    num_hidden_units: int
    stateful: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Maps (*batch, steps, 12) to logits (*batch, 9)."""
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
        """Maps (*batch, steps, 12) to logits (*batch, 9)."""
        return self.dense(self.gru(x, lengths=lengths))


def linen_network(num_hidden_units: int) -> Network:
    """In linen, learnables and state are arguments and results of `apply`."""
    model = LinenNetwork(num_hidden_units)
    online = LinenNetwork(num_hidden_units, stateful=True)

    def predict(params: Params, x: jax.Array, lengths: jax.Array) -> Any:
        return model.apply({"params": params}, x, lengths)

    @jax.jit
    def step(params: Params, state: dict[str, Any], x: jax.Array) -> Any:
        return online.apply({"params": params, **state}, x[None], mutable=["state"])

    def stream(params: Params, recording: np.ndarray) -> Any:
        logits, state = None, {}  # no state yet: the layer starts from zeros
        for x in recording:
            logits, state = step(params, state, x)
        return logits

    return Network(predict, stream)


def nnx_network(num_hidden_units: int) -> Network:
    """In nnx, the layers hold learnables and state; `merge` and `update` put learnables in."""
    graph = nnx.graphdef(NnxNetwork(num_hidden_units, rngs=nnx.Rngs(0)))
    online = NnxNetwork(num_hidden_units, stateful=True, rngs=nnx.Rngs(0))

    def predict(params: Params, x: jax.Array, lengths: jax.Array) -> Any:
        return nnx.merge(graph, params)(x, lengths)

    @nnx.jit
    def step(online: NnxNetwork, x: jax.Array) -> jax.Array:
        return online(x[None])

    def stream(params: Params, recording: np.ndarray) -> Any:
        nnx.update(online, params)
        online.gru.reset_state()
        logits = None
        for x in recording:
            logits = step(online, x)
        return logits

    return Network(predict, stream)


NETWORKS = {"linen": linen_network, "nnx": nnx_network}


def init(key: jax.Array, num_hidden_units: int) -> Params:
    """Draws the initial values, the same for both APIs."""
    gru_key, dense_key = jax.random.split(key)
    glorot = jax.nn.initializers.glorot_uniform(dtype="float32")
    kernel = glorot(dense_key, (num_hidden_units, SPEAKERS))
    return {
        "gru": gru_jax.init_params(gru_key, num_hidden_units, CHANNELS).arrays(),
        "dense": {"kernel": kernel, "bias": jnp.zeros(SPEAKERS, "float32")},
    }


# Training


class Score(NamedTuple):
    """How well a network does on a set of recordings."""

    loss: Any  # mean cross entropy
    accuracy: Any


def score(logits: jax.Array, labels: jax.Array) -> Score:
    """Compares logits with the true labels."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return Score(loss, jnp.mean(logits.argmax(axis=-1) == labels))


@partial(jax.jit, static_argnums=0)
def evaluate(network: Network, params: Params, data: Padded) -> tuple[Score, jax.Array]:
    """Returns the score and the logits."""
    logits = network.predict(params, data.x, data.lengths)
    return score(logits, data.labels), logits


def count_batches(data: Padded) -> int:
    """Returns the number of whole batches in an epoch."""
    return max(len(data.labels) // BATCH_SIZE, 1)


class Rate(NamedTuple):
    """A learning rate that falls along half a cosine."""

    steps: int  # of all epochs
    highest: float = LEARNING_RATE


def make_optimizer(rate: Rate) -> optax.GradientTransformation:
    """Adam with clipped gradients."""
    schedule = optax.cosine_decay_schedule(rate.highest, rate.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def deviations(data: Padded) -> jax.Array:
    """Returns the mean of each recording less the mean of its speaker: (recordings, 12)."""
    means = data.x.sum(axis=1) / data.lengths[:, None].astype(data.x.dtype)
    member = jax.nn.one_hot(data.labels, SPEAKERS, dtype=data.x.dtype)
    speakers = member.T @ means / member.sum(axis=0).clip(1)[:, None]
    return means - member @ speakers


def random_offsets(key: jax.Array, deviations: jax.Array, count: int) -> jax.Array:
    """Draws offsets (count, 1, 12) with the covariance of the deviations, times 1.4²."""
    weights = jax.random.normal(key, (count, len(deviations)), deviations.dtype)
    return OFFSET_SCALE / len(deviations) ** 0.5 * (weights @ deviations)[:, None]


@partial(jax.jit, static_argnums=(0, 1))
def train_epoch(
    network: Network,
    rate: Rate,
    params: Params,
    optimizer_state: optax.OptState,
    data: Padded,
    key: jax.Array,
) -> tuple[Params, optax.OptState, Score]:
    """Takes one step for each batch, in random order."""
    optimizer, differences = make_optimizer(rate), deviations(data)
    order_key, offset_key = jax.random.split(key)
    batches = count_batches(data)
    order = jax.random.permutation(order_key, len(data.labels))[: batches * BATCH_SIZE]

    def step(carry: tuple, rows_and_key: tuple) -> tuple[tuple, Score]:
        params, optimizer_state = carry
        rows, key = rows_and_key
        x = data.x[rows] + random_offsets(key, differences, len(rows))

        def loss(params: Params) -> tuple[Any, Score]:
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
    data: Padded,
    key: jax.Array,
    epochs: int,
    after_epoch: Callable[[Params, Score], None] = lambda *_: None,
    learning_rate: float = LEARNING_RATE,
) -> Params:
    """Trains from `params` on, and calls `after_epoch` with each epoch's learnables and score."""
    rate = Rate(epochs * count_batches(data), learning_rate)
    optimizer_state = make_optimizer(rate).init(params)
    for epoch_key in jax.random.split(key, epochs):
        params, optimizer_state, result = train_epoch(
            network, rate, params, optimizer_state, data, epoch_key
        )
        after_epoch(params, result)
    return params


# The two trainings, the stream and the figure


class Run(NamedTuple):
    """What came out of one run."""

    params: Params
    curves: dict[str, list[Score]]  # one score for each epoch
    test: Score
    logits: np.ndarray  # of the test set, (370, 9)
    seconds: float


def run(
    network: Network,
    num_hidden_units: int,
    seed: int,
    epochs: int,
    with_validation: tuple[Padded, Padded],
    with_test: tuple[Padded, Padded],
    progress: Progress,
) -> Run:
    """Trains with a validation set, then from the same start on the whole set, and tests."""
    start = time.perf_counter()
    init_key, train_key = jax.random.split(jax.random.key(seed))
    initial = init(init_key, num_hidden_units)
    curves: dict[str, list[Score]] = {"training, shifted": [], "validation": []}
    part_task = progress.add_task(f"seed {seed}, two thirds", total=epochs, note="")

    def record(params: Params, result: Score) -> None:
        checked, _ = evaluate(network, params, with_validation[1])
        curves["training, shifted"].append(Score(*map(float, result)))
        curves["validation"].append(Score(*map(float, checked)))
        progress.update(part_task, advance=1, note=f"validation accuracy {checked.accuracy:.4f}")

    train(network, initial, with_validation[0], train_key, epochs, record)
    whole_task = progress.add_task(f"seed {seed}, all", total=epochs, note="")
    params = train(
        network, initial, with_test[0], train_key, epochs,
        lambda *_: progress.update(whole_task, advance=1),
    )  # fmt: skip
    test, logits = evaluate(network, params, with_test[1])
    progress.update(whole_task, note=f"test accuracy {test.accuracy:.4f}")
    seconds = time.perf_counter() - start
    return Run(params, curves, Score(*map(float, test)), np.asarray(logits), seconds)


def stream(network: Network, params: Params, data: Padded) -> np.ndarray:
    """Returns the logits at the end of each recording, heard one step at a time."""
    pairs = zip(np.asarray(data.x), np.asarray(data.lengths), strict=True)
    return np.stack([network.stream(params, x[:length]) for x, length in pairs])


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Counts recordings by true speaker (rows) and predicted speaker (columns)."""
    counts = np.zeros((SPEAKERS, SPEAKERS), int)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def plot(result: Run, counts: np.ndarray, path: str) -> None:
    """Draws the curves of loss and accuracy, and the confusion matrix of the test set."""
    figure = Figure(figsize=(13, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12))
    loss_axes, accuracy_axes, matrix_axes = figure.subplots(1, 3)
    for (name, scores), color in zip(result.curves.items(), ("#4477aa", "#ee6677"), strict=True):
        epochs = range(1, len(scores) + 1)
        loss_axes.semilogy(epochs, [item.loss for item in scores], color=color, label=name)
        accuracy_axes.plot(epochs, [item.accuracy for item in scores], color=color, label=name)
    accuracy_axes.axhline(
        result.test.accuracy, color="#228833", linestyle="--", label="test, trained on all"
    )
    loss_axes.set(title="Cross entropy", xlabel="epoch")
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylim=(None, 1.01))
    for axes in (loss_axes, accuracy_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    fractions = counts / counts.sum(axis=1, keepdims=True).clip(1)
    matrix_axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1.1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if fractions[row, column] > 0.5 else "#aa3322"
            matrix_axes.text(column, row, count, ha="center", va="center", color=color, size=9)
    matrix_axes.set(
        title=f"Test set: {np.trace(counts)} of {counts.sum()} correct",
        xlabel="predicted speaker",
        ylabel="true speaker",
        xticks=range(SPEAKERS),
        yticks=range(SPEAKERS),
        xticklabels=range(1, SPEAKERS + 1),
        yticklabels=range(1, SPEAKERS + 1),
    )
    matrix_axes.tick_params(length=0)
    figure.savefig(path, dpi=150)


def summarise(network: Network, runs: list[Run], test: Padded) -> dict[str, Any]:
    """Returns the mean accuracies, and how the first run's stream compares with its batch."""
    first = runs[0]
    predicted = first.logits.argmax(axis=-1)
    streamed = stream(network, first.params, test)
    return {
        "learnables": gru_jax.num_learnables(first.params),
        "validation_accuracy": float(np.mean([r.curves["validation"][-1].accuracy for r in runs])),
        "test_accuracy": float(np.mean([r.test.accuracy for r in runs])),
        "test_accuracies": [r.test.accuracy for r in runs],
        "seconds": [r.seconds for r in runs],
        "stream_agreement": float(np.mean(streamed.argmax(axis=-1) == predicted)),
        "stream_difference": float(np.abs(streamed - first.logits).max()),
        "confusion_matrix": confusion_matrix(np.asarray(test.labels), predicted),
    }


def seed_range(text: str) -> range:
    """Reads "3" or "0-4"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train a GRU on the Japanese Vowels recordings.")
    parser.add_argument("--face", choices=NETWORKS, default="linen", help="which Flax API")
    parser.add_argument("--hidden", type=int, default=100, help="number of hidden units")
    parser.add_argument("--epochs", type=int, default=80)
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=seed_range, dest="seeds", default="0")
    seeds.add_argument("--seeds", type=seed_range, help="several runs and their mean, such as 0-4")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that it works")
    parser.add_argument("--output", default="japanese_vowels.png", help="where the figure goes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example, prints its figures and returns them."""
    options, console = parse(argv), Console()
    training, test = (Recordings(*part) for part in load())
    with_validation, with_test = prepare(*hold_out(training)), prepare(training, test)
    network = NETWORKS[options.face](options.hidden)
    epochs = 2 if options.quick else options.epochs
    columns = "{task.description}", BarColumn(), TimeElapsedColumn(), "{task.fields[note]}"
    with Progress(*columns, console=console) as progress:
        runs = [
            run(network, options.hidden, seed, epochs, with_validation, with_test, progress)
            for seed in options.seeds
        ]
    results = summarise(network, runs, with_test[1])
    plot(runs[0], results["confusion_matrix"], options.output)

    console.print(f"learnables           {results['learnables']:,} (Flax {options.face})")
    console.print(f"validation accuracy  {results['validation_accuracy']:.4f}")
    console.print(f"test accuracy        {results['test_accuracy']:.4f}")
    console.print(f"seconds for a run    {np.mean(results['seconds']):.1f}")
    console.print(
        f"one step at a time   {results['stream_agreement']:.2%} of the predictions the same, "
        f"logits within {results['stream_difference']:.0e}"
    )
    console.print(f"figure               {options.output}")
    return results


if __name__ == "__main__":
    main()
