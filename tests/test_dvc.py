"""dvc.yaml against the code: DVC does not follow imports, so the list of dependencies is checked here, both ways."""

import ast
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.methods import METHODS
from stages.records.sources import SOURCES
from tests.conftest import ROOT

CONTENT = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in CONTENT.items()}

# Without a say in any result: reading params.yaml and telling its mistakes, whole files, starting processes, a state to
# go on from.
PLUMBING = {"stages", "stages.errors", "stages.files", "stages.project", "stages.settings.section"}
PLUMBING |= {"stages.training.launch", "stages.training.resume"}

# Folders whose files are found by themselves, without an import.
FOUND = {"data": "stages/records/sources", "train": "stages/methods"}
FOUND |= dict.fromkeys(["merge", "measure", "rounding", "route"], "stages/merging/methods")

# Files that a stage copies, without an import.
COPIED = {"route": {ROOT / "stages/routing/example.py"}}

# Sections of params.yaml whose defaults shape a result: who reads the section depends on its file.
SECTIONS = {"base", "evaluate", "merge", "warn"}


def path_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


def is_plumbing(module: str) -> bool:
    return module in PLUMBING or any(module.startswith(f"{each}.") for each in PLUMBING if each.count("."))


class Imports(ast.NodeVisitor):
    """The project's own modules that a file imports, but for those that only the type checker needs."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node):
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        self.found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}


@cache
def imported(path: Path) -> set[str]:
    visitor = Imports()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in visitor.found if name.split(".")[0] in ("stages", "analysis", "tools") and path_of(name)}


def closure(module: str, seen: set[Path]) -> set[Path]:
    """Files that shape what a module computes: its own, and those that it imports, directly or through others."""
    path = path_of(module)
    if is_plumbing(module) or path is None or path in seen:
        return seen
    if path.name != "__init__.py":
        seen.add(path)
    for name in imported(path):
        closure(name, seen)
    return seen


def listed(stage: str) -> set[Path]:
    """Files of code among a stage's dependencies, those of its folders one by one."""
    paths = [ROOT / each for each in STAGES[stage]["deps"] if each.split("/")[0] in ("stages", "analysis")]
    return {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}


def module_of(stage: str) -> str:
    return STAGES[stage]["cmd"].split()[2]


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_that_shapes_a_result_is_a_dependency(stage):
    missing = closure(module_of(stage), set()) - listed(stage)
    assert not missing, f"{stage} does not list {sorted(map(str, missing))}"


@pytest.mark.parametrize("stage", STAGES)
def test_no_file_without_a_say_is_a_dependency(stage):
    sections = {
        ROOT / "stages" / "settings" / f"{section}.py" for section in {*SECTIONS, "selection", "stage", "router"}
    }
    used = closure(module_of(stage), set()) | sections | COPIED.get(stage, set())
    if stage in FOUND:
        used |= {file for path in (ROOT / FOUND[stage]).glob("*.py") for file in closure_of_file(path)}
    extra = {path for path in listed(stage) if "${" not in str(path) and path.name != "__init__.py"} - used
    assert not {path for path in extra if path.suffix == ".py"}, f"{stage} lists {sorted(map(str, extra))} for nothing"


def closure_of_file(path: Path) -> set[Path]:
    return closure(".".join(path.relative_to(ROOT).with_suffix("").parts), set()) | {path}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_imports_is_a_dependency_of_training(method):
    path = ROOT / "stages" / "methods" / f"{method}.py"
    lines = {str(ROOT / each) for each in STAGES["train"]["deps"]}
    assert str(path).replace(f"/{method}.py", "/${item.method}.py") in lines
    missing = closure_of_file(path) - {path} - listed("train")
    assert not missing, f"train does not list {sorted(map(str, missing))} of {method}"


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_source_imports_is_a_dependency_of_its_data(source):
    missing = closure_of_file(ROOT / "stages" / "records" / "sources" / f"{source}.py") - listed("data")
    assert not missing, f"data does not list {sorted(map(str, missing))} of {source}"


@pytest.mark.parametrize("stage", STAGES)
def test_who_reads_a_section_depends_on_its_defaults(stage):
    for section in SECTIONS & {param for param in STAGES[stage].get("params", []) if isinstance(param, str)}:
        if section == "merge" and stage == "report":  # which tells the merge's settings and computes nothing with them
            continue
        assert f"stages/settings/{section}.py" in STAGES[stage]["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_commands_are_run_as_modules_and_no_place_or_launcher_is_in_them(stage):
    words = STAGES[stage]["cmd"].split()
    assert words[:2] == ["python", "-m"] and path_of(words[2])
    assert all(word == "${key}" or word.isalpha() for word in words[3:])


def test_the_files_of_stages_are_exactly_the_stages():
    files = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "errors", "files", "comparing"}
    assert files == {module_of(stage).split(".")[1] for stage in STAGES if module_of(stage).startswith("stages.")}
    analysis = {path.stem for path in (ROOT / "analysis").glob("*.py")} - {"__init__"}
    assert analysis == {module_of(stage).split(".")[1] for stage in STAGES if module_of(stage).startswith("analysis.")}


# Each line may import the lines above it. errors and files are plumbing for all.
ROOMS = [
    ["stages.errors"],
    ["stages.files", "stages.comparing"],
    ["stages.settings"],
    ["stages.records"],
    ["stages.models"],
    ["stages.weights"],
    ["stages.methods", "stages.merging"],
    ["stages.project"],
    ["stages.training", "stages.routing"],
    ["stages"],
    ["analysis.changes", "analysis.running"],
    ["analysis.telling"],
    ["analysis"],
    ["tools"],
]
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module: str) -> str:
    parts = module.split(".")
    return next(".".join(parts[:length]) for length in range(len(parts), 0, -1) if ".".join(parts[:length]) in FLOORS)


def sources_of_code() -> list[Path]:
    return sorted(path for top in ("stages", "analysis", "tools") for path in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("path", sources_of_code(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_up_or_aside(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = room_of(module)
    for name in imported(path) - {"stages"}:
        other = room_of(name)
        assert other == own or FLOORS[other] < FLOORS[own], f"{module} imports {name}"


def test_no_two_files_import_each_other():
    graph = {path: {path_of(name) for name in imported(path)} - {path} for path in sources_of_code()}
    done: set[Path] = set()

    def visit(path: Path, above: list[Path]) -> None:
        assert path not in above, f"a circle: {[str(each.relative_to(ROOT)) for each in [*above, path]]}"
        if path not in done:
            for other in graph.get(path, set()):
                if other.name != "__init__.py":  # a package's face imports the files of its own folder
                    visit(other, [*above, path])
            done.add(path)

    for path in graph:
        visit(path, [])
