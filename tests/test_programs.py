"""What XLA makes of the library on a CPU: kernels, products, temporaries and compilations.

Nothing here is timed, and nothing large runs: the programs are compiled from shapes alone and read.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from reference import MODES

import gru_jax

AFTER, BEFORE, RECURRENT_BIAS = MODES


# Reading a program

HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.\-]+)"
    r"|(?:branch|called)_computations=\{([^}]*)\}"
)
PRODUCTS = {"dot", "convolution"}
MOVES = {"copy", "transpose", "concatenate", "pad", "reverse", "gather"}
FREE = {  # instructions that launch nothing
    "parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all",
    "opt-barrier", "while", "call", "conditional",
}  # fmt: skip


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    dims: list  # of its result, or of each array of a tuple
    opcode: str
    operands: list
    called: list  # names of computations; of a while, its condition and its body
    rest: str


def instruction(line):
    """The instruction that a line of HLO states; None if it states none."""
    found = LINE.fullmatch(line)
    if not found:
        return None
    name, shape, opcode, rest = found.groups()
    dims = [[int(n) for n in d.split(",") if n] for d in re.findall(r"\w+\[([\d,]*)\]", shape)]
    called = [n for pair in CALLED.findall(rest) for n in re.findall(r"[\w.\-]+", " ".join(pair))]
    return Instruction(name, dims, opcode, re.findall(r"%([\w.\-]+)", rest), called, rest)


class Program:
    """The optimised HLO of one executable.

    `loops` names the bodies of its innermost loops in the order in which they run, `outer` the
    bodies of the loops around them.
    """

    def __init__(self, text, temporaries=0):
        self.temporaries = temporaries  # bytes
        self.computations, self.entry, lines = {}, None, []
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := HEAD.fullmatch(line):
                lines = self.computations[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif found := instruction(line):
                lines.append(found)
        self.loops, self.outer = [], []
        self._find_loops(self.entry)

    def __len__(self):
        return sum(map(len, self.computations.values()))

    def _find_loops(self, name):
        """Whether a computation contains loops; lists their bodies."""
        any_loop = False
        for i in self.computations[name]:
            around = any([self._find_loops(called) for called in i.called])
            if i.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", i.rest)[1]
                (self.outer if around else self.loops).append(body)
            any_loop |= i.opcode == "while" or around
        return any_loop

    def all_in(self, name, but=()):
        """Every instruction of a computation and of those it calls, except in those of `but`."""
        for i in self.computations[name]:
            yield i
            for called in i.called:
                if called not in but:
                    yield from self.all_in(called, but)

    def kernels(self, name, but=()):
        """The instructions of a computation that launch something over more than one number.

        Not what fusions and reductions call, but what loops, calls and branches do.
        """
        own = {i.name: i for i in self.computations[name]}
        for i in own.values():
            if i.opcode not in FREE:
                operands = [own[o] for o in i.operands if o in own]
                if any(math.prod(d) > 1 for j in (i, *operands) for d in j.dims):
                    yield i
            elif i.opcode in ("while", "call", "conditional"):
                for called in i.called:
                    if called not in but:
                        yield from self.kernels(called, but)

    def products(self, name, but=()):
        """How many matrix products a computation contains, also inside its fusions."""
        return sum(is_product(i) for i in self.all_in(name, but))

    def bulk_products(self):
        """How many products stand outside the innermost loops."""
        return self.products(self.entry, but=self.loops)

    def moves(self, kernels):
        """What kernels move without computing, the largest shape for each that does."""
        for kernel in kernels:
            inside = (i for called in kernel.called for i in self.all_in(called))
            moved = [i.dims[0] for i in (kernel, *inside) if i.opcode in MOVES]
            if moved:
                yield max(moved, key=math.prod)


def is_product(i):
    """Whether an instruction is a matrix product, or a call of a library that makes one."""
    library = i.opcode == "custom-call" and re.search("matmul|gemm|dot", i.rest, re.IGNORECASE)
    return i.opcode in PRODUCTS or bool(library)


def compiled(function, *arguments):
    """The program of a function for one CPU, arguments given as shapes.

    Level 0 halves the time. It is about what LLVM makes of kernels, after all that is read here.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        lowered = jax.jit(function).lower(*arguments)
        executable = lowered.compile({"xla_backend_optimization_level": 0})
    return Program(executable.as_text(), executable.memory_analysis().temp_size_in_bytes)


