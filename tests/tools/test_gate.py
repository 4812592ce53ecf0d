"""The gate on evaluations whose outcome is known: what is clear passes or fails, and a few questions decide nothing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages import evaluate
from stages.errors import MistakeError
from stages.files import read_json, rounded, write_json
from stages.project.params import load_params
from stages.settings.gate import Gate
from tools import gate

GENERAL = "  general:\n    source: file\n    path: general.jsonl\n    train: 0\n    eval: 40\n"


def measure(questions, sums, merged, guard=(1.0, 1.0), scorer="exact", general=(0.0, 0.0)):
    """Evaluate made-up answers: shares that stage `sums` and the merge get right, and the guard before and after.

    Args:
        questions: of each dataset.
        sums: right answers of the stage, as a share.
        merged: right answers of the merged model.
        guard: losses of the base and the merged model on `general`.
        scorer: of `general`.
        general: scores of the base and the merged model there.
    """
    text = Path("params.yaml").read_text()
    if "general:" not in text:
        Path("params.yaml").write_text(text.replace("datasets:\n", f"datasets:\n{GENERAL}", 1))
    noise = np.random.default_rng(0).normal(0, 0.05, questions)
    rows = []
    for model, right in {"base": 0.0, "sums": sums, "words": 0.5, "merged": merged}.items():
        after = model == "merged"
        for number in range(questions):
            known = {"dataset": "sums", "scorer": "exact", "score": float(number < right * questions), "loss": 1.0}
            words = {
                "dataset": "words",
                "scorer": "exact",
                "score": float(number < (right and 0.5) * questions),
                "loss": 1.0,
            }
            kept = {"dataset": "general", "scorer": scorer, "score": float(number < general[after] * questions)}
            kept["loss"] = guard[after] + noise[number] * (1 + after)
            rows += [{"record": number, "model": model, "weight": 1.0} | each for each in (known, words, kept)]
    content = evaluate.evaluation(pd.DataFrame(rows), load_params())
    write_json(Path("reports/evaluation.json"), rounded(content))


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        ({"guard": (2.0, 2.05)}, "passes: general's loss went from 2 to 2.06, +2.7%"),
        ({"guard": (2.0, 2.6)}, "fails: general's loss went from 2 to 2.61, +30."),
        ({"guard": (2.0, 1.9)}, "passes: general's loss went from 2 to 1.91, -4.8%"),
        ({"scorer": "exact", "general": (0.8, 0.8)}, "passes: general's accuracy went from 0.8 to 0.8, +0.0% (-3.7%"),
        ({"scorer": "exact", "general": (0.8, 0.5)}, "fails: general's accuracy went from 0.8 to 0.5, -37.5%"),
        ({"scorer": "exact", "general": (0.8, 0.7)}, "unclear: general's accuracy went from 0.8 to 0.7, -12.5%"),
        ({"scorer": "exact", "general": (0.0, 0.0)}, "passes: general has nothing to lose"),
        ({"merged": 0.8}, "passes: 100% ("),
        ({"merged": 0.3}, "fails: 38% ("),
        ({"merged": 0.6}, "unclear: 75% ("),
        ({"sums": 0.0, "merged": 0.0}, "fails: sums learned nothing of sums that is more than chance"),
    ],
)
def test_the_interval_decides(project, capsys, measured, line):
    scorer = "exact" if "general" in measured and "scorer" in measured else "loss"
    measure(**{"questions": 100, "sums": 0.8, "merged": 0.8} | measured | {"scorer": scorer})
    if line.startswith("fails"):
        with pytest.raises(MistakeError, match=r"the merged model breaks [12] of the \d rules of gate in params.yaml"):
            gate.main()
    else:
        gate.main()
    found = capsys.readouterr().out.splitlines()
    assert any(text.startswith(line) for text in found), found


def test_without_an_evaluation_there_is_a_sentence(project):
    with pytest.raises(MistakeError, match=r"reports/evaluation.json is missing; run `dvc repro`"):
        gate.main()


@pytest.mark.parametrize(("after", "verdict"), [(1.9, "passes"), (2.6, "fails")])
def test_nothing_may_be_lost(project, after, verdict):
    measure(100, 0.8, 0.8, (2.0, after), "loss")
    ruling = gate.rule_guard(read_json(Path("reports/evaluation.json")), "general", Gate(lost=0))
    assert ruling.verdict == verdict
