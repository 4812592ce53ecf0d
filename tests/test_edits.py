"""What an edit runs again: every row is one edit of a whole tiny project, and the stages that DVC ran for it.

Too much fails as well as too little. Then the edit is taken back, as a user would.
"""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import PARAMS
from tests.forked import Pipeline, commit, copy_repository
from tools.plan import CACHED, PERHAPS, RUNS, plan

pytestmark = pytest.mark.slow

PROJECT = """\
  both:
    source: mix
    parts:
      sums:
        source: file
        path: sums.jsonl
        train: 20
        eval: 5
        weight: 1.0
      words:
        source: file
        path: words.jsonl
        eval: 5
        weight: 1.0
stages:
"""
STAGES = """\
  third:
    parent: words
    dataset: words
    method: lora
    layers: 0-1
    rank: 2
    lr: 1.0e-3
    steps: 3
    protect:
      - sums
  side:
    parent: base
    dataset: both
    method: dora
    layers: 1-2
    rank: 2
    lr: 1.0e-3
    steps: 3
merge:
"""

CHAIN = ["sums", "words", "third"]
ALL = [*CHAIN, "side"]
DATA = {"data@sums", "data@words", "data@both"}
MERGE = {"merge", "score_merged", "probe_merged", "measure", "rounding", "evaluate", "report"}


def each(*verbs, names=ALL):
    return {f"{verb}@{name}" for verb in verbs for name in names}


def trained(*names):
    """Stages that changed, and all that follows."""
    return each("train", "score", "probe", names=names) | {"pick_checkpoints"} | MERGE


SCORES = each("score") | {"score_base", "score_merged"}
PROBES = each("probe") | {"probe_base", "probe_merged"}
EVERYTHING = {"base", "pick_data", "pick_checkpoints"} | DATA | each("train") | SCORES | PROBES | MERGE


def comment(path):
    return lambda: Path(path).write_text(Path(path).read_text() + "# a comment\n")


def new(path, text='"""A new file."""\n'):
    return lambda: Path(path).write_text(text)


def replace(path, before, after):
    def edit():
        text = Path(path).read_text()
        assert before in text, before
        Path(path).write_text(text.replace(before, after, 1))

    return edit


def param(before, after):
    return replace("params.yaml", before, after)


def pin(package):
    def edit():
        path = Path("pyproject.toml")
        text, count = re.subn(rf'("{re.escape(package)}(\[\w+\])?==)', r"\g<1>9", path.read_text(), count=1)
        assert count == 1
        path.write_text(text)

    return edit


EDITS = {
    # code
    "a comment in the writer of files": (comment("stages/weights/single_file.py"), {"merge"}),
    "a comment in the loop": (comment("stages/training/loop.py"), each("train")),
    "a comment in a method": (comment("stages/methods/dora.py"), each("train", names=["side"])),
    "a new method": (new("stages/methods/new.py"), set()),
    "a new merge": (new("stages/merging/methods/new.py"), {"merge", "measure", "rounding"}),
    "a new source": (new("stages/records/sources/new.py"), DATA),
    "a comment in the reader of params.yaml": (comment("stages/project/params.py"), set()),
    "a comment in the resumed state": (comment("stages/training/resume.py"), set()),
    "a comment in the scores": (comment("stages/models/scoring.py"), SCORES),
    "how answers are scored": (
        param("    path: sums.jsonl\n    train: 40", "    path: sums.jsonl\n    score: chrf\n    train: 40"),
        {"data@sums", "pick_data", "evaluate", "report"} | SCORES,
    ),
    "a comment in the launcher": (comment("stages/training/launch.py"), set()),
    "a comment in the probe": (comment("analysis/running/watching.py"), PROBES | {"rounding"}),
    "a comment in what is measured": (comment("analysis/changes/spectra.py"), {"measure"}),
    "a word of the report": (comment("analysis/telling/words.py"), {"report"}),
    "a template": (replace("analysis/telling/templates/report.html", "What it learned", "Learned"), {"report"}),
    "a tool": (comment("tools/view.py"), set()),
    # pins
    "tqdm": (pin("tqdm"), set()),
    "dvc": (pin("dvc"), set()),
    "transformers": (pin("transformers"), {"base", "rounding"} | each("train") | SCORES | PROBES),
    # settings
    "a threshold": (param("  rounding: 0.25", "  rounding: 0.5"), {"report"}),
    "the launcher": (param("launch: python", "launch: python -u"), set()),
    "the size of a cache": (param("seed: 0", "seed: 0\nprefix_cache: 1.0"), set()),
    "the search": (param("seed: 0", "seed: 0\nsearch:\n  trials: 3"), set()),
    "a rate at the end of a chain": (
        param("    lr: 1.0e-3\n    steps: 3\n    protect", "    lr: 2.0e-3\n    steps: 3\n    protect"),
        trained("third"),
    ),
    "what a stage remembers": (param("remember: 0.9", "remember: 0.5"), trained(*CHAIN)),
    "the merge": (param("method: task_arithmetic", "method: ties"), MERGE),
    "a stage left out of the merge": (param("    side: 0.5\n", ""), {"pick_checkpoints"} | MERGE),
    "the threads": (param("threads: 1", "threads: 2"), EVERYTHING - DATA - {"base", "pick_data", "evaluate"}),
    # defaults that shape a result
    "a default of the merge": (
        replace("stages/settings/merge.py", '["touching", "all"] = "touching"', '["touching", "all"] = "all"'),
        {"merge", "measure", "score_merged", "probe_merged", "rounding"},
    ),
    "a default of the training": (
        replace(
            "stages/settings/stage.py",
            "weight_decay: float = Field(default=0.0",
            "weight_decay: float = Field(default=0.1",
        ),
        EVERYTHING - DATA - {"base", "pick_data", "score_base", "probe_base"},
    ),
}

