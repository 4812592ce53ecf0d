"""The merged model on every skill, beside base and stages: `python -m stages.evaluate`.

Adds the merged model's row to the matrix of `stages.score` and tells what share of each stage's gain the merge
keeps. Writes reports/evaluation.json.
"""

from typing import Any

import torch

from stages.errors import run
from stages.files import REPORTS, read_json, write_json
from stages.merging.merged import open_merged
from stages.project.params import load_params
from stages.score import Matrix, score_all
from stages.weights.checkpoint import open_stages


def main() -> None:
    """Score the merged model and write the whole matrix with each stage's retention."""
    settings = load_params()
    torch.set_num_threads(settings.thread_count)
    merged = open_merged(*open_stages(list(settings.merge.weights)), settings.merge)
    matrix = read_json(REPORTS / "scores.json") | score_all([merged], settings)
    write_json(REPORTS / "evaluation.json", {"matrix": matrix, "retention": retention(matrix, settings.skills)})


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
