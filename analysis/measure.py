"""Measure what each stage and the merge changed in the weights: `python -m analysis.measure`.

Writes reports/measured/, which the report tells. Apart from the report, so that a word in it costs no measuring.
"""

import torch

from analysis.changes.deltas import measure
from stages.errors import run
from stages.files import REPORTS, publish
from stages.merging.merged import Merged, open_merged
from stages.project.params import load_params
from stages.weights.checkpoint import open_stages


def main() -> None:
    """Compare every tensor of the stages and of the merged file with the base."""
    params = load_params()
    torch.set_num_threads(params.thread_count)
    base, stages = open_stages(list(params.stages))
    listed = [stage for stage in stages if stage.name in params.merge.weights]
    exact, file = Merged(base, listed, params.merge), open_merged(base, listed, params.merge)
    with publish(REPORTS / "measured") as folder:
        measure(stages, exact, file).write(folder)


if __name__ == "__main__":
    run(main)
