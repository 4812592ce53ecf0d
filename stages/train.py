"""Train one stage on top of its parent: `python -m stages.train NAME`.

Writes checkpoints/NAME, a PEFT adapter with stage.json (what it is and where it comes from), and the loss
curve and metrics in reports/train. Killed at any instant, it goes on from its last saved step to the same bits.
"""

import hashlib
import importlib.metadata
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers import get_scheduler

from stages import layers, params
from stages.errors import MistakeError, run
from stages.files import BASE, CHECKPOINTS, DATA, REPORTS, publish, read_json, sha256, write_json, write_text
from stages.methods.stage import Stage, Training
from stages.model import compute_dtype, load_model, load_tokenizer, pad, token_losses
from stages.outside import take
from stages.records import Example, encode, load_split
from stages.resume import load_state, resume_folder, save_state
from stages.weights.checkpoint import open_checkpoint

SAVE_EVERY = 10  # steps; a state is a few times the adapter, so saving costs little beside training


def main(name: str) -> None:
    """Train stage `name` and publish its checkpoint and loss curve."""
    settings = params.load()
    stage = find(name, settings)
    if not isinstance(stage, Training):
        write_reports(name, {"trained_parameters": take(name, settings)}, [])
        return
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # One seed for all stages would give them the same A matrices, which looks like agreement.
    seed = stage_seed(settings.seed, name)
    set_seed(seed)
    record = describe(name, stage, settings, seed)
    code = sha256(sorted(Path("stages").rglob("*.py")))
    with resume_folder(record | {"code": code}) as work:
        dtype = compute_dtype()
        accelerator = Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
        model = put_on(stage, load_model(open_checkpoint(stage.parent, {}), torch.float32), dtype)
        record["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        own, replayed, cut = examples(settings, name, stage)
        model = accelerator.prepare(model)
        curve = fit(model, stage, own, replayed, seed, accelerator, work, title=name)
        with publish(CHECKPOINTS / name) as folder:
            stage.save(accelerator.unwrap_model(model), folder)
            record["sha256"] = sha256([folder / "adapter_config.json", folder / "adapter_model.safetensors"])
            write_json(folder / "stage.json", record)
        write_reports(name, record, curve, cut)


def find(name: str, settings: params.Params) -> Stage:
    """The stage of that name, or a MistakeError that lists the known ones."""
    if name not in settings.stages:
        raise MistakeError(f"params.yaml: stages has no {name!r}; it has {', '.join(settings.stages)}")
    return settings.stages[name]


def stage_seed(seed: int, name: str) -> int:
    """A seed of its own for every stage, from the global seed and the stage's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def describe(name: str, stage: Training, settings: params.Params, seed: int) -> dict[str, Any]:
    """What stage.json tells before training: lineage, data, layers, seed, versions."""
    parent = read_json(CHECKPOINTS / stage.parent / "stage.json")
    num_layers = read_json(BASE / "stage.json")["layers"]
    datasets = [
        stage.dataset,
        *(settings.stages[a].dataset for a in settings.ancestors(name) if stage.replay),
    ]
    return {
        "name": name,
        "parent": stage.parent,
        "parent_sha256": parent["sha256"],
        "dataset": stage.dataset,
        "dataset_sha256": {d: sha256([DATA / d / "train.jsonl"]) for d in dict.fromkeys(datasets)},
        "method": stage.method,
        "layers": layers.numbers(stage.layers, num_layers),
        "settings": stage.model_dump(exclude={"parent", "dataset", "method"}),
        "seed": seed,
        "threads": settings.threads,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def put_on(stage: Training, model: Any, dtype: torch.dtype) -> PeftModel:
    """Wrap the float32 model in the stage's adapter, then hold what is frozen in `dtype`.

    What is trained starts from the exact weights and stays float32: bfloat16 would round small steps away.
    """
    config = stage.adapter_config(model, layers.select(model, stage.layers))
    model.name_or_path = str(CHECKPOINTS / stage.parent)  # what PEFT writes down as the base
    wrapped = get_peft_model(model, config)
    stage.started(wrapped)
    for parameter in wrapped.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped.train()


def examples(settings: params.Params, name: str, stage: Training) -> tuple[list[Example], list[Example], int]:
    """The stage's own examples, those of its ancestors if it replays, and how many were cut to max_length."""
    tokenizer = load_tokenizer()

    def encoded(dataset: str) -> list[Example]:
        found = [encode(record, tokenizer, stage.max_length) for record in load_split(dataset, "train")]
        kept = [example for example in found if example.learned]
        if not kept:
            raise MistakeError(
                f"params.yaml: stages.{name}.max_length {stage.max_length} cuts off every answer of"
                f" dataset {dataset!r}; raise it"
            )
        return kept

    own = encoded(stage.dataset)
    earlier = [settings.stages[a].dataset for a in settings.ancestors(name)] if stage.replay else []
    others = [d for d in dict.fromkeys(earlier) if d != stage.dataset]
    replayed = list(itertools.chain.from_iterable(encoded(d) for d in others))
    cut = sum(len(example.ids) == stage.max_length for example in own)
    return own, replayed, cut


def batches(
    own: list[Example], replayed: list[Example], stage: Training, seed: int, start: int
) -> Iterator[list[Example]]:
    """Batches of steps `start`, `start`+1, …: each a function of the seed and its number alone."""
    share = round(stage.batch_size * stage.replay) if replayed else 0
    for step in range(start, stage.steps):
        mine = [own[i] for i in _draw(len(own), stage.batch_size - share, step, seed)]
        yield mine + [replayed[i] for i in _draw(len(replayed), share, step, seed + 1)]


def _draw(population: int, count: int, step: int, seed: int) -> list[int]:
    """Indices of one step from an endless run of shuffled passes over the population."""
    positions = range(step * count, (step + 1) * count)
    passes = {p // population for p in positions}
    order = {p: torch.randperm(population, generator=torch.Generator().manual_seed((seed << 20) + p)) for p in passes}
    return [int(order[p // population][p % population]) for p in positions]


def fit(
    model: Any,
    stage: Training,
    own: list[Example],
    replayed: list[Example],
    seed: int,
    accelerator: Accelerator,
    work: Path,
    title: str = "",
) -> list[dict[str, float]]:
    """Train the model in place and return its loss curve, going on from the state in `work` if there is one."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=stage.lr, weight_decay=stage.weight_decay)
    schedule = get_scheduler(stage.schedule, optimizer, math.ceil(stage.warmup * stage.steps), stage.steps)
    filler = load_tokenizer().pad_token_id
    curve = _restore(work, trained, optimizer, schedule)
    if not curve:
        # The start of a step is where resuming happens, so the first start is made alike.
        set_seed(seed)
    bar = tqdm(total=stage.steps, initial=len(curve), desc=title, unit="step", dynamic_ncols=True)
    for batch in batches(own, replayed, stage, seed, start=len(curve)):
        rate = schedule.get_last_lr()[0]
        loss, tokens = backward(model, batch, stage.micro_batch_size, filler, accelerator)
        norm = accelerator.clip_grad_norm_(trained.values(), stage.clip)
        if not math.isfinite(loss):
            raise MistakeError(
                f"params.yaml: stages.{title}.lr {stage.lr} made the loss infinite at step {len(curve) + 1}; lower it"
            )
        optimizer.step()
        stage.stepped(accelerator.unwrap_model(model), len(curve))
        schedule.step()
        optimizer.zero_grad()
        curve.append({"step": len(curve) + 1, "loss": loss, "lr": rate, "gradient_norm": float(norm), "tokens": tokens})
        if len(curve) % SAVE_EVERY == 0:
            _save(work, trained, optimizer, schedule, curve)
        bar.set_postfix(loss=f"{loss:.3f}")
        bar.update()
    bar.close()
    return curve


def backward(
    model: Any, batch: list[Example], micro_batch_size: int, filler: int, accelerator: Accelerator
) -> tuple[float, int]:
    """Accumulate the gradient of the mean loss per supervised token of the whole batch.

    Returns:
        That loss in nats, and the number of tokens processed (padding left out).
    """
    learned = sum(example.learned for example in batch)
    batch = sorted(batch, key=lambda example: len(example.ids))  # neighbours of one length need little padding
    total = 0.0
    for start in range(0, len(batch), micro_batch_size):
        piece = pad(batch[start : start + micro_batch_size], filler, accelerator.device)
        with accelerator.autocast():
            losses, weights = token_losses(model, piece)
        loss = (losses * weights).sum() / learned
        accelerator.backward(loss)
        total += float(loss.detach())
    return total, sum(len(example.ids) for example in batch)


def write_reports(name: str, record: dict[str, Any], curve: list[dict[str, float]], cut: int = 0) -> None:
    """Loss curve for `dvc plots` and a few numbers for `dvc metrics`; no times, so that a rerun is identical."""
    metrics = {
        "steps": len(curve),
        "tokens": sum(int(point["tokens"]) for point in curve),
        "trained_parameters": record["trained_parameters"],
        "cut_examples": cut,
    }
    if last := curve[-10:]:  # an imported adapter was trained elsewhere
        metrics = {"loss": round(sum(point["loss"] for point in last) / len(last), 4)} | metrics
    write_json(REPORTS / "train" / f"{name}.json", {name: metrics})
    points = [{"stage": name, "step": point["step"], "loss": round(point["loss"], 5)} for point in curve]
    write_text(REPORTS / "train" / f"{name}.curve.json", json.dumps(points, indent=1) + "\n")


def _save(work: Path, trained: dict[str, Any], optimizer: Any, schedule: Any, curve: list[dict[str, float]]) -> None:
    tensors = {f"weight/{name}": p.detach() for name, p in trained.items()} | {"random": torch.get_rng_state()}
    for name, parameter in trained.items():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    facts = {
        "curve": curve,
        "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
    }
    save_state(work, tensors, facts)


def _restore(work: Path, trained: dict[str, Any], optimizer: Any, schedule: Any) -> list[dict[str, float]]:
    saved = load_state(work)
    if saved is None:
        return []
    tensors, facts = saved
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        keys = [key for key in tensors if key.endswith(f"/{name}") and not key.startswith("weight/")]
        optimizer.state[parameter] = {key.split("/")[0]: tensors[key].to(tensors[key].device) for key in keys}
    schedule.load_state_dict(facts["schedule"] | {"lr_lambdas": [None]})
    for group, rate in zip(optimizer.param_groups, facts["schedule"]["_last_lr"], strict=True):
        group["lr"] = rate
    torch.set_rng_state(tensors["random"])
    return list(facts["curve"])


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
