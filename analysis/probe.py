"""What the training did to the running models: `python -m analysis.probe`.

Every checkpoint reads the same texts as the base: some of each eval split (on-domain) and those of probes.jsonl
(off-domain: other languages, code, prose). Compared layer by layer are the hidden states, what the output layer would
make of them (the logit lens), and where attention goes; then early layers are reset, to see whether they are the
cause, and layers of each stage are taken away, to see which carry its skill. Writes reports/probe.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.running.watching import (
    Seen,
    attention_divergence,
    attention_of,
    drift,
    interval,
    lens_divergence,
    load_eager,
    watch,
    written,
)
from stages.errors import run
from stages.files import CHECKPOINTS, REPORTS, read_json, write_json
from stages.merging.merged import open_merged
from stages.models.architecture import layer_stack, place
from stages.models.loading import Weights, compute_dtype, device, load_model, load_tokenizer, set_weights
from stages.project.params import Params, load_params
from stages.records.lines import load_split
from stages.records.tokens import encode
from stages.score import mean_loss
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint, open_stages

PROBES = Path(__file__).parent / "running" / "probes.jsonl"
ON_DOMAIN = 5  # records of each eval split
LONGEST = 64  # tokens of a text
LENS_FROM = {"on": -1, "off": 0}  # after which layer it begins to
EARLY = 3  # the first of so many parts of the layers is reset
GROUPS = 3  # of a stage's layers, each of which is taken away
ABLATED = 8  # records of each eval split that an ablation is measured on
NULL = 4  # off-domain texts that the noise of bfloat16 is measured on, for some processors run it slowly


def main() -> None:
    """Probe every checkpoint against the base."""
    settings = load_params()
    torch.set_num_threads(settings.thread_count)
    base, stages = open_stages(list(settings.stages))
    listed = [stage for stage in stages if stage.name in settings.merge.weights]
    merged = open_merged(base, listed, settings.merge)
    own = {stage.name: read_json(CHECKPOINTS / stage.name / "stage.json")["layers"] for stage in stages}
    lineages = {name: settings.lineage(name) for name in own} | {"merged": [stage.name for stage in listed]}
    trained = {name: sorted({layer for each in lineage for layer in own[each]}) for name, lineage in lineages.items()}
    texts = read_texts(settings)
    model = load_eager(base)
    before = {domain: watch(model, each, LENS_FROM[domain]) for domain, each in texts.items()}
    del model  # what it saw is all that is needed of it, and a large one would lie beside every other
    result: dict[str, Any] = {
        "layers": base.architecture.layers,
        "floor": floor(base, texts["off"][:NULL], before["off"][:NULL]),
        "base": {"attention": attention_of(before["off"]), "written": written(before["off"])},
        "checkpoints": {},
    }
    for checkpoint in tqdm([*stages, merged], desc="probe", unit="checkpoint", dynamic_ncols=True):
        result["checkpoints"][checkpoint.name] = {
            "trained": trained[checkpoint.name],
            **probe(checkpoint, base, texts, before),
        }
    result["ablation"] = [row for stage in listed for row in ablate(stage, own[stage.name], settings)]
    write_json(REPORTS / "probe.json", _rounded(result))


def read_texts(settings: Params) -> dict[str, list[torch.Tensor]]:
    """Token ids [tokens] of the texts, `on` and `off` domain."""
    tokenizer = load_tokenizer()
    records = [record for name in settings.datasets for record in load_split(name, "eval")[:ON_DOMAIN]]
    others = [json.loads(line)["text"] for line in PROBES.read_text(encoding="utf-8").splitlines()]
    return {
        "on": [torch.tensor(encode(record, tokenizer, LONGEST).ids) for record in records],
        "off": [torch.tensor(tokenizer(text)["input_ids"][:LONGEST]) for text in others],
    }


def probe(
    checkpoint: Weights,
    origin: Checkpoint,
    texts: dict[str, list[torch.Tensor]],
    before: dict[str, list[Seen]],
) -> dict[str, Any]:
    """Everything that is compared between a checkpoint and the base, which saw `before`."""
    model = load_eager(checkpoint)
    after = {domain: watch(model, each, LENS_FROM[domain]) for domain, each in texts.items()}
    pairs = {domain: list(zip(before[domain], seen, strict=True)) for domain, seen in after.items()}
    lens = {domain: torch.stack([lens_divergence(*pair) for pair in each]) for domain, each in pairs.items()}
    result: dict[str, Any] = {
        domain: {
            "drift": interval(torch.stack([drift(*pair) for pair in pairs[domain]])),
            "kl": interval(found[:, -1]),
        }
        for domain, found in lens.items()  # [texts, lens layers]
    }
    shift = torch.stack([attention_divergence(*pair) for pair in pairs["off"]]).mean(0)
    result["attention"] = attention_of(after["off"]) | {"divergence": shift.tolist()}
    result["written"] = written(after["off"])
    early = reset_early(origin, model, texts["off"], before["off"], result["off"]["kl"]["mean"])
    return result | {"lens": lens["off"].mean(0).tolist(), "early": early}


def reset_early(
    origin: Checkpoint,
    model: PreTrainedModel,
    texts: list[torch.Tensor],
    before: list[Seen],
    whole: float,
) -> dict[str, Any]:
    """Share of the divergence `whole` on `texts` that goes when the first third of the layers is the base's again.

    `model` is left with these layers reset.
    """
    stack = layer_stack(model)
    count = model.config.num_hidden_layers // EARLY
    set_weights(model, origin, [path for path in origin.modules if 0 <= place(path, stack)[0] < count])
    pairs = zip(before, watch(model, texts), strict=True)
    left = np.mean([float(lens_divergence(*pair)) for pair in pairs])
    return {"layers": count, "left": float(left), "share": 1 - float(left) / whole if whole else 0.0}


def floor(base: Checkpoint, texts: list[torch.Tensor], seen: list[Seen]) -> dict[str, Any]:
    """Drift and divergence between the base in float32 and in bfloat16: what running with fewer digits alone makes.

    `seen` is what it made of the texts in the dtype that is computed in.
    """
    other = load_eager(base, torch.float32 if compute_dtype() == torch.bfloat16 else torch.bfloat16)
    pairs = list(zip(seen, watch(other, texts, LENS_FROM["off"]), strict=True))
    lens = torch.stack([lens_divergence(*pair) for pair in pairs]).mean(0)
    drifts = torch.stack([drift(*pair) for pair in pairs]).mean(0)
    return {"drift": drifts.tolist(), "lens": lens.tolist(), "kl": float(lens[-1])}


def ablate(stage: VirtualCheckpoint, trained: list[int], settings: Params) -> list[dict[str, Any]]:
    """Loss of a stage on every skill in nats per token, whole and with a group of its layers as its parent has them."""
    model, tokenizer = load_model(stage, compute_dtype(), device()), load_tokenizer()
    stack = layer_stack(model)
    records = {name: load_split(name, "eval")[:ABLATED] for name in settings.datasets}

    def losses() -> dict[str, float]:
        return {name: mean_loss(model, tokenizer, each, settings.evaluate.batch_size) for name, each in records.items()}

    whole, rows = losses(), []
    for group in np.array_split(trained, min(GROUPS, len(trained))):
        modules = [path for path in stage.adapter.modules if place(path, stack)[0] in group]
        set_weights(model, stage.parent, modules)
        found = losses()
        set_weights(model, stage, modules)
        rows += [
            {
                "stage": stage.name,
                "layers": group.tolist(),
                "dataset": name,
                "loss": whole[name],
                "without": found[name],
            }
            for name in records
        ]
    return rows


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content


if __name__ == "__main__":
    run(main)
