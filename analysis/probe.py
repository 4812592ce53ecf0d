"""What the training did to the running models: `python -m analysis.probe`.

Every checkpoint reads the same texts as the base: some of each eval split (on-domain) and those of probes.jsonl
(off-domain: other languages, code, prose). Compared layer by layer are the hidden states, what the output layer would
make of them (the logit lens), and where attention goes; then early layers are reset, to see whether they are the
cause, and layers of each stage are taken away, to see which carry its skill. Writes reports/probe.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from stages import params
from stages.errors import run
from stages.files import CHECKPOINTS, REPORTS, read_json, write_json
from stages.layers import OUTSIDE, is_norm, layer_stack, place
from stages.merging.merged import open_merged
from stages.model import compute_dtype, device, load_model, load_tokenizer, set_weights
from stages.records import encode, load_split
from stages.score import mean_loss
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint, Weights, open_stages

PROBES = Path(__file__).with_name("probes.jsonl")
ON_DOMAIN = 5  # records of each eval split
LONGEST = 64  # tokens of a text
LENS = 4  # positions of a text that the output layer looks at
LENS_FROM = {"on": -1, "off": 0}  # after which layer it begins to
EARLY = 3  # the first of so many parts of the layers is reset
GROUPS = 3  # of a stage's layers, each of which is taken away
ABLATED = 8  # records of each eval split that an ablation is measured on
SINK = 0.3  # attention to the first token from which a layer is said to have the sink
NULL = 4  # off-domain texts that the noise of bfloat16 is measured on, for some processors run it slowly
RESAMPLES = 1000

Layered = torch.Tensor  # float32 [layers]


@dataclass(frozen=True)
class Seen:
    """What a model made of one text.

    Attributes:
        hidden: the embeddings, then the output of every layer, the last one normalised; float32 [layers + 1, tokens,
            width].
        attention: where each token looks, float32 [layers, heads, tokens, tokens]; rows sum to 1.
        written: what each part of a layer, such as its MLP, adds to the hidden states, over the size of those that come
            into the layer, by name; float32 [layers, tokens].
        lens: log-probabilities of the next token if a layer were the last, at LENS positions; float32 [lens layers,
            positions, vocabulary], on the model's device.
    """

    hidden: torch.Tensor
    attention: torch.Tensor
    written: dict[str, torch.Tensor]
    lens: torch.Tensor


def main() -> None:
    """Probe every checkpoint against the base."""
    settings = params.load()
    torch.set_num_threads(settings.threads)
    base, stages = open_stages(list(settings.stages))
    listed = [stage for stage in stages if stage.name in settings.merge.weights]
    merged = open_merged(base, listed, settings.merge)
    own = {stage.name: read_json(CHECKPOINTS / stage.name / "stage.json")["layers"] for stage in stages}
    lineages = {name: [*settings.ancestors(name), name] for name in own} | {"merged": [stage.name for stage in listed]}
    trained = {name: sorted({layer for each in lineage for layer in own[each]}) for name, lineage in lineages.items()}
    texts = read_texts(settings)
    model = _eager(base)
    before = {domain: watch(model, each, LENS_FROM[domain]) for domain, each in texts.items()}
    del model  # what it saw is all that is needed of it, and a large one would lie beside every other
    result: dict[str, Any] = {
        "layers": base.skeleton.config.num_hidden_layers,
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


def read_texts(settings: params.Params) -> dict[str, list[torch.Tensor]]:
    """Token ids [tokens] of the texts, `on` and `off` domain."""
    tokenizer = load_tokenizer()
    records = [record for name in settings.datasets for record in load_split(name, "eval")[:ON_DOMAIN]]
    others = [json.loads(line)["text"] for line in PROBES.read_text(encoding="utf-8").splitlines()]
    return {
        "on": [torch.tensor(encode(record, tokenizer, LONGEST).ids) for record in records],
        "off": [torch.tensor(tokenizer(text)["input_ids"][:LONGEST]) for text in others],
    }


@torch.inference_mode()
def watch(model: PreTrainedModel, texts: list[torch.Tensor], first: int = -1) -> list[Seen]:
    """Run a model with eager attention on texts, all at once: what is filled in stands after them, where none looks.

    The logit lens looks at the layers from `first` on.
    """
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)
    with _sizes_of_outputs(model) as sizes:
        # Without the output layer, whose logits nobody looks at here.
        output = model.base_model(input_ids=ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    hidden, attention = (torch.stack(each).float().cpu() for each in (output.hidden_states, output.attentions))
    incoming = hidden[:-1].norm(dim=-1)
    written = {name: torch.stack(each).cpu() / incoming for name, each in sizes.items()}  # [layers, texts, tokens]
    return [
        Seen(
            hidden[:, row, :end],
            attention[:, row, :, :end, :end],
            {name: values[:, row, :end] for name, values in written.items()},
            _lens(model, hidden[1:, row, :end][first:]),
        )
        for row, end in enumerate(map(len, texts))
    ]


@contextmanager
def _sizes_of_outputs(model: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect ‖output‖ [texts, tokens] of every part of every layer that has weight matrices, by its name."""
    sizes: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        sizes.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).float().norm(dim=-1))

    hooks = [
        part.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
        for layer in model.get_submodule(layer_stack(model)).children()
        for name, part in layer.named_children()
        if any(parameter.dim() == 2 for parameter in part.parameters())
    ]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def probe(
    checkpoint: Weights,
    origin: Checkpoint,
    texts: dict[str, list[torch.Tensor]],
    before: dict[str, list[Seen]],
) -> dict[str, Any]:
    """Everything that is compared between a checkpoint and the base, which saw `before`."""
    model = _eager(checkpoint)
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


