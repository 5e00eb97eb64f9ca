"""Cases computed by `torch.nn.GRU`: inputs, weights, outputs, states and every gradient.

`python tests/torch_cases.py` records them in `tests/data/torch_gru.npz`, so that the comparison
also runs where PyTorch is not installed; `test_torch.py` reads them and, where it can, computes
more of them.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "torch_gru.npz"
SIZES = {"batch": 3, "steps": 5, "channels": 3, "hidden": 4}
# num_layers, bidirectional, packed (sequences of different lengths), bias_hh
KINDS = {
    "plain": (1, False, False, True),
    "packed": (1, False, True, True),
    "no-recurrent-bias": (1, False, False, False),
    "bidirectional": (1, True, True, True),
    "two-layers": (2, False, False, True),
    "two-layers-bidirectional": (2, True, True, True),
}


def weight_shapes(layers, directions, channels, hidden):
    """Names and shapes of the weights, as `torch.nn.GRU` has them."""
    shapes = {}
    for layer in range(layers):
        for suffix in ("", "_reverse")[:directions]:
            n = channels if layer == 0 else directions * hidden
            shapes[f"weight_ih_l{layer}{suffix}"] = (3 * hidden, n)
            shapes[f"weight_hh_l{layer}{suffix}"] = (3 * hidden, hidden)
            shapes[f"bias_ih_l{layer}{suffix}"] = (3 * hidden,)
            shapes[f"bias_hh_l{layer}{suffix}"] = (3 * hidden,)
    return shapes


def inputs_of(kind, dtype, seed):
    """Random weights, x, h0, lengths, and the weights cy, ch of the functional."""
    layers, bidirectional, packed, bias_hh = KINDS[kind]
    batch, steps, channels, hidden = SIZES.values()
    directions = 2 if bidirectional else 1
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(layers, directions, channels, hidden)
    shapes |= {"x": (batch, steps, channels), "h0": (layers * directions, batch, hidden)}
    shapes |= {"cy": (batch, steps, directions * hidden), "ch": shapes["h0"]}
    case = {name: (0.6 * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}
    if not bias_hh:
        case["bias_hh_l0"][:] = 0
    if packed:
        case["lengths"] = np.array([3, 5, 1])[:batch]
    return case


def torch_case(kind, dtype, seed):
    """The inputs with torch's y, hidden and, as d<name>, the gradient of every input.

    The gradients are those of sum(cy * y) + sum(ch * hidden); y is batch-first, zero in padding.
    """
    import torch

    layers, bidirectional, packed, _ = KINDS[kind]
    case = inputs_of(kind, dtype, seed)
    tensors = {name: torch.tensor(array) for name, array in case.items()}
    layer = torch.nn.GRU(
        SIZES["channels"],
        SIZES["hidden"],
        layers,
        batch_first=True,
        bidirectional=bidirectional,
        dtype=getattr(torch, dtype),
    )
    layer.load_state_dict({name: tensors[name] for name in layer.state_dict()})
    x, h0 = (tensors[name].requires_grad_() for name in ("x", "h0"))
    if packed:
        pack = torch.nn.utils.rnn.pack_padded_sequence
        unpack = torch.nn.utils.rnn.pad_packed_sequence
        y, hidden = layer(pack(x, tensors["lengths"], True, enforce_sorted=False), h0)
        y, _ = unpack(y, batch_first=True, total_length=SIZES["steps"])
    else:
        y, hidden = layer(x, h0)
    (torch.sum(tensors["cy"] * y) + torch.sum(tensors["ch"] * hidden)).backward()
    leaves = {**dict(layer.named_parameters()), "x": x, "h0": h0}
    results = {f"d{name}": leaf.grad for name, leaf in leaves.items()} | {"y": y, "hidden": hidden}
    return case | {name: tensor.detach().numpy() for name, tensor in results.items()}


def record():
    """Writes every kind in both dtypes; keys are kind/dtype/name."""
    arrays = {
        f"{kind}/{dtype}/{name}": array
        for seed, kind in enumerate(KINDS)
        for dtype in ("float64", "float32")
        for name, array in torch_case(kind, dtype, seed).items()
    }
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)


def recorded():
    """{(kind, dtype): case} of the recorded file."""
    cases = {}
    with np.load(FILE) as file:
        for key in file.files:
            kind, dtype, name = key.split("/")
            cases.setdefault((kind, dtype), {})[name] = file[key]
    return cases


if __name__ == "__main__":
    record()
