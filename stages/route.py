"""A model that chooses a stage for each prompt: `python -m stages.route NAME`, of a name under `routers`.

Where a merge adds all that the stages learned, a routed model keeps it apart: it gives a prompt the changes of one
stage with its ancestors, at full strength, or none. Writes routed/NAME: the model that plain transformers loads (base,
changes and router in model.safetensors, their code in modeling_routed.py), and the same as PEFT adapters with
router.json and example.py. What it weighs, and how well it chooses, is in reports/answers/NAME.json.
"""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stages.errors import MistakeError, placed, run
from stages.files import ANSWERS, BASE, CHECKPOINTS, ROUTED, publish, read_json, read_record, rounded, write_json
from stages.merge import base_name, copy_beside
from stages.merging.merged import Merged
from stages.models.architecture import empty_model
from stages.models.classes import class_names
from stages.models.loading import compute_dtype, device, load_model, load_tokenizer
from stages.project.params import PARAMS, Params, load_params
from stages.records.lines import Lines, load_split
from stages.records.record import Record
from stages.routing import modeling_routed
from stages.routing.changes import Change, adapt, named, read_change, save
from stages.routing.loading import load_routed
from stages.routing.modeling_routed import look_at
from stages.routing.router import Router, fit, hidden_states, prompt_ids
from stages.settings.merge import Merge
from stages.weights.checkpoint import Checkpoint, open_base, open_checkpoint, open_stages
from stages.weights.single_file import single_file
from stages.weights.tensor_file import NAMES

HERE = Path(__file__).parent / "routing"
TRAIN, TUNE = 256, 64  # prompts of each dataset
PROVEN = 4  # prompts of each dataset that the written model is held to
MOST = 0.5  # a routed model that is this far from a stage, as a share of the stage's own effect, lacks a part of it

Prompts = tuple[list[list[int]], list[list[int]]]  # token ids of those to train on, and of those to tune on


def main(name: str) -> None:
    """Write routed/NAME and its report."""
    params = load_params()
    choices = params.find("routers", name).stages
    with placed(f"{PARAMS}: routers.{name}: "), publish(ROUTED / name) as folder:
        base, facts = open_base(), provenance(params, choices)
        classes = class_names(empty_model(BASE), base.architecture)
        metadata = {"format": "pt", "strata": json.dumps(facts, sort_keys=True)}
        torch.set_num_threads(1)  # processes share the work, and their number does not change a bit
        changes = [write_adapter(params, choice, folder / "adapters", metadata) for choice in choices]
        torch.set_num_threads(params.thread_count)
        prompts = gather(params, choices, base)
        router, layer, tuning = train(base, prompts)
        settings = {"choices": choices, "layer": layer, "width": router.weight.shape[1], "threshold": router.threshold}
        write_model(base, changes, router, folder, metadata)
        write_code(base, changes, settings, classes, folder)
        weights = {"weight": router.weight.tolist(), "bias": router.bias.tolist()}
        write_json(folder / "router.json", settings | {"base": base_name()[0]} | weights)
        write_json(folder / "lineage.json", facts)
        errors = prove(folder, choices, [ids for _, tune in prompts for ids in tune[:PROVEN]])
    told = {
        choice: {"low_rank": change.bytes(whole=False), "whole": change.bytes(whole=True), "error": error}
        for choice, change, error in zip(choices, changes, errors, strict=True)
    }
    report = {"threshold": router.threshold, "layer": layer, "tuning": tuning, "choices": told}
    write_json(ANSWERS / f"{name}.json", rounded(report))


def provenance(params: Params, choices: list[str]) -> dict[str, Any]:
    """The router's choices and the record of every stage among them, ancestors included; no timestamps."""
    names = {ancestor for choice in choices for ancestor in params.lineage(choice)}
    stages = [read_record(CHECKPOINTS / name) for name in sorted(names)]
    versions = {package: importlib.metadata.version(package) for package in ("peft", "torch", "transformers")}
    return {"router": {"stages": choices}, "base": read_record(BASE), "stages": stages, "versions": versions}


def write_adapter(params: Params, choice: str, folder: Path, metadata: dict[str, str]) -> Change:
    """Write a stage with its ancestors as a PEFT adapter; the same as modules of a routed model."""
    lineage = dict.fromkeys(params.lineage(choice), 1.0)
    merged = Merged(*open_stages(sorted(lineage)), Merge(weights=lineage, outputs=["adapter"]))
    if merged.base.untied_by(merged.changed()):
        raise MistakeError(f"{choice} changes embeddings that the output layer shares; leave that stage out")
    adapter = adapt(merged, params.thread_count)
    change = read_change(merged, adapter)
    with placed(f"{choice} "):
        save(merged, adapter, folder / choice, base_name(), metadata)
    return change