WRITTEN = """\
HloModule written, is_scheduled=true

%times (p: f32[4,8], q: f32[8,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  ROOT %d = f32[4,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%swap (p.1: f32[4,8]) -> f32[8,4] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  ROOT %t = f32[8,4]{1,0} transpose(%p.1), dimensions={1,0}
}

%one_more (p.2: s32[]) -> s32[] {
  %p.2 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %a = s32[] add(%p.2, %one)
}

%body (c: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %c = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %h = f32[4,8]{1,0} get-tuple-element(%c), index=1
  %m = f32[8,8]{1,0} get-tuple-element(%c), index=2
  %scalar = s32[] fusion(%i), kind=kLoop, calls=%one_more
  %first = f32[4,8]{1,0} fusion(%h, %m), kind=kCustom, calls=%times
  %second = f32[4,8]{1,0} dot(%first, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %third = f32[4,8]{1,0} custom-call(%second, %m), custom_call_target="__onednn$matmul"
  %kept = f32[4,8]{1,0} copy(%third)
  ROOT %r = (s32[], f32[4,8]{1,0}, /*index=2*/f32[8,8]{1,0}) tuple(%scalar, %kept, %m)
}

%until (c.1: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %c.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %n = s32[] constant(100)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (h.1: f32[4,8], m.1: f32[8,8]) -> f32[8,4] {
  %h.1 = f32[4,8]{1,0} parameter(0)
  %m.1 = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %in = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%zero, %h.1, %m.1)
  %w = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%in), condition=%until, body=%body
  %out = f32[4,8]{1,0} get-tuple-element(%w), index=1
  %bulk = f32[4,8]{1,0} dot(%out, %m.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %swapped = f32[8,4]{1,0} fusion(%bulk), kind=kLoop, calls=%swap
}
"""


def test_reader_on_a_written_program():
    program = Program(WRITTEN)
    assert len(program) == 3 + 2 + 3 + 10 + 4 + 8
    assert program.loops == ["body"]
    assert program.outer == []
    assert [k.name for k in program.kernels("body")] == ["first", "second", "third", "kept"]
    assert program.products("body") == 3
    outside = list(program.kernels("main", but=program.loops))
    assert [k.name for k in outside] == ["bulk", "swapped"]
    assert program.bulk_products() == 1
    assert list(program.moves(outside)) == [[8, 4]]
    assert list(program.moves(program.kernels("body"))) == [[4, 8]]


def test_reader_on_a_compiled_program():
    """Loops in a loop, with 2 products in the first, 3 in the second, and 1 + 1 around them."""

    def function(h, m):
        def times(i, h):
            return jnp.sin(h @ m)

        def first(i, h):
            return times(i, times(i, h))

        def second(i, h):
            return first(i, times(i, h))

        def outer(i, h):
            h = lax.fori_loop(0, 300, first, h)
            return lax.fori_loop(0, 300, second, times(i, h))

        return lax.fori_loop(0, 300, outer, times(0, h)).T

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 128), (128, 128)))
    program = compiled(function, *shapes)
    assert [program.products(loop) for loop in program.loops] == [2, 3]
    assert len(program.outer) == 1
    assert program.bulk_products() == 2
    # At least one kernel for each product; at most a sine and a copy more.
    counts = [len(list(program.kernels(loop))) for loop in program.loops]
    assert 2 <= counts[0] <= 6
    assert 3 <= counts[1] <= 9
    assert [128, 16] in program.moves(program.kernels(program.entry, but=program.loops))