RARER = {  # of the same kinds, and longer
    "a comment in the scorers": (comment("stages/records/scorers.py"), DATA | SCORES | {"evaluate"}),
    "matplotlib": (pin("matplotlib"), {"report"}),
    "reasoning-gym": (pin("reasoning-gym"), DATA | SCORES),
    "datasets": (pin("datasets"), DATA),
    "sacrebleu": (pin("sacrebleu"), DATA | SCORES),
    "pandas": (pin("pandas"), SCORES | {"measure", "evaluate", "report"}),
    "mergekit": (pin("mergekit"), {"merge", "measure", "rounding"}),
    "a rate at its start": (param("lr: 1.0e-2\n    steps: 25", "lr: 2.0e-2\n    steps: 25"), trained(*CHAIN)),
    "the weight of a part": (param("weight: 1.0", "weight: 3.0"), {"data@both", "pick_data"} | trained("side")),
    "the length of answers": (param("max_new_tokens: 4", "max_new_tokens: 5"), SCORES | PROBES),
}


@pytest.fixture
def pipeline(project, monkeypatch):
    """The whole project, run once and committed."""
    text = PARAMS.replace("stages:\n", PROJECT, 1).replace("merge:\n", STAGES)
    text = text.replace("    rank: 4\n", "    rank: 4\n    remember: 0.9\n", 1)
    Path("params.yaml").write_text(text.replace("    words: 1.0\n", "    words: 1.0\n    third: 1.0\n    side: 0.5\n"))
    copy_repository(project)
    made = Pipeline(monkeypatch)
    assert made.repro() == EVERYTHING
    commit(project)
    return made


ROWS = sorted(EDITS.items(), key=lambda row: len(row[1][1]))  # so that each third runs as many stages
LATER = [ROWS[::3], ROWS[2::3], list(RARER.items())]


@pytest.mark.parametrize(
    "edits",
    [ROWS[1::3], *(pytest.param(rows, marks=pytest.mark.exhaustive) for rows in LATER)],
    ids=["one third", "another", "the last", "rarer ones"],
)
def test_every_edit_runs_what_depends_on_it_and_nothing_else(pipeline, edits):
    wrong = []
    for name, (edit, expected) in edits:
        edit()
        fates = {step.stage: step.fate for step in plan()[0]}
        ran = pipeline.repro()
        if ran != expected:
            wrong.append(f"{name}: too much {sorted(ran - expected)}, too little {sorted(expected - ran)}")
        sure = {stage for stage, fate in fates.items() if fate == RUNS}
        if not sure <= ran <= sure | {stage for stage, fate in fates.items() if fate == PERHAPS}:
            wrong.append(f"{name}: planned {fates}, ran {sorted(ran)}")
        pipeline.go_back()
    assert not wrong, "\n".join(wrong)
    assert pipeline.repro() == set()
    check_what_is_left_of_a_run(pipeline)


def check_what_is_left_of_a_run(pipeline):
    """A run that did not come to its end: what it made is newer than what it did not come to."""
    param(
        "    lr: 1.0e-3\n    steps: 3\n    protect", "    lr: 3.0e-3\n    steps: 3\n    protect"
    )()  # a rate of no row
    assert pipeline.repro("train@third") == {"train@third"}
    shutil.rmtree("data/words")  # as when the next run fails there
    steps = {step.stage: step.fate for step in plan()[0]}
    left = trained("third") - {"train@third"}
    sure, perhaps = ({stage for stage, fate in steps.items() if fate == kind} for kind in (RUNS, PERHAPS))
    assert each("score", "probe", names=["third"]) < sure <= left <= sure | perhaps and steps["data@words"] == CACHED
    assert pipeline.repro() == left
    pipeline.go_back()
