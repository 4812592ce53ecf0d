"""Train one stage on top of its parent: `python -m stages.train NAME`.

Writes checkpoints/NAME, a PEFT adapter with stage.json (what it is and where it comes from), and the loss
curve and metrics in reports/train. Killed at any instant, it goes on from its last saved step to the same bits.
"""

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from stages.errors import MistakeError, run
from stages.files import BASE, CHECKPOINTS, DATA, REPORTS, publish, read_json, sha256, write_json, write_text
from stages.models.layers import select
from stages.models.loading import compute_dtype, device, load_model, load_tokenizer, set_weights
from stages.models.losses import pad
from stages.project.params import Params, load_params
from stages.records.lines import load_split
from stages.records.tokens import Example, encode
from stages.settings.ranges import numbers
from stages.settings.stage import Imported, Stage, Training
from stages.training.batches import REPLAY, Source, derive_seed, sources
from stages.training.importing import import_adapter
from stages.training.loop import fit
from stages.training.prefix import Prefix
from stages.training.protection import input_bases, save_bases
from stages.training.quantize import quantize
from stages.training.resume import resume_folder
from stages.training.shard import load_everywhere, shard
from stages.weights.checkpoint import open_checkpoint

REMEMBERED_BATCHES = 16
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
DIVIDED = (DistributedType.FSDP,)