# The programs of the library, and of what stands beside it


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def forward(B, T, I, H, mode=RECURRENT_BIAS, P=None, **options):  # noqa: E741
    """The program of the outputs, or of the last state with output_mode="last"."""

    def outputs(params, x):
        return gru_jax.gru(params, x, **options)[0]

    return compiled(outputs, params_of(I, H, mode, P), f32(B, T, I))


@functools.cache
def training(B, T, I, H, mode=RECURRENT_BIAS, P=None, argnums=(0, 1), **options):  # noqa: E741
    """The program of a loss and its gradient."""

    def loss(params, x, g):
        return jnp.sum(gru_jax.gru(params, x, **options)[0] * g)

    step = jax.value_and_grad(loss, argnums)
    return compiled(step, params_of(I, H, mode, P), f32(B, T, I), f32(B, T, H))


def params_of(I, H, mode, P):  # noqa: E741
    rows = 6 * H if mode == RECURRENT_BIAS else 3 * H
    Q = f32(H, P) if P else None
    return gru_jax.GRUParams(
        f32(3 * H, I), f32(3 * H, P or H), f32(rows), output_projector=Q, reset_gate_mode=mode
    )


@functools.cache
def plain_training(B, T, I, H):  # noqa: E741
    """The same of a scan as one writes it with care, its derivative left to JAX.

    The input products stand before the loop, as three arrays that it reads without slices.
    """

    def loss(params, x, g):
        W, R, b, b_n = params
        x = x.swapaxes(0, 1)
        parts = [x @ W[k].T + b[k][None, None] for k in range(3)]

        def body(h, parts):
            x_r, x_z, x_n = parts
            r, z, n = jnp.split(h @ R.T, 3, axis=-1)
            r, z = jax.nn.sigmoid(x_r + r), jax.nn.sigmoid(x_z + z)
            n = jnp.tanh(x_n + r * (n + b_n[None]))
            h = (1.0 - z) * n + z * h
            return h, h

        _, y = lax.scan(body, jnp.zeros((B, H), jnp.float32), parts)
        return jnp.sum(y.swapaxes(0, 1) * g)

    params = f32(3, H, I), f32(3 * H, H), f32(3, H), f32(H)
    step = jax.value_and_grad(loss, (0, 1))
    return compiled(step, params, f32(B, T, I), f32(B, T, H))


# Counts


class Most(NamedTuple):
    """Bounds for one size: what jax 0.10.2 and jax 0.12 both make of it, where no reason is given.

    The kernels of a step. Forward: the product, all of the equations, and the write of h_t. In
    training: a copy of h (it is read after h_t is there), the product, r, z, h̃, h_t, and six
    writes, of h_t and of five coefficients. Backward: a copy, the write of what enters the bulk
    products, what is multiplied, the product, the sum. A single row takes one more
    kernel in training, for R h + b, and one more with a large R, to give h to each of its halves.

    Whole sequences that are moved outside the loops: a single row is one block, so whole are the
    four cotangents that are turned for the weight gradients and the states shifted by a step.
    """

    forward: int
    training: int
    backward: int
    whole_moves: int
    temporaries: float  # of plain autodiff's; measured 0.43, 0.57, 0.38, 0.36, 0.39, 0.42, 0.46
    checkpointed: float  # with checkpoint=1; measured 0.47, 0.35, 0.12, 0.10, 0.12, 0.45, 0.21


