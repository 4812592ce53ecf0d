"""What docs/ tells of the code is what the code says, and the schema knows right from wrong."""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.errors import MistakeError
from stages.methods import METHODS
from stages.project.params import Params
from tests.conftest import ROOT
from tools import docs
from tools.pages.params import words
from tools.pages.schema import schema
from tools.pages.text import paragraphs

SLOW = {"methods.md"}  # it puts every method on a model of each architecture


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in docs.PAGES])
def test_the_docs_are_what_the_code_says(name):
    path = ROOT / "docs" / name
    same = path.exists() and path.read_text(encoding="utf-8") == docs.made(path)
    assert same, f"docs/{name} is old; run `uv run strata docs`"


def test_a_page_keeps_what_is_not_made():
    page = "before\n\n<!-- numbers: made by strata docs -->\nold\n<!-- end -->\n\nbetween\n<!-- end -->"
    made = docs.fill(page, "numbers", "| 1 |", "page.md")
    assert made == page.replace("old", "\n| 1 |\n") == docs.fill(made, "numbers", "| 1 |", "page.md")
    with pytest.raises(MistakeError, match=r"page.md has lost its marks <!-- letters: made by strata docs -->"):
        docs.fill(page, "letters", "", "page.md")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_it_trains_and_what_speaks_for_it(method):
    told = paragraphs(METHODS[method])
    assert told[0].endswith(".")
    if method != "import":
        assert len(told) >= 2, f"the docstring of method {method!r} needs a second paragraph: what speaks for it"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ({"type": "integer", "minimum": 0}, "whole number ≥ 0"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number > 0 and ≤ 1"),
        ({"anyOf": [{"enum": ["a", "b", "c"]}, {"type": "null"}]}, "`a`, `b` or `c`"),
        ({"type": "array", "items": {"type": "string"}}, "list of texts"),
        ({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}, "2 numbers"),
        ({"type": "boolean"}, "`true` or `false`"),
    ],
)
def test_what_a_value_may_be_in_words(kind, text):
    assert words(kind) == text


def test_every_key_has_a_description():
    kinds = {"Params": schema(), **schema()["$defs"]}
    silent = [
        f"{name}.{key}"
        for name, kind in kinds.items()
        for key, each in kind.get("properties", {}).items()
        if "description" not in each
    ]
    assert not silent


def repository():
    return YAML(typ="safe").load(ROOT / "params.yaml")


def edited(path, value):
    """params.yaml with one value changed; None takes the key away."""
    content = copy.deepcopy(repository())
    *parents, key = path.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[key]
    else:
        place[key] = value
    return content


RIGHT = {
    "stages.reversal.layers": {"attention": "0-3, 7", "mlp": "last 6", "q_proj": [1, 2]},
    "stages.arithmetic.surgery": "mgda",
    "stages.siblings.lr": 1,
    "merge.weights.siblings": [0.2, 1],
    "merge.weights.reversal": [{"filter": "mlp", "value": [0, 1]}, {"value": 1.0}],
    "merge.parameters": {"density": {"reversal": [0.1, 0.5]}, "normalize": True},
    "merge.depth_scaling": [0.5, 1.0],
    "search.methods": ["ties", "svc"],
    "threads": 4,
    "datasets.siblings": {"source": "mix", "parts": {"a": {"source": "file", "path": "x", "eval": 1, "weight": 1}}},
}
WRONG = {
    "sead": 1,
    "stages.arithmetic.rnk": 8,
    "stages.arithmetic.rank": 0,
    "stages.arithmetic.method": "lorra",
    "stages.arithmetic.lr": None,
    "stages.arithmetic.block_size": 8,
    "stages.reversal.layers": "3 to 5",
    "stages.2nd": {"parent": "base", "dataset": "siblings", "method": "ln", "lr": 0.1, "steps": 1},
    "datasets.siblings.source": "gym",
    "datasets.siblings.taks": "aiw",
    "merge.method": "tie",
    "merge.weights.siblings": "much",
    "merge.weights.reversal": [{"filter": "mlp"}],
    "search.measure": "both",
    "threads": 0,
}


@pytest.fixture
def validator():
    return pytest.importorskip("jsonschema").Draft202012Validator(schema())


def test_the_schema_takes_params_yaml(validator):
    assert not list(validator.iter_errors(repository()))


@pytest.mark.parametrize("path", RIGHT)
def test_the_schema_takes_what_strata_takes(validator, path):
    content = edited(path, RIGHT[path])
    Params.model_validate(content)
    assert validator.is_valid(content)


@pytest.mark.parametrize("path", WRONG)
def test_the_schema_refuses_what_strata_refuses(validator, path):
    assert not validator.is_valid(edited(path, WRONG[path]))


def test_the_schema_says_what_is_wrong_with_a_key_of_a_method(validator):
    """The union is told apart by `method`, so an editor speaks of the method that was meant."""
    from jsonschema.exceptions import best_match

    found = best_match(validator.iter_errors(edited("stages.arithmetic.rnk", 8)))
    told = [error.message for error in found.context or [] if "rnk" in error.message and "const" not in error.message]
    assert any("Additional properties are not allowed" in message for message in told)


EXAMPLE = re.compile(r"^([^\n`]*`[^\n]*)\n\n```(?:python|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACES = {  # what stands above an example that is no file: its file, and the line that it follows or begins with
    "Its row in `ROWS` of `tests/stages/methods/": ("tests/stages/methods/test_matrix.py", "ROWS = {"),
    "Its row in `ROWS` of `tests/stages/merging/": ("tests/stages/merging/test_methods.py", "ROWS = {"),
    "A part, and a metric": ("analysis/changes/metrics.py", "METRICS = ["),
    "A line of `test_relative": (
        "tests/analysis/changes/test_deltas.py",
        "        size = norm(stored(key) for key in delta)",
    ),
    "Its entry in `dvc.yaml`": ("dvc.yaml", "stages:"),
}


def put_in(title: str, code: str) -> None:
    """Write an example where the page says that it goes."""
    if found := re.fullmatch(r"`(\S+)`", title):
        Path(found[1]).write_text(code)
        return
    path, line = next(place for start, place in PLACES.items() if title.startswith(start))
    text, line = Path(path).read_text(), f"\n{line}\n"
    assert text.count(line) == 1, f"{path} has not one line {line!r}"
    Path(path).write_text(text.replace(line, f"\n{code}" if line in code else line + code))


@pytest.mark.slow
def test_the_examples_of_extending_work(workspace):
    for name in ("stages", "analysis", "tools", "tests", "docs"):
        shutil.copytree(ROOT / name, workspace / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, workspace / name)
    examples = EXAMPLE.findall(Path("docs/extending.md").read_text(encoding="utf-8"))
    assert len(examples) == 10
    for title, code in examples:
        put_in(title, code)
    files = [f"tests/stages/{name}" for name in ("methods", "merging/test_methods.py", "records/test_folder.py")]
    files += ["tests/analysis/changes/test_deltas.py", "tests/test_dvc.py"]
    names = "row or loha or median or test_folder or relative_change or count"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", *files, "-k", names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout
