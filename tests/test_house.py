"""House rules, read from the package's own syntax trees, signatures and docstrings."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import gru_jax
import gru_jax.linen
import gru_jax.nnx
from gru_jax import convert, export, optim, projection, ragged

PACKAGE = Path(gru_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = ("convert", "export")  # of one public module each, made of private files
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in FILES}
MODULES = ["gru_jax", *(m.name for m in pkgutil.walk_packages(gru_jax.__path__, "gru_jax."))]
FACES = ("linen", "nnx")
EXPORTS = {
    "gru_jax": {
        "CellOptions", "GRUParams", "LayerOptions", "formats", "gru", "gru_cell", "gru_parallel",
        "init_params", "num_learnables", "params_of",
    },
    "gru_jax.linen": {
        "BidirectionalGRULayer", "GRUCell", "GRULayer", "GRUProjectedLayer", "reset_state",
    },
    "gru_jax.nnx": {
        "BidirectionalGRULayer", "GRUCell", "GRULayer", "GRUProjectedLayer", "HiddenState",
    },
    "gru_jax.formats": {
        "channel_axis", "check", "from_core", "output_format", "to_core",
    },
    "gru_jax.optim": {
        "add_l2_regularization", "clip_by_l2_norm", "gate_factors", "l2_factors",
        "learn_rate_factors", "scale_by_learn_rate_factors", "sgdm", "training_solver",
    },
    "gru_jax.projection": {
        "LayerInfo", "NeuronPCA", "ProjectionInfo", "neuron_pca", "neuron_pca_of", "project",
        "project_dense", "project_model", "summary", "unproject", "unproject_model",
    },
    "gru_jax.ragged": {"buckets", "chunks", "pad"},
    "gru_jax.convert": {
        *(f"{way}_{other}" for way in ("from", "to") for other in (
            "equinox", "flax", "haiku", "keras", "matlab", "onnx", "safetensors", "torch",
        )),
        "OnnxGRU", "read_onnx",
    },
    "gru_jax.export": {
        "Program", "Support", "SupportTable", "c_weights", "codegen_support", "from_stablehlo",
        "model_to_onnx", "to_c", "to_onnx", "to_stablehlo",
    },
}  # fmt: skip
FLOORS = (  # imports point down; within a floor, to files named earlier
    ("_checks", "_activations", "_params", "_initializers", "formats", "_display", "_options"),
    ("_arguments", "_products", "_cell"),
    (
        "_linear", "_blocks", "_loop", "_gpu", "_gpu_forward", "_gpu_backward", "_derivative",
        "_recurrence", "_segments", "_affine", "_newton", "_trajectory", "_sequence", "_parallel",
    ),
    ("_watch", "_layer", "_params_of", "_pair"),
    ("linen", "nnx"),
    (
        "_models", "_factors", "_transforms", "optim", "ragged",
        "_moments", "_activity", "_subspaces", "_plan", "_surgery", "_compression",
        "projection",
    ),
    (
        "convert._arrays", "convert._choices", "convert._torch", "convert._keras", "convert._flax",
        "convert._haiku", "convert._equinox", "convert._files", "convert._safetensors",
        "convert._mat5", "convert._hdf5", "convert._mat", "convert._matlab",
        "convert._onnx_tensors", "convert._onnx_graph", "convert._onnx", "convert._onnx_nodes",
        "convert._onnx_reading",
    ),
    (
        "export._onnx", "export._graph", "export._onnx_elementwise", "export._onnx_indexing",
        "export._onnx_ops", "export._ports", "export._trace", "export._onnx_model",
        "export._program", "export._stablehlo", "export._c_weights", "export._c",
        "export._codegen_support",
    ),
)  # fmt: skip
FRAMEWORKS = {  # beside jax and numpy
    "linen": {"flax"},
    "nnx": {"flax"},
    "_models": {"flax"},
    "_surgery": {"flax"},
    "_transforms": {"optax"},
    "optim": {"optax"},
    "export._trace": {"flax"},
}
OTHERS = {  # imported only inside the function that needs them, or for types
    "convert._onnx_tensors": {"onnx"}, "convert._onnx_graph": {"onnx"}, "convert._onnx": {"onnx"},
    "convert._onnx_nodes": {"onnx"}, "export._onnx": {"onnx"}, "export._onnx_model": {"onnx"},
    "convert._hdf5": {"h5py"}, "convert._safetensors": {"safetensors"},
    "export._stablehlo": {"flatbuffers"},
}  # fmt: skip
ORDER = [name for floor in FLOORS for name in floor]


def imports(tree):
    """Dotted names of what a file imports, `from a import b` as a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_checks.package":
            names.append(ast.literal_eval(node.args[0]))
    return names