SIZES = {  # B, T, I, H
    (1, 100, 64, 64): Most(3, 13, 5, 5, 0.8, 0.8),
    (32, 100, 64, 128): Most(3, 12, 5, 0, 0.8, 0.55),
    (64, 100, 128, 256): Most(3, 12, 5, 0, 0.5, 0.2),
    (128, 50, 256, 512): Most(3, 12, 5, 0, 0.5, 0.2),
    (32, 200, 512, 512): Most(3, 12, 5, 0, 0.5, 0.2),
    (1, 500, 256, 256): Most(4, 14, 5, 5, 0.7, 0.7),
    (256, 100, 32, 32): Most(3, 12, 5, 0, 0.6, 0.3),
}


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)), scope="module")
def size(request):
    """Groups the tests by size, so that who runs them in parts compiles little twice."""
    return request.param


def kernels(program):
    """How many per step, for each innermost loop."""
    return [len(list(program.kernels(loop))) for loop in program.loops]


def products(program):
    """How many per step, for each innermost loop."""
    return [program.products(loop) for loop in program.loops]


def whole_moves(program, B, T, I, H):  # noqa: E741
    """What is moved outside the loops that is as large as all inputs or all outputs."""

    def whole(dims):
        over_all = {B, T} <= set(dims) or any(d % (B * T) == 0 for d in dims)
        return over_all and math.prod(dims) >= B * T * min(I, H)

    return [
        dims for dims in program.moves(program.kernels(program.entry, program.loops)) if whole(dims)
    ]


def block_moves(program):
    """What is moved in the loops over blocks, once for each block."""
    inner = [*program.loops, *program.outer]
    return [dims for loop in program.outer for dims in program.moves(program.kernels(loop, inner))]


def test_forward_step(size):
    program, most = forward(*size), SIZES[size]
    assert products(program) == [1]
    assert kernels(program)[0] <= most.forward


def test_training_step(size):
    program, most = training(*size), SIZES[size]
    assert products(program) == [1, 1]
    ahead, back = kernels(program)
    assert ahead <= most.training
    assert back <= most.backward


def test_checkpointed_step(size):
    """The loop that keeps nothing is the forward one; the gates come back as bulk products."""
    program, most = training(*size, checkpoint=1), SIZES[size]
    assert products(program) == [1, 1]
    ahead, back = kernels(program)
    assert ahead <= most.forward
    assert back <= most.backward


def test_bulk_products(size):
    """Three times: inputs, weight gradients of both matrices, input gradients."""
    assert forward(*size).bulk_products() <= 3
    assert training(*size).bulk_products() <= 3 + 6 + 3
    # Again the inputs and the recurrent part.
    assert training(*size, checkpoint=1).bulk_products() <= 3 + 6 + 6 + 3


def test_moves_outside_the_steps(size):
    most = SIZES[size]
    assert whole_moves(forward(*size), *size) == []
    assert len(whole_moves(training(*size), *size)) <= most.whole_moves
    # A block shifts its states by a step, turns four cotangents for the weight gradients, and joins
    # those of three gates, for W, R and b, while it adds them up.
    assert len(block_moves(forward(*size))) == 0
    assert len(block_moves(training(*size))) <= 5 + 3
    # The guard would see what it guards against: plain autodiff turns all inputs and outputs.
    assert len(whole_moves(plain_training(*size), *size)) > most.whole_moves


def test_kernels_of_a_training_step(size):
    """No more than plain autodiff has: compiling takes its time for each, running in each step."""
    program, plain = training(*size), plain_training(*size)
    ours, theirs = (len(list(p.kernels(p.entry))) for p in (program, plain))
    assert ours <= theirs


@pytest.mark.parametrize("mode", [AFTER, BEFORE])
def test_steps_in_other_modes(mode):
    size, n = (32, 100, 64, 128), 2 if mode == BEFORE else 1
    ahead, trained = forward(*size, mode=mode), training(*size, mode=mode)
    assert products(ahead) == [n]
    assert products(trained) == [n, n]
    # For the second product: itself, and what it multiplies.
    extra = 2 * (n - 1)
    assert kernels(ahead)[0] <= 3 + extra
    assert kernels(trained)[0] <= 12 + extra
    assert kernels(trained)[1] <= 5 + extra


