"""What the training did to a running model: `python -m analysis.probe NAME`, where NAME is `base`, a stage or `merged`.

It reads the same texts as the base: some of each eval split (on-domain) and those of probes.jsonl
(off-domain: other languages, code, prose). Compared layer by layer are the hidden states, what the output layer would
make of them (the logit lens), and where attention goes; then early layers are reset, to see whether they are the
cause, and layers of a stage are taken away, to see which carry its skill. Writes reports/probe/NAME.json.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from analysis.running.watching import (
    Activations,
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
from stages.files import CHECKPOINTS, PICKED, REPORTS, read_json, read_record, rounded, write_json
from stages.models.architecture import depth, layer_stack, place
from stages.models.loading import Weights, compute_dtype, device, load_model, load_tokenizer, set_weights
from stages.models.losses import mean_loss
from stages.project.params import Params, load_params
from stages.records.lines import load_split
from stages.records.tokens import encode
from stages.settings.evaluate import Evaluate
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint, open_base, open_model

PROBES = Path(__file__).parent / "running" / "probes.jsonl"
ON_DOMAIN = 5  # records of each eval split
LONGEST = {"on": 128, "off": 64}  # tokens of a text; a chat begins with the template's own
LENS_FROM = {"on": -1, "off": 0}  # after which layer it begins to
EARLY = 3  # the first of so many parts of the layers is reset
GROUPS = 3  # of a stage's layers, each of which is taken away
ABLATED = 8  # records of each eval split that an ablation is measured on
NULL = 4  # off-domain texts that the noise of bfloat16 is measured on, for some processors run it slowly


def main(name: str) -> None:
    """Probe the model of that name: the base by itself, every other one against the base."""
    params = load_params()
    torch.set_num_threads(params.thread_count)
    base = open_base()
    texts = read_texts()
    before = watch_all(load_eager(base), texts)
    if name == "base":
        result = probe_base(base, texts["off"][:NULL], before["off"])
    else:
        checkpoint = open_model(name)
        result = {"trained": trained_layers(name, params), **probe(checkpoint, base, texts, before), "ablation": []}
        if isinstance(checkpoint, VirtualCheckpoint) and name in params.stages:
            result["ablation"] = ablate(checkpoint, own_layers(name), params.evaluate)
    write_json(REPORTS / "probe" / f"{name}.json", rounded(result))


def own_layers(name: str) -> list[int]:
    """The layers that a stage itself trained."""
    return list(read_record(CHECKPOINTS / name)["layers"])


def trained_layers(name: str, params: Params) -> list[int]:
    """The layers that were trained on the way from the base to a stage, or to the merged model."""
    ends = params.merge.weights if name == "merged" else [name]
    return sorted({layer for end in ends for stage in params.lineage(end) for layer in own_layers(stage)})


def watch_all(model: PreTrainedModel, texts: dict[str, list[torch.Tensor]]) -> dict[str, list[Activations]]:
    """What a model makes of the texts of both domains."""
    return {domain: watch(model, each, LENS_FROM[domain]) for domain, each in texts.items()}


def read_texts() -> dict[str, list[torch.Tensor]]:
    """Token ids [tokens] of the texts, `on` and `off` domain."""
    tokenizer = load_tokenizer()
    records = [record for name in read_json(PICKED / "data.json") for record in load_split(name, "eval")[:ON_DOMAIN]]
    others = [json.loads(line)["text"] for line in PROBES.read_text(encoding="utf-8").splitlines()]
    return {
        "on": [torch.tensor(encode(record, tokenizer, LONGEST["on"])[-1].ids) for record in records],
        "off": [torch.tensor(tokenizer(text)["input_ids"][: LONGEST["off"]]) for text in others],
    }


def probe(
    checkpoint: Weights,
    origin: Checkpoint,
    texts: dict[str, list[torch.Tensor]],
    before: dict[str, list[Activations]],
) -> dict[str, Any]:
    """Everything that is compared between a checkpoint and the base, whose activations are `before`."""
    model = load_eager(checkpoint)
    after = watch_all(model, texts)
    pairs = {domain: list(zip(before[domain], each, strict=True)) for domain, each in after.items()}
    lens = {domain: torch.stack([lens_divergence(*pair) for pair in each]) for domain, each in pairs.items()}
    result: dict[str, Any] = {
        domain: {
            "drift": interval(torch.stack([drift(*pair) for pair in pairs[domain]])),
            "kl": interval(divergence[:, -1]),
        }
        for domain, divergence in lens.items()  # [texts, lens layers]
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
    before: list[Activations],
    whole: float,
) -> dict[str, Any]:
    """Share of the divergence `whole` on `texts` that goes when the first third of the layers is the base's again.

    None where nothing diverges, or where the model is too shallow to have a third. `model` is left with these layers
    reset.
    """
    stack = layer_stack(model)
    count = depth(model) // EARLY
    modules = [path for path, _ in model.named_modules() if path in origin.modules]
    set_weights(model, origin, [path for path in modules if 0 <= place(path, stack)[0] < count])
    pairs = zip(before, watch(model, texts), strict=True)
    left = np.mean([float(lens_divergence(*pair)) for pair in pairs])
    return {"layers": count, "left": float(left), "share": 1 - float(left) / whole if whole and count else None}


def probe_base(base: Checkpoint, texts: list[torch.Tensor], activations: list[Activations]) -> dict[str, Any]:
    """What the base itself does, and on the first few texts what running it with fewer digits alone makes."""
    return {
        "layers": base.architecture.layers,
        "floor": floor(base, texts, activations[: len(texts)]),
        "base": {"attention": attention_of(activations), "written": written(activations)},
    }


def floor(base: Checkpoint, texts: list[torch.Tensor], activations: list[Activations]) -> dict[str, Any]:
    """Drift and divergence between the base in float32 and in bfloat16: what running with fewer digits alone makes.

    Of attention it is that of the head that moves most; NaN where there is none.

    Args:
        base: is run once more, in the other dtype.
        texts: token ids.
        activations: what it made of them in the dtype that is computed in.
    """
    other = load_eager(base, torch.float32 if compute_dtype() == torch.bfloat16 else torch.bfloat16)
    pairs = list(zip(activations, watch(other, texts, LENS_FROM["off"]), strict=True))
    lens = torch.stack([lens_divergence(*pair) for pair in pairs]).mean(0)
    drifts = torch.stack([drift(*pair) for pair in pairs]).mean(0)
    heads = torch.stack([attention_divergence(*pair) for pair in pairs]).mean(0).flatten()
    most = max(heads[~heads.isnan()].tolist(), default=math.nan)
    return {"drift": drifts.tolist(), "lens": lens.tolist(), "kl": float(lens[-1]), "attention": most}


def ablate(stage: VirtualCheckpoint, layers: list[int], bounds: Evaluate) -> list[dict[str, Any]]:
    """Loss of a stage on every skill in nats per token, whole and with a group of its layers as its parent has them."""
    model, tokenizer = load_model(stage, compute_dtype(), device()), load_tokenizer()
    stack = layer_stack(model)
    records = {name: load_split(name, "eval")[:ABLATED] for name in read_json(PICKED / "data.json")}

    def losses() -> dict[str, float]:
        return {name: mean_loss(model, tokenizer, each, bounds.batch_size) for name, each in records.items()}

    whole, rows = losses(), []
    groups = np.array_split(layers, min(GROUPS, len(layers))) if layers else []  # an embedding lies in no layer
    for group in groups:
        modules = [path for path in stage.adapter.modules if place(path, stack)[0] in group]
        set_weights(model, stage.parent, modules)
        without = losses()
        set_weights(model, stage, modules)
        rows += [
            {
                "stage": stage.name,
                "layers": group.tolist(),
                "dataset": name,
                "loss": whole[name],
                "without": without[name],
            }
            for name in records
        ]
    return rows


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
