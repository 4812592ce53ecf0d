"""dvc.yaml against the code: DVC does not follow imports, so the list of dependencies is checked here."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT

STAGES = {name: stage.get("do", stage) for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items()}

# Shared by all and without a say in any result: reading params, whole files, error sentences, resuming.
# A change there must not train everything again.
PLUMBING = {"stages", "stages.errors", "stages.files", "stages.params", "stages.training.resume"}


def path_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


def imports(module: str, seen: set[str]) -> set[str]:
    """The project's own modules that `module` imports, directly or through others."""
    path = path_of(module)
    if module in seen or module in PLUMBING or path is None:
        return seen
    seen.add(module)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("stages", "analysis"):
                imports(name, seen)
    return seen


@pytest.mark.parametrize("name", STAGES)
def test_every_module_that_shapes_a_result_is_a_dependency(name):
    module = STAGES[name]["cmd"].split()[2]
    listed = [ROOT / dependency for dependency in STAGES[name]["deps"]]
    for used in imports(module, set()):
        path = path_of(used)
        assert any(path == entry or entry in path.parents for entry in listed), f"{name} does not list {used}"


@pytest.mark.parametrize("name", STAGES)
def test_commands_are_run_as_modules_and_every_listed_file_exists(name):
    assert STAGES[name]["cmd"].replace("${launch}", "python").startswith("python -m ")
    for dependency in STAGES[name]["deps"]:
        if dependency.split("/")[0] in ("stages", "analysis"):
            assert (ROOT / dependency).exists()


def test_the_order_of_the_documented_flow():
    assert list(STAGES) == ["base", "data", "select", "train", "pick", "merge", "score", "evaluate", "probe", "report"]