@pytest.mark.parametrize("mode", [RECURRENT_BIAS, BEFORE])
def test_steps_of_projected_layers(mode):
    """Every product with the recurrent weights needs one more, with the projector.

    On the way back what Q multiplies is written down, so dQ is one product more in bulk; another
    makes what R multiplies. Reset before, R_h̃ᵀ and Q come in bulk again.
    """
    size, n, extra = (32, 200, 512, 512), 1, 0
    if mode == BEFORE:
        n, extra = 2, 2
    ahead, trained = forward(*size, mode=mode, P=128), training(*size, mode=mode, P=128)
    assert products(ahead) == [2 * n]
    assert products(trained) == [2 * n, 2 * n]
    assert kernels(ahead)[0] <= 3 + extra + n
    assert kernels(trained)[0] <= 12 + extra + n
    assert kernels(trained)[1] <= 5 + extra + 2 * n
    assert trained.bulk_products() <= 3 + 6 + 3 + 2 * n + extra


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradients_not_asked_for_cost_nothing(wanted):
    size = (32, 100, 64, 128)
    all_products = training(*size).bulk_products()
    part = training(*size, argnums=wanted)
    assert part.bulk_products() <= all_products - 3
    assert products(part) == [1, 1]


# Temporaries


def test_temporaries_of_training(size):
    most, plain = SIZES[size], plain_training(*size).temporaries
    assert training(*size).temporaries <= most.temporaries * plain
    assert training(*size, checkpoint=1).temporaries <= most.checkpointed * plain


@pytest.mark.parametrize("output_mode", ["sequence", "last"])
def test_temporaries_forward_do_not_grow_with_time(output_mode):
    short, long = (
        forward(32, T, 512, 512, output_mode=output_mode).temporaries for T in (200, 800)
    )
    assert long <= 1.02 * short
    assert short < 4 * 32 * 200 * 512  # less than one sequence


# Compilations and their size


def test_program_does_not_grow_with_time():
    short, long = (len(training(32, T, 64, 128)) for T in (200, 2000))
    assert abs(long - short) <= 0.02 * short
    # Measured 1.07 with jax 0.10.2 and 1.09 with jax 0.12: a loop more than plain autodiff, over
    # the blocks of the backward pass.
    assert long <= 1.2 * len(plain_training(32, 2000, 64, 128))


@pytest.fixture
def compilations(caplog):
    """Returns how often anything was compiled while a function ran."""

    def count(function, *arguments):
        caplog.clear()
        with jax.log_compiles():
            jax.block_until_ready(function(*arguments))
        return sum(record.message.startswith("Compiling") for record in caplog.records)

    return count


def drawn(seed, B, T, I, H):  # noqa: E741
    """Parameters, inputs and cotangents with values."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = gru_jax.init_params(keys[0], H, I, reset_gate_mode=RECURRENT_BIAS, dtype=jnp.float32)
    x, g = (
        jax.random.normal(k, (B, T, n), jnp.float32) for k, n in zip(keys[1:], (I, H), strict=True)
    )
    return params, x, g


def loss(params, x, g):
    return jnp.sum(gru_jax.gru(params, x)[0] * g)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "jitted"])
def test_second_call_compiles_nothing(eager, compilations):
    first, second = drawn(0, 3, 7, 5, 4), drawn(1, 3, 7, 5, 4)
    outputs = gru_jax.gru if eager else jax.jit(lambda params, x: gru_jax.gru(params, x))
    assert compilations(outputs, *first[:2]) > 0
    assert compilations(outputs, *second[:2]) == 0
    step = jax.value_and_grad(loss, (0, 1))
    step = step if eager else jax.jit(step)
    assert compilations(step, *first) > 0
    assert compilations(step, *second) == 0
    assert compilations(step, *drawn(2, 3, 8, 5, 4)) > 0  # another length
