"""Every model on every skill, in one matrix: `python -m stages.evaluate`.

Rows are the base, each stage and the merged model, as `stages.score` left them. Tells also what share of each stage's
gain the merge keeps. Writes reports/evaluation.json.
"""

from typing import Any

from stages.errors import run
from stages.files import REPORTS, read_json, write_json
from stages.project.params import load_params

Matrix = dict[str, dict[str, dict[str, float]]]  # model, dataset, then loss and accuracy


def main() -> None:
    """Write the whole matrix with each stage's retention."""
    params = load_params()
    names = ["base", *params.stages, "merged"]
    matrix = {name: read_json(REPORTS / "scores" / f"{name}.json") for name in names}
    write_json(REPORTS / "evaluation.json", {"matrix": matrix, "retention": retention(matrix, params.skills)})


def retention(matrix: Matrix, skills: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What each stage gained on its own dataset over the base, and the share of it that the merged model keeps.

    Accuracy is the measure where both have it, else the fall of the loss. `retention` is None where the
    stage gained nothing.
    """
    result = {}
    for stage, dataset in skills.items():
        measure = "accuracy" if "accuracy" in matrix[stage][dataset] else "loss"
        start = matrix["base"][dataset][measure]
        gain = matrix[stage][dataset][measure] - start
        kept = matrix["merged"][dataset][measure] - start
        gained = gain > 0 if measure == "accuracy" else gain < 0
        result[stage] = {
            "dataset": dataset,
            "measure": measure,
            "gain": round(gain, 4),
            "merged_gain": round(kept, 4),
            "retention": round(kept / gain, 4) if gained else None,
        }
    return result


if __name__ == "__main__":
    run(main)
