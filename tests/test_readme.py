"""The README tells the truth: its Python blocks run, its tables and lists fit the library."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from flax import nnx as flax_nnx

from gru_jax import linen, nnx

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PAGES = """
NumHiddenUnits OutputProjectorSize InputProjectorSize OutputMode HasStateInputs HasStateOutputs
ResetGateMode InputSize StateActivationFunction GateActivationFunction HiddenState
InputWeightsInitializer RecurrentWeightsInitializer InputProjectorInitializer
OutputProjectorInitializer BiasInitializer InputWeights RecurrentWeights Bias InputProjector
OutputProjector InputWeightsLearnRateFactor RecurrentWeightsLearnRateFactor BiasLearnRateFactor
InputProjectorLearnRateFactor OutputProjectorLearnRateFactor InputWeightsL2Factor
RecurrentWeightsL2Factor BiasL2Factor InputProjectorL2Factor OutputProjectorL2Factor Name NumInputs
InputNames NumOutputs OutputNames
"""
PROPERTIES = sorted(PAGES.split())
PORTS = ("num_inputs", "input_names", "num_outputs", "output_names")

# Runs all blocks in one namespace, under JAX's defaults, and reports what each printed.
RUNNER = """
import contextlib, io, json, sys
printed = []
for line, source in json.load(sys.stdin):
    code = compile("\\n" * line + source, "README.md", "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, globals())
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


class Block(NamedTuple):
    language: str
    source: str
    line: int
    shown: str  # what the README says that the block prints


class Row(NamedTuple):
    property: str
    argument: str
    default: str
    values: str


def _blocks():
    found = []
    matches = list(FENCE.finditer(README))
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        language, source = match.groups()
        shown = "".join(f"{text}\n" for text in re.findall(r"# -> (.*)$", source, re.MULTILINE))
        between = README[match.end() : following.start()] if following else ""
        if following and following[1] == "text" and not between.strip():
            shown += following[2]
        found.append(Block(language, source, README[: match.start(2)].count("\n"), shown))
    return found


def _rows():
    lines = re.findall(r"^\| `([A-Z]\w+)` \| `(\w+)` \| (.+?) \| (.+) \|$", README, re.MULTILINE)
    return [
        Row(name, argument, default.strip("`"), values) for name, argument, default, values in lines
    ]


BLOCKS, ROWS = _blocks(), _rows()


@pytest.mark.slow
def test_python_blocks_run_and_print_what_is_shown(tmp_path):
    blocks = [block for block in BLOCKS if block.language == "python"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTEST_"))}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps([(block.line, block.source) for block in blocks]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed == [block.shown for block in blocks]


def test_first_screen():
    first = next(block for block in BLOCKS if block.language == "python")
    above = README[: README.index(first.source)]
    assert 1 <= len(re.findall(r"^- ", above, re.MULTILINE)) <= 7
    assert 8 <= len([line for line in first.source.splitlines() if line]) <= 20
    assert first.shown


def test_two_commands_of_one_line_each():
    commands = [block.source for block in BLOCKS if block.language == "bash"]
    assert [len(command.splitlines()) for command in commands] == [1, 1]
    example, tests = commands
    assert example.rstrip().endswith("examples/japanese_vowels.py")
    assert tests.rstrip().endswith("pytest")
    for command, extra in ((example, "examples"), (tests, "test")):
        assert command.startswith("python3 -m venv .venv && ")
        assert f'pip install -q -e ".[{extra}]"' in command
        assert extra in _project()["optional-dependencies"]


def test_no_number_of_pyproject_is_repeated():
    project = _project()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w-]+", requirement)[0] for group in groups for requirement in group}
    for name in (*names, "python", project["name"]):
        assert not re.findall(rf"\b{name}[ `]*[>=≥~]*[ `]*\d+\.\d", README, re.IGNORECASE), name


def test_table_names_every_property_of_the_pages_once():
    assert sorted(row.property for row in ROWS) == PROPERTIES
    for row in ROWS:
        assert row.argument == re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", row.property).lower()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.argument)
def test_argument_exists_with_the_default_shown(row):
    if row.argument in PORTS:
        assert getattr(linen.GRULayer(3), row.argument) == ast.literal_eval(row.default)
        return
    for face in (linen, nnx):
        for layer in (face.GRULayer, face.GRUProjectedLayer):
            assert row.argument in {field.name for field in dataclasses.fields(layer)}
        fields = {field.name: field for field in dataclasses.fields(face.GRULayer)}
        default = fields[row.argument].default
        if row.default == "required":
            assert default is dataclasses.MISSING
        elif row.default == "none":
            assert default in ("", None)
        else:
            assert default == ast.literal_eval(row.default)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.argument)
def test_read_only_where_the_table_says_so(row):
    layer = nnx.GRULayer(3, input_size=2, rngs=flax_nnx.Rngs(0))
    value = getattr(layer, row.argument)
    if "read-only" in row.values:
        with pytest.raises(AttributeError, match=row.argument):
            setattr(layer, row.argument, value)
    else:
        setattr(layer, row.argument, value)


def test_other_arguments_exist():
    sentence = re.search(r"^Beyond the pages: (.*)$", README, re.MULTILINE)[1]
    fields = {field.name for field in dataclasses.fields(nnx.GRULayer)} | {"rngs"}
    for name in re.findall(r"`(\w+)`", sentence):
        assert name in fields


def test_layout_lists_every_module():
    layout = next(block.source for block in BLOCKS if block.source.startswith("gru_jax/"))
    listed = set(re.findall(r"\b\w+\.py\b", layout.split("examples/")[0]))
    assert listed == {path.name for path in (ROOT / "gru_jax").rglob("*.py")} - {"__init__.py"}


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