def drift(before: Seen, after: Seen) -> Layered:
    """Median over tokens of ‖h'−h‖/‖h‖ after each layer, without the first token: its norm is 100 times the others'."""
    old, new = before.hidden[1:, 1:], after.hidden[1:, 1:]
    return ((new - old).norm(dim=-1) / old.norm(dim=-1)).median(dim=1).values


def lens_divergence(before: Seen, after: Seen) -> Layered:
    """KL(base ‖ model) in nats of the next token, if a layer were the last: for all that `after` has a lens of."""
    log_p, log_q = before.lens[-len(after.lens) :], after.lens
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).cpu()


def _lens(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the output layer makes of hidden states [lens layers, tokens, width], of which the last are normalised."""
    tokens, head = hidden.shape[1], cast(nn.Linear, model.get_output_embeddings())
    places = torch.linspace(1, tokens - 1, min(LENS, tokens - 1)).round().long()
    hidden = hidden[:, places].to(head.weight)
    normed = torch.cat([final_norm(model)(hidden[:-1]), hidden[-1:]])
    return head(normed).float().log_softmax(-1)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The normalisation between the last layer and the output layer."""
    stack = layer_stack(model)
    return next(m for path, m in model.named_modules() if is_norm(m) and place(path, stack)[0] == OUTSIDE)


def attention_of(seen: list[Seen]) -> dict[str, Any]:
    """Sink mass (share of attention that goes to the first token) and entropy in bits, by layer and head.

    `sets_in` is the first layer whose sink mass, a mean over its heads, is above SINK; None if there is none.
    """
    sink = torch.stack([each.attention[:, :, 1:, 0].mean(2) for each in seen]).mean(0)
    entropy = torch.stack([-_x_log2(each.attention)[:, :, 1:].sum(-1).mean(2) for each in seen]).mean(0)
    above = (sink.mean(1) > SINK).nonzero()
    return {"sink": sink.tolist(), "entropy": entropy.tolist(), "sets_in": int(above[0]) if len(above) else None}


def written(seen: list[Seen]) -> dict[str, list[float]]:
    """What each part of each layer adds to the hidden states, over their size: medians over tokens but the first."""
    parts = {
        name: torch.stack([each.written[name][:, 1:].median(1).values for each in seen]) for name in seen[0].written
    }
    return {name: values.mean(0).tolist() for name, values in parts.items()}


def attention_divergence(before: Seen, after: Seen) -> torch.Tensor:
    """Jensen-Shannon divergence in bits of where the tokens look, float32 [layers, heads]."""
    p, q = before.attention[:, :, 1:], after.attention[:, :, 1:]
    middle = (p + q) / 2
    return ((_x_log2(p) + _x_log2(q)) / 2 - _x_log2(middle)).sum(-1).mean(-1)


def _x_log2(values: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(values, values) / np.log(2)


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
    other = _eager(base, torch.float32 if compute_dtype() == torch.bfloat16 else torch.bfloat16)
    pairs = list(zip(seen, watch(other, texts, LENS_FROM["off"]), strict=True))
    lens = torch.stack([lens_divergence(*pair) for pair in pairs]).mean(0)
    drifts = torch.stack([drift(*pair) for pair in pairs]).mean(0)
    return {"drift": drifts.tolist(), "lens": lens.tolist(), "kl": float(lens[-1])}


def ablate(stage: VirtualCheckpoint, trained: list[int], settings: params.Params) -> list[dict[str, Any]]:
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


def interval(values: torch.Tensor) -> dict[str, Any]:
    """Mean over texts [texts, …] and its 95 % bootstrap interval."""
    numbers = values.double().numpy()
    drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.percentile(numbers[drawn].mean(1), [2.5, 97.5], axis=0)
    return {"mean": numbers.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}


def _eager(checkpoint: Weights, dtype: torch.dtype | None = None) -> PreTrainedModel:
    model = load_model(checkpoint, dtype or compute_dtype(), device())
    model.set_attn_implementation("eager")  # the others do not tell where the tokens look
    return model


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content


if __name__ == "__main__":
    run(main)
