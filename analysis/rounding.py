"""What rounding the merged file costs the running model: `python -m analysis.rounding`.

A change can be far above the floor of the file's dtype in its norm and still be lost where it matters, or below it and
all there: what counts is what the rounded model says. Writes reports/rounding.json.
"""

from __future__ import annotations

import torch

from analysis.probe import read_texts
from stages.errors import run
from stages.files import REPORTS, rounded, write_json
from stages.merging.merged import Merged
from stages.models.loading import Weights, device, load_model
from stages.project.params import load_params
from stages.weights.checkpoint import open_model, open_stages

TEXTS = 4  # of the eval splits, and as many of the probes: float32 is slow on some processors


def main() -> None:
    """Compare the merged file with the merge that it rounds."""
    params, result = load_params(), {}
    torch.set_num_threads(params.thread_count)
    if "model" in params.merge.outputs:
        exact = params.merge.model_copy(update={"dtype": "float32"})
        merged = Merged(*open_stages(sorted(params.merge.weights)), exact)
        texts = [text for each in read_texts().values() for text in each[:: max(1, len(each) // TEXTS)][:TEXTS]]
        result = compare(merged, open_model("merged"), texts)
    write_json(REPORTS / "rounding.json", rounded(result))


def compare(merged: Merged, file: Weights, texts: list[torch.Tensor]) -> dict[str, float]:
    """Divergences from what the merge says, in nats per token and float32 arithmetic.

    Computing in 16 bits makes a larger one than the rounding of weights, so that the probe cannot tell it.

    Args:
        merged: the merge in float32.
        file: what was written of it.
        texts: token ids [tokens].

    Returns:
        `rounding`: KL(merge ‖ file); `training`: KL(merge ‖ base), which is all that the merge changed.
    """
    exact, stored, base = (_says(model, texts) for model in (merged, file, merged.base))
    return {"rounding": _divergence(exact, stored), "training": _divergence(exact, base)}


@torch.inference_mode()
def _says(checkpoint: Weights, texts: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the next token [tokens of all texts, vocabulary]."""
    model = load_model(checkpoint, torch.float32, device())
    each = [model(input_ids=ids[None].to(model.device), use_cache=False).logits[0] for ids in texts]
    return torch.cat(each).float().log_softmax(-1)


def _divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.exp() * (first - second)).sum(-1).mean())


if __name__ == "__main__":
    run(main)
