"""GRUs computed by Keras, Flax, Haiku, Equinox and PyTorch: weights, inputs and outputs.

`python tests/convert_cases.py` records them in `tests/data/convert_gru.npz`, so that the comparison
also runs where a framework is not installed; `test_convert.py` reads them and, where it can,
computes more of them. Each framework gets its weights in the layout that it has.
"""

import contextlib
import math
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")

FILE = Path(__file__).parent / "data" / "convert_gru.npz"
BATCH, STEPS, I, H = 3, 5, 3, 4  # noqa: E741

LINEN = {f"i{gate}": {"kernel": (I, H), "bias": (H,)} for gate in "rzn"}
LINEN |= {f"h{gate}": {"kernel": (H, H)} for gate in "rzn"}
LINEN["hn"] = {"kernel": (H, H), "bias": (H,)}
NNX = {"dense_i": {"kernel": (I, 3 * H), "bias": (3 * H,)}, "dense_h": {"kernel": (H, 3 * H)}}
TORCH = {"weight_ih": (3 * H, I), "weight_hh": (3 * H, H), "bias_ih": (3 * H,), "bias_hh": (3 * H,)}
SHAPES = {  # the trees of shapes that `from_<framework>` takes, by kind
    "keras": [(I, 3 * H), (H, 3 * H), (2, 3 * H)],
    "keras-before": [(I, 3 * H), (H, 3 * H), (3 * H,)],
    "keras-softsign": [(I, 3 * H), (H, 3 * H), (3 * H,)],
    "keras-no-bias": [(I, 3 * H), (H, 3 * H)],
    "linen": LINEN,
    "linen-hard": LINEN,
    "nnx": NNX,
    "nnx-softsign": NNX,
    "haiku": {"w_i": (I, 3 * H), "w_h": (H, 3 * H), "b": (3 * H,)},
    "equinox": {"weight_ih": (3 * H, I), "weight_hh": (3 * H, H), "bias": (3 * H,), "bias_n": (H,)},
    "torch": TORCH,
}
OPTIONS = {  # keywords of `from_<framework>`, where the arrays alone do not tell
    "keras-softsign": {"state_activation_function": "softsign"},
    "keras-no-bias": {"reset_gate_mode": "after-multiplication"},
    "linen-hard": {"gate_activation_function": "hard-sigmoid"},
    "nnx-softsign": {"state_activation_function": "softsign"},
    "torch": {"layer": None},
}
PACKAGE = {"linen": "flax", "nnx": "flax"}  # of a kind's first word, where it is another one


def is_shape(tree):
    """Whether a tree is one shape, a tuple of integers."""
    return isinstance(tree, tuple) and all(isinstance(n, int) for n in tree)


def inputs_of(kind, dtype, seed):
    """Random weights, x and h0."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: (0.6 * rng.normal(size=shape)).astype(dtype)  # noqa: E731
    weights = jax.tree.map(draw, SHAPES[kind], is_leaf=is_shape)
    return weights, draw((BATCH, STEPS, I)), draw((BATCH, H))


def keras_layer(kind, weights, tanh="tanh"):
    """A layer with these weights."""
    import keras

    layer = keras.layers.GRU(
        H,
        return_sequences=True,
        dtype=weights[0].dtype.name,
        use_bias=kind != "keras-no-bias",
        reset_after=kind in ("keras", "keras-no-bias"),
        activation="softsign" if kind == "keras-softsign" else tanh,
        recurrent_initializer="zeros",
    )
    layer.build((None, None, I))
    layer.set_weights(weights)
    return layer


def nnx_cell(kind, weights):
    """A cell with these weights."""
    from flax import nnx

    function = jax.nn.soft_sign if kind == "nnx-softsign" else jnp.tanh
    cell = nnx.GRUCell(I, H, activation_fn=function, rngs=nnx.Rngs(0))
    nnx.update(cell, jax.tree.map(jnp.asarray, weights))
    return cell


def equinox_cell(_, weights):
    """A cell with these weights."""
    import equinox as eqx

    arrays = {name: jnp.asarray(array) for name, array in weights.items()}
    cell = eqx.nn.GRUCell(I, H, key=jax.random.key(0))
    return eqx.tree_at(lambda c: [getattr(c, n) for n in arrays], cell, list(arrays.values()))


def torch_cell(_, weights):
    """A cell with these weights."""
    import torch

    cell = torch.nn.GRUCell(I, H, dtype=getattr(torch, weights["bias_ih"].dtype.name))
    cell.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    return cell


OBJECTS = {"keras": keras_layer, "nnx": nnx_cell, "equinox": equinox_cell, "torch": torch_cell}


def step_of(kind, weights):
    """The step (h, x) -> h of a framework's cell."""
    framework = kind.split("-")[0]
    if framework == "linen":
        from flax import linen

        hard = {"gate_fn": lambda x: jnp.clip(0.2 * x + 0.5, 0, 1)} if kind == "linen-hard" else {}
        cell = linen.GRUCell(H, **hard)
        return lambda h, x: cell.apply({"params": weights}, h, x)[0]
    if framework == "haiku":
        import haiku as hk

        gru = hk.without_apply_rng(hk.transform(lambda x, h: hk.GRU(H)(x, h)[0]))
        return lambda h, x: gru.apply({"gru": weights}, x, h)
    cell = OBJECTS[framework](kind, weights)
    if framework == "nnx":
        return lambda h, x: cell(h, x)[0]
    if framework == "equinox":
        return lambda h, x: jax.vmap(cell)(x, h)
    import torch

    return lambda h, x: cell(torch.tensor(x), torch.tensor(h)).detach().numpy()


def run(kind, weights, x, h0):
    """The states (batch, steps, H) that the framework computes."""
    if kind.startswith("keras"):
        layer = keras_layer(kind, weights, jnp.tanh)  # Keras's own rounds to float32
        return np.asarray(layer(x, initial_state=h0))
    step, states = step_of(kind, weights), [h0]
    for t in range(STEPS):
        states.append(np.asarray(step(states[-1], x[:, t])))
    return np.stack(states[1:], 1)


@contextlib.contextmanager
def climate(dtype):
    """What other frameworks need: implicit promotion, their own warnings, no float64 unasked."""
    with (
        jax.enable_x64(dtype == "float64"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def record():
    """Writes every kind in both dtypes, each as one vector under kind/dtype."""
    vectors = {}
    for seed, kind in enumerate(SHAPES):
        for dtype in ("float64", "float32"):
            weights, x, h0 = inputs_of(kind, dtype, seed)
            with climate(dtype):
                y = run(kind, weights, x, h0)
            assert y.dtype == dtype
            leaves = (*jax.tree.leaves(weights), x, h0, y)
            vectors[f"{kind}/{dtype}"] = np.concatenate([leaf.ravel() for leaf in leaves])
    np.savez_compressed(FILE, **vectors)


def recorded():
    """{(kind, dtype): (weights, x, h0, y)} of the recorded file."""
    cases = {}
    with np.load(FILE) as file:
        for key, vector in file.items():
            kind, dtype = key.split("/")
            tree = (SHAPES[kind], (BATCH, STEPS, I), (BATCH, H), (BATCH, STEPS, H))
            shapes, structure = jax.tree.flatten(tree, is_leaf=is_shape)
            ends = np.cumsum([math.prod(shape) for shape in shapes])
            assert ends[-1] == len(vector)
            parts = np.split(vector, ends[:-1])
            leaves = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
            cases[kind, dtype] = jax.tree.unflatten(structure, leaves)
    return cases


if __name__ == "__main__":
    record()