def own_imports(tree):
    """The files of the package that a file imports."""
    parts = [name.split(".") for name in imports(tree)]
    own = [p[1:] for p in parts if p[0] == "gru_jax" and len(p) > 1]
    return {".".join(p[: 1 + (p[0] in PACKAGES)]) for p in own}


def dotted(file):
    """The name of a file of the package as it stands in imports."""
    return file.removesuffix(".py").replace("/", ".")


def public_objects():
    """Every public function, class and method, with its dotted name."""
    for module_name, names in EXPORTS.items():
        module = importlib.import_module(module_name)
        for name in sorted(names):
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                continue
            yield f"{module_name}.{name}", thing
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    if inspect.isfunction(value) and method[0] != "_" and _written(value):
                        yield f"{module_name}.{name}.{method}", value


def _written(function):
    """Whether a function stands in a file of the package, not in a dataclass decorator."""
    return PACKAGE in Path(inspect.unwrap(function).__code__.co_filename).parents


OBJECTS = dict(public_objects())


# Size and shape


def test_number_and_length_of_files():
    assert len(FILES) <= 42 + 20 + 14  # beside the core: convert, export
    lengths = {str(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: n for name, n in lengths.items() if n > 265}


@pytest.mark.parametrize("module", EXPORTS)
def test_exports(module):
    found = importlib.import_module(module)
    defined = {
        name
        for name, value in vars(found).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith("gru_jax")
        and (
            module in ("gru_jax", value.__module__, value.__module__.rpartition(".")[0])
            or name in getattr(found, "__all__", ())
        )
    }
    assert defined == EXPORTS[module] - {"formats"}
    star = {name for name in vars(found) if not name.startswith("_")}
    assert set(getattr(found, "__all__", star)) == EXPORTS[module]
    if module == "gru_jax":
        assert all(name == "formats" or name in defined for name in found.__all__)
        assert found.formats is importlib.import_module("gru_jax.formats")
        assert found.__version__.split(".")[0].isdigit()


def test_typed():
    assert (PACKAGE / "py.typed").exists()


# Floors


def test_imports_point_down():
    trees = {dotted(file): tree for file, tree in TREES.items()}
    assert {*ORDER, "__init__", *(f"{package}.__init__" for package in PACKAGES)} == set(trees)
    for name in ORDER:
        above = own_imports(trees[name]) - set(ORDER[: ORDER.index(name)])
        assert not above, f"{name} imports {above} from above"
    above = [name for floor in FLOORS[FLOORS.index(FACES) + 1 :] for name in floor]
    for name in (*FACES, *above):  # layers are known by their options, never by a face
        assert not set(FACES) & own_imports(trees[name])


def test_the_core_knows_no_framework():
    allowed = {"jax", "numpy", "gru_jax"} | set(sys.stdlib_module_names)
    for file, tree in TREES.items():
        extra = FRAMEWORKS.get(dotted(file), set())
        others = OTHERS.get(dotted(file), set())
        roots = {imported.split(".")[0] for imported in imports(tree)}
        assert roots <= allowed | extra | others, file
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not others & {imported.split(".")[0] for imported in imports(top)}, file


def test_no_private_parts_of_others():
    for name, tree in TREES.items():
        for imported in imports(tree):
            parts = imported.split(".")
            own = parts[0] == "gru_jax"
            assert own or not any(p[0] == "_" for p in parts if p != "__future__"), (name, imported)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr != "_src", name


def test_import_loads_no_framework():
    code = (
        "import sys, gru_jax, gru_jax.convert; foreign = {'flax', 'optax', 'chex', 'onnx', 'h5py'};"
        "print(sorted(foreign & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout == "[]\n"


# The faces hold no mathematics


@pytest.mark.parametrize("face", FACES)
def test_faces_do_no_arithmetic(face):
    names = set()
    for node in ast.walk(TREES[f"{face}.py"]):
        assert not isinstance(node, ast.MatMult)
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names |= set(node.name.split(".")) | {node.asname}
    forbidden = {"dot", "tanh", "sigmoid", "lax", "matmul", "einsum", "tensordot", "scan"}
    assert not names & forbidden


def test_nothing_prints_and_nothing_is_random_by_itself():
    for name, tree in TREES.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [f for f in calls if isinstance(f, ast.Name) and f.id == "print"], name
        dotted = {ast.unparse(f) for f in calls}
        assert not {d for d in dotted if d.startswith(("np.random", "random."))}, name
        assert not {d for d in dotted if d.endswith(("random.key", "PRNGKey"))}, name


def test_random_keys_are_called_key():
    hosts = {"rng", "rngs"}  # of the hosts' own protocols, in the faces only
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                given = {argument.arg for argument in arguments}
                allowed = hosts if name in ("linen.py", "nnx.py") else set()
                assert not given & (hosts | {"seed", "prng", "rng_key", "prng_key"}) - allowed, name
    assert next(iter(inspect.signature(gru_jax.init_params).parameters)) == "key"


# Documentation


@pytest.mark.parametrize("name", OBJECTS)
def test_public_objects_are_documented(name):
    thing = OBJECTS[name]
    text = inspect.getdoc(thing)
    assert text, "no docstring"
    first = text.splitlines()[0]
    assert first.endswith((".", ":")), f"the first line is no sentence: {first}"
    if inspect.isclass(thing):
        assert "Example:" in text or name.endswith(("HiddenState", "Options", "Info"))
        if thing in (gru_jax.GRUParams, gru_jax.CellOptions):
            assert_names_all(text, inspect.signature(thing).parameters)
        return
    parameters = [p for p in inspect.signature(thing).parameters if p != "self"]
    method = inspect.isclass(OBJECTS.get(name.rpartition(".")[0]))
    short = method and len(parameters) <= 1 and "\n" not in text  # one line says it
    if not short and not name.endswith("initialize_carry"):  # of the hosts' protocol
        assert_names_all(text, parameters)
    if inspect.signature(thing).return_annotation not in (None, "None"):
        assert "Returns" in text
    if not inspect.isclass(thing) and name.count(".") == 1 + name.startswith("gru_jax.formats"):
        assert "Example:" in text


def assert_names_all(text, parameters):
    """Every parameter stands in the docstring's Args, or in its one line."""
    missing = [p for p in parameters if not re.search(rf"\b{p}:|`{p}`", text)]
    assert not missing, f"Args lack {missing}"


@pytest.mark.parametrize("face", FACES)
def test_calls_and_options_are_documented(face):
    module = importlib.import_module(f"gru_jax.{face}")
    text = inspect.getdoc(module.GRULayer.__call__)
    assert_names_all(text, list(inspect.signature(module.GRULayer.__call__).parameters)[1:])
    bases = [cls for cls in module.BidirectionalGRULayer.__mro__ + module.GRULayer.__mro__
             if cls.__module__.startswith("gru_jax")]  # fmt: skip
    text = "\n".join(inspect.getdoc(cls) for cls in bases)
    hosts = {"self", "parent", "name"}
    own = set(inspect.signature(module.BidirectionalGRULayer.__init__).parameters) - hosts
    assert_names_all(text, own)


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    module = importlib.import_module(module)
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        failed, tried = doctest.testmod(module, globs={}, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    package = hasattr(module, "__path__")  # whose examples stand in its files
    assert tried > 0 or module.__name__ not in EXPORTS or package


def own_parameters(cls):
    """The parameters of a constructor, without those that only one host has."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [
        p.replace(annotation=p.empty)
        for p in parameters
        if p.name not in ("self", "parent", "name", "rngs")
    ]


def test_layers_share_their_signatures():
    """The same argument has the same name, order and default in both faces."""
    for kind in ("GRULayer", "GRUProjectedLayer", "BidirectionalGRULayer", "GRUCell"):
        one, two = (
            own_parameters(getattr(importlib.import_module(f"gru_jax.{face}"), kind))
            for face in FACES
        )
        assert [str(p) for p in one] == [str(p) for p in two]
        positional = [p for p in one if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert len(positional) == {"GRUProjectedLayer": 3}.get(kind, 1)
    projected = list(inspect.signature(gru_jax.linen.GRUProjectedLayer).parameters)[:3]
    assert projected == ["num_hidden_units", "output_projector_size", "input_projector_size"]


CONTRACT = {
    gru_jax.gru_cell: "params h x * precision",
    gru_jax.gru: "params x h0 * output_mode lengths mask resets reverse unroll checkpoint "
    "precision implementation",
    gru_jax.gru_parallel: "params x h0 * jacobian tolerance max_iterations output_mode lengths "
    "mask resets reverse precision",
    gru_jax.GRUParams: "input_weights recurrent_weights bias input_projector output_projector * "
    "reset_gate_mode state_activation_function gate_activation_function",
    gru_jax.num_learnables: "params",
    gru_jax.params_of: "layer learnables",
    gru_jax.linen.GRULayer.__call__: "self x hidden * lengths mask resets",
    gru_jax.nnx.GRULayer.__call__: "self x hidden * lengths mask resets",
    gru_jax.nnx.GRULayer.reset_state: "self batch_shape",
    gru_jax.linen.reset_state: "variables",
    gru_jax.formats.output_format: "data_format output_mode",
    optim.gate_factors: "params * input_weights recurrent_weights bias input_projector "
    "output_projector",
    optim.learn_rate_factors: "model params inputs others",
    optim.l2_factors: "model params inputs others",
    optim.scale_by_learn_rate_factors: "factors",
    optim.add_l2_regularization: "l2 factors",
    optim.clip_by_l2_norm: "threshold",
    optim.sgdm: "learning_rate momentum",
    optim.training_solver: "solver model params inputs learning_rate l2_regularization "
    "gradient_threshold gradient_threshold_method learn_rate_factors l2_factors",
    projection.neuron_pca: "params batches * key h0 reverse",
    projection.project: "params pca explained_variance_goal learnables_reduction_goal * "
    "input_projector_size output_projector_size method loss",
    projection.unproject: "params",
    projection.project_dense: "kernel bias moments explained_variance_goal * projector_size",
    projection.neuron_pca_of: "model params batches * key call",
    projection.project_model: "model params pca explained_variance_goal "
    "learnables_reduction_goal * input_projector_size output_projector_size method",
    projection.unproject_model: "model params",
    projection.summary: "info",
    ragged.pad: "arrays side * length value",
    ragged.buckets: "lengths batch_size max_waste",
    ragged.chunks: "x length lengths",
    convert.from_torch: "state_dict * layer reverse prefix reset_gate_mode",
    convert.to_torch: "params * layer reverse prefix",
    convert.from_keras: "weights * reset_gate_mode state_activation_function "
    "gate_activation_function",
    convert.from_flax: "cell * reset_gate_mode state_activation_function gate_activation_function",
    convert.to_flax: "params * api fold_biases",
    convert.to_equinox: "params * fold_biases",
    convert.to_matlab: "params file * version",
    convert.to_safetensors: "params file * prefix",
    export.to_onnx: "params * reverse lengths name",
    export.model_to_onnx: "model params example * axes name",
    export.from_stablehlo: "data",
    export.to_c: "params * name dtype weights",
    export.codegen_support: "layer",
}


@pytest.mark.parametrize("function", CONTRACT, ids=lambda f: f.__qualname__)
def test_signatures_of_the_contract(function):
    names = []
    for parameter in inspect.signature(function).parameters.values():
        bare_star = "*" not in names and "inputs" not in names
        if parameter.kind is parameter.KEYWORD_ONLY and bare_star:
            names.append("*")
        names.append(parameter.name)
    assert " ".join(names) == CONTRACT[function]