def gather(params: Params, choices: list[str], base: Checkpoint) -> list[Prompts]:
    """Prompts for none, then those of each choice's dataset.

    Where a dataset has no tuning split, the last fifth of its prompts is for tuning; so is every fifth neutral one.
    """
    tokenizer, positions = load_tokenizer(), base.architecture.positions

    def tokens(records: Sequence[Record]) -> list[list[int]]:
        """Of what a tokenizer knows any character of."""
        return [ids for record in records if (ids := prompt_ids(record, tokenizer)[:positions])]

    neutral = tokens(Lines(HERE / "neutral.jsonl"))
    found = [([ids for i, ids in enumerate(neutral) if i % 5], neutral[::5])]
    for choice in choices:
        dataset = params.skills[choice]  # of a selection, the one with prompts
        train, tune = tokens(load_split(dataset, "train")[:TRAIN]), tokens(load_split(dataset, "tune")[:TUNE])
        if len(train) < 2:
            raise MistakeError(f"the dataset {dataset!r} of {choice} has too few prompts to know it by; leave it out")
        kept = len(train) if tune else len(train) - max(1, len(train) // 5)
        found.append((train[:kept], tune or train[kept:]))
    return found


def train(base: Checkpoint, prompts: list[Prompts]) -> tuple[Router, str, dict[str, int]]:
    """The router, the layer that it looks at, and how many of the tuning prompts it gets right."""
    model, tokenizer = load_model(base, compute_dtype(), device()), load_tokenizer()
    layer = f"{base.architecture.stack}.{(base.architecture.layers - 1) // 2}"
    look_at(model.get_submodule(layer))
    hidden, labels = [], []
    for part in range(2):
        ids = [prompt for pair in prompts for prompt in pair[part]]
        hidden.append(hidden_states(model, ids, tokenizer.pad_token_id))
        if not hidden[-1].isfinite().all():
            raise MistakeError(f"what {layer} of the base makes of prompts is not finite; choose another base.dtype")
        labels.append(torch.tensor([number for number, pair in enumerate(prompts) for _ in pair[part]]))
    router = fit(hidden[0], labels[0], hidden[1], labels[1])
    right = int((router.choose(hidden[1]) == labels[1]).sum())
    return router, layer, {"prompts": len(labels[1]), "right": right}


def write_model(
    base: Checkpoint, changes: list[Change], router: Router, folder: Path, metadata: dict[str, str]
) -> None:
    """Write model.safetensors: the base's tensors byte for byte, the changes of every choice and the router."""
    added = {"router.weight": router.weight, "router.bias": router.bias}
    for number, change in enumerate(changes, start=1):
        added |= named(change, number)
    kept = {name: base.file(name).specification(name) for name in base.stored_names}
    layout = kept | {name: (list(values.shape), NAMES[values.dtype]) for name, values in added.items()}
    with single_file(folder / "model.safetensors", layout, metadata) as file:
        for name in kept:
            file.put_pieces(name, base.file(name).pieces(name))
        for name, values in added.items():
            file.put(name, values)


def write_code(
    base: Checkpoint, changes: list[Change], settings: dict[str, Any], classes: tuple[str, str], folder: Path
) -> None:
    """Write what stands beside the weights: tokenizer, config, the code of the model, and the example for adapters."""
    copy_beside(base.folder, folder)
    paths = dict.fromkeys(path for change in changes for path in change.forms)
    forms = {
        path: {str(number): change.forms[path] for number, change in enumerate(changes, 1) if path in change.forms}
        for path in paths
    }
    config = read_json(folder / "config.json")
    config |= {
        "architectures": ["RoutedForCausalLM"],
        "model_type": f"routed_{base.architecture.model_type}",
        "auto_map": {
            "AutoConfig": "modeling_routed.RoutedConfig",
            "AutoModelForCausalLM": "modeling_routed.RoutedForCausalLM",
        },
        "routed": settings | {"changes": forms},
    }
    write_json(folder / "config.json", config)
    code = Path(modeling_routed.__file__).read_text(encoding="utf-8")
    names = ", ".join(classes)
    ending = f"\nfrom transformers import {names}  # noqa: E402\n\nRoutedConfig, RoutedForCausalLM = routed({names})\n"
    (folder / "modeling_routed.py").write_text(code + ending, encoding="utf-8")
    shutil.copy(HERE / "example.py", folder)


def prove(folder: Path, choices: list[str], prompts: list[list[int]]) -> list[float]:
    """How far the written model is from each stage: ‖routed - stage‖/‖stage - base‖ of the logits, in float32.

    Raises:
        MistakeError: it is too far, or what it gives without a choice is not the base's.
    """
    routed = load_routed(folder, BASE, torch.float32, device())
    own = [logits(routed, prompts, number) for number in range(len(choices) + 1)]
    del routed
    base, *stages = (
        logits(load_model(open_checkpoint(name, {}), torch.float32, device()), prompts) for name in ("base", *choices)
    )
    errors = []
    for choice, found, wanted in zip(["base", *choices], own, [base, *stages], strict=True):
        effect = torch.linalg.vector_norm(wanted - base) if choice != "base" else torch.linalg.vector_norm(base) * 1e-3
        errors.append(float(torch.linalg.vector_norm(found - wanted) / effect))
        if not errors[-1] <= MOST:
            raise MistakeError(
                f"the routed model does not say what {choice} says ({errors[-1]:.2g} of its effect is missing), for"
                " this type of base runs modules past their changes; remove the router, and use the merge"
            )
    return errors[1:]


@torch.inference_mode()
def logits(model: Any, prompts: list[list[int]], number: int | None = None) -> torch.Tensor:
    """Those of all tokens of the prompts, one below the other; of a routed model with that choice."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        if number is None:
            found.append(model(input_ids=ids).logits[0])
        else:
            with model.chosen(torch.tensor([number])):
                found.append(model(input_ids=ids).logits[0])
    return torch.cat(found).float().cpu()


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