def main(name: str) -> None:
    """Train stage `name` and publish its checkpoint and loss curve."""
    settings = load_params()
    stage: Stage = settings.find("stages", name)
    dtype = compute_dtype()
    # On a CPU accelerate takes every process for the only one, unless it is told.
    accelerator = Accelerator(cpu=device().type == "cpu", mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
    if isinstance(stage, Imported):
        if accelerator.is_main_process:
            write_reports(name, {"trained_parameters": import_adapter(name, stage)}, [])
        return
    assert isinstance(stage, Training)
    torch.set_num_threads(settings.thread_count)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every new tensor would be written once for nothing, which takes 3 % of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # One seed for all stages would give them the same A matrices, which looks like agreement.
    seed = derive_seed(settings.seed, name)
    set_seed(seed)
    record = describe(name, stage, settings, seed)
    in_4bit, divided = getattr(stage, "load_in_4bit", False), accelerator.distributed_type in DIVIDED
    check_launch(name, settings.launch, accelerator, in_4bit)
    if divided:
        load_everywhere()
    code = sha256(sorted(Path("stages").rglob("*.py")))
    with resume_folder(record | {"code": code}, accelerator) as work:
        model = put_on(stage, load_parent(stage, dtype), dtype)
        record["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shown = sources(settings, name, stage, seed)
        if divided:
            shard(model, accelerator)
        else:
            model.to(accelerator.device)
        if in_4bit:
            quantize(model, dtype)
        key = {"parent": lineage(stage.parent), "dtype": dtype, "4bit": in_4bit, "torch": torch.__version__}
        # A process that finds a batch skips layers that the others wait for, so divided layers are not kept.
        prefix = Prefix(model, key, 0 if divided else settings.prefix_cache * 1e9)
        curve = fit(model, stage, shown, seed, accelerator, work, prefix, tuning(stage, name), title=name)
        bases = remember_inputs(model, stage, shown, accelerator) if stage.remember else None
        if accelerator.is_main_process:
            with publish(CHECKPOINTS / name) as folder:
                stage.save(model, folder)
                record["sha256"] = sha256([folder / "adapter_config.json", folder / "adapter_model.safetensors"])
                if bases:
                    save_bases(bases, folder)
                write_json(folder / "stage.json", record)
            write_reports(name, record, curve, cut=sum(source.cut for source in shown))


def check_launch(name: str, launch: str, accelerator: Accelerator, in_4bit: bool) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        MistakeError: the launcher started another number of processes than it was asked for, trains in a way that is
            not known here, or divides a model in four bits.
    """
    kind, started = accelerator.distributed_type, accelerator.num_processes
    asked = re.search(r"--num_processes[= ](\d+)", launch)
    if asked and int(asked[1]) != started:
        raise MistakeError(
            f"params.yaml: launch asks for {asked[1]} processes and gets {started}, for accelerate starts no more on a"
            f" CPU; write launch: torchrun --nproc_per_node {asked[1]}"
        )
    if kind not in REPLICATED + DIVIDED:
        raise MistakeError(
            f"params.yaml: launch asks for {kind.value}, which is not known here; take a config with distributed_type"
            " MULTI_GPU or FSDP, or python"
        )
    if kind in DIVIDED and in_4bit:
        raise MistakeError(
            f"params.yaml: stages.{name}.load_in_4bit does not go with launch, which asks for {kind.value}: four bits"
            " cannot be divided among processes; remove the key, or take a config with distributed_type MULTI_GPU"
        )


def describe(name: str, stage: Training, settings: Params, seed: int) -> dict[str, Any]:
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
        "layers": numbers(stage.layers, num_layers),
        "settings": stage.model_dump(exclude={"parent", "dataset", "method"}),
        "seed": seed,
        "threads": settings.thread_count,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def load_parent(stage: Training, dtype: torch.dtype) -> PreTrainedModel:
    """The model that the stage starts from in `dtype`, the modules of its `layers` in float32."""
    parent = open_checkpoint(stage.parent, {})
    model = load_model(parent, dtype)
    if dtype != torch.float32:
        chosen = select(model, stage.layers)
        for path in chosen:
            model.get_submodule(path).float()
        set_weights(model, parent, chosen)
    return model


def put_on(stage: Training, model: Any, dtype: torch.dtype) -> PeftModel:
    """Wrap the model in the stage's adapter, then hold what is frozen in `dtype`.

    What is trained starts from the exact weights and stays float32: bfloat16 would round small steps away.
    """
    config = stage.adapter_config(model, select(model, stage.layers))
    model.name_or_path = str(CHECKPOINTS / stage.parent)  # what PEFT writes down as the base
    wrapped = get_peft_model(model, config)
    stage.started(wrapped)
    for parameter in wrapped.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if stage.gradient_checkpointing:
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapped.train()


def lineage(name: str) -> list[str]:
    """Hashes of the base and of every stage down to `name`: what its effective weights depend on."""
    record = read_json(CHECKPOINTS / name / "stage.json")
    return [*(lineage(record["parent"]) if name != "base" else []), record["sha256"]]


def tuning(stage: Training, name: str) -> list[Example] | None:
    """Examples of the dataset's tuning split, where the stage keeps its best step."""
    if stage.keep == "last" and stage.patience is None:
        return None
    records = load_split(stage.dataset, "tune")
    if not records:
        raise MistakeError(
            f"params.yaml: stages.{name} looks for its best step, but tune is 0 in its dataset {stage.dataset!r}; give"
            " the tuning split some records, such as 50"
        )
    tokenizer = load_tokenizer()
    return [encode(record, tokenizer, stage.max_length) for record in records]


def remember_inputs(
    model: PeftModel, stage: Training, sources: list[Source], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """A basis of what the stage's own examples put into each weight matrix, for later stages to protect."""
    filler = load_tokenizer().pad_token_id
    shown = [source.batch(step) for source in sources if source.name != REPLAY for step in range(REMEMBERED_BATCHES)]
    batches = (pad(examples, filler, accelerator.device) for examples in shown)
    architecture = open_checkpoint("base", {}).base.architecture
    matrices = [path for path in architecture.select("all") if architecture.is_matrix(path)]
    with accelerator.autocast():
        return input_bases(model, matrices, batches, stage.remember)


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
    points = [
        {"stage": name, "step": point["step"]}
        | {key: round(point[key], 5) for key in ("loss", "tuning_loss") if key in point}
        for point in curve
    ]
    write_text(REPORTS / "train" / f"{name}.curve.json", json.dumps(points, indent=1) + "\n")


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
