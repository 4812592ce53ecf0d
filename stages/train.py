"""Train one stage on top of its parent: `python -m stages.train NAME`.

Writes checkpoints/NAME, a PEFT adapter with stage.json (what it is and where it comes from), and the loss
curve and metrics in reports/train. Killed at any instant, it goes on from its last saved step to the same bits.
"""

import hashlib
import importlib.metadata
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from stages.errors import MistakeError, run
from stages.files import ADAPTER, BASE, CHECKPOINTS, REPORTS, publish, read_json, sha256, write_json, write_text
from stages.models.layers import select
from stages.models.loading import compute_dtype, device, load_model, load_tokenizer, set_weights
from stages.models.losses import pad
from stages.project.check import check_against_base, load_checked
from stages.project.params import Params
from stages.records.tokens import Example
from stages.settings.ranges import numbers
from stages.settings.stage import Imported, Stage, Training
from stages.training.batches import Source, derive_seed, encode_split, hash_of, replays, sources
from stages.training.importing import import_adapter
from stages.training.loop import fit
from stages.training.prefix import Prefix
from stages.training.protection import BASES, input_bases, save_bases
from stages.training.quantize import quantize
from stages.training.resume import resume_folder
from stages.training.shard import load_everywhere, shard
from stages.weights.checkpoint import open_checkpoint

REMEMBERED_BATCHES = 16
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
DIVIDED = (DistributedType.FSDP,)
STARTED = "STRATA_LAUNCHED"  # the stage whose launcher was started, as some launchers do not tell
LAUNCHED = {STARTED, "LOCAL_RANK", "WORLD_SIZE"}  # what a process finds in its environment that a launcher has started
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def main(name: str) -> None:
    """Train stage `name` and publish its checkpoint and loss curve."""
    settings = load_checked()
    check_against_base(settings)
    stage: Stage = settings.find("stages", name)
    if isinstance(stage, Imported):
        write_reports(name, {"trained_parameters": import_adapter(name, stage, lineage(stage.parent))}, [])
        return
    assert isinstance(stage, Training)
    launch(name, settings.launch, stage.processes)
    dtype = compute_dtype()
    # On a CPU accelerate takes every process for the only one, unless it is told.
    accelerator = Accelerator(cpu=device().type == "cpu", mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
    check_processes(name, stage, accelerator)
    torch.set_num_threads(settings.thread_count)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode fills every new tensor; switching that off saves 3 % of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # One seed for all stages would give them the same A matrices, which looks like agreement.
    seed = derive_seed(settings.seed, name)
    set_seed(seed)
    record = describe(name, stage, settings, seed)
    code = sha256(sorted(Path("stages").rglob("*.py")))
    with resume_folder(record | {"code": code, "device": accelerator.device.type}, accelerator) as work:
        model = build(stage, dtype, accelerator)
        record["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shown = sources(settings, name, stage, seed)
        key = {key: record[key] for key in ("lineage", "threads", "versions")}
        key |= {"dtype": dtype, "device": accelerator.device.type, "4bit": in_4bit(stage)}
        # The cache is off with FSDP: a hit would skip layers whose weights the other processes are waiting to gather.
        prefix = Prefix(model, key, 0 if is_divided(accelerator) else settings.prefix_cache * 1e9)
        curve = fit(model, stage, shown, seed, accelerator, work, prefix, tuning(stage, name), title=name)
        bases = remember_inputs(model, stage, shown, accelerator) if stage.remember else None
        if accelerator.is_main_process:
            with publish(CHECKPOINTS / name) as folder:
                stage.save(model, folder)
                record["sha256"] = sha256(folder / file for file in ADAPTER)
                if bases:
                    save_bases(bases, folder)
                    record["inputs_sha256"] = sha256([folder / BASES])
                write_json(folder / "stage.json", record)
            write_reports(name, record, curve, cut=sum(source.cut for source in shown))


def launch(name: str, command: str, processes: int) -> None:
    """Become the launcher that starts this stage's processes, where there are to be several or the user has one.

    Args:
        name: of the stage.
        command: `launch` of params.yaml.
        processes: of the stage.

    Raises:
        MistakeError: there is no such command.
    """
    words = launcher(command, processes)
    if not words or LAUNCHED & os.environ.keys():
        return
    os.environ[STARTED] = name
    try:
        os.execvp(words[0], [*words, "-m", "stages.train", name])
    except OSError as error:
        raise MistakeError(
            f"params.yaml: launch starts with {words[0]!r}, which does not start ({error.strerror}); write python,"
            " torchrun or a command that is installed"
        ) from None


def launcher(command: str, processes: int) -> list[str]:
    """Words of the command that starts a stage's processes; none where one process trains alone.

    `python` and `torchrun` without more words start as many as the stage asks for.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MistakeError(f"params.yaml: launch {command!r} is no command ({error}); correct it") from None
    if words in ([], ["python"], ["torchrun"]):
        words = ["python", *TORCHRUN, str(processes)] if processes > 1 else []
    return [sys.executable if word == "python" else word for word in words]


def check_processes(name: str, stage: Training, accelerator: Accelerator) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        MistakeError: the launcher started another number of processes than the stage asks for, trains in a way that is
            not known here, or divides a model in four bits.
    """
    kind, started = accelerator.distributed_type, accelerator.num_processes
    if started != stage.processes:
        raise MistakeError(
            f"params.yaml: stages.{name}.processes is {stage.processes}, but launch started {started}; write processes:"
            f" {started}, or launch: torchrun, which starts as many as a stage asks for"
        )
    if kind not in REPLICATED + DIVIDED:
        raise MistakeError(
            f"params.yaml: launch asks for {kind.value}, which is not known here; take a config with distributed_type"
            " MULTI_GPU or FSDP, or python"
        )
    if is_divided(accelerator) and in_4bit(stage):
        raise MistakeError(
            f"params.yaml: stages.{name}.load_in_4bit does not go with launch, which asks for {kind.value}: four bits"
            " cannot be divided among processes; remove the key, or take a config with distributed_type MULTI_GPU"
        )


def is_divided(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the frozen weights alone (FSDP)."""
    return accelerator.distributed_type in DIVIDED


def in_4bit(stage: Training) -> bool:
    """Whether the frozen matrices are held in four bits, as some methods can."""
    return getattr(stage, "load_in_4bit", False)


def describe(name: str, stage: Training, settings: Params, seed: int) -> dict[str, Any]:
    """The part of stage.json that is known before training: lineage, data, layers, seed, versions."""
    num_layers = read_json(BASE / "stage.json")["layers"]
    data = {stage.dataset: hash_of(stage.dataset, ["train", "tune"] if stage.is_tuned else ["train"])}
    data |= {dataset: hash_of(dataset) for dataset in replays(settings, name, stage)}
    return {
        "name": name,
        "parent": stage.parent,
        "parent_sha256": read_json(CHECKPOINTS / stage.parent / "stage.json")["sha256"],
        "lineage": lineage(stage.parent),
        "dataset": stage.dataset,
        "dataset_sha256": data,
        "method": stage.method,
        "layers": numbers(stage.layers, num_layers),
        "settings": stage.model_dump(exclude={"parent", "dataset", "method"}),
        "seed": seed,
        "threads": settings.thread_count,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def lineage(name: str) -> dict[str, str]:
    """A hash of the base and of every stage down to `name`, the base first: of all that a descendant may read of it.

    Of a stage these are its adapter, the inputs that it remembers and its data. Of the base all but the weights are
    small files, and stage.json among them has the weights' hash.
    """
    if name == "base":
        small = (file for file in BASE.rglob("*") if file.is_file() and file.suffix != ".safetensors")
        return {name: sha256(sorted(small))}
    record = read_json(CHECKPOINTS / name / "stage.json")
    read = {key: record.get(key) for key in ("sha256", "inputs_sha256", "dataset_sha256")}
    return lineage(record["parent"]) | {name: hashlib.sha256(json.dumps(read).encode()).hexdigest()}


def build(stage: Training, dtype: torch.dtype, accelerator: Accelerator) -> PeftModel:
    """The parent with the stage's adapter on it, where it trains."""
    divided = is_divided(accelerator)
    if divided:
        load_everywhere()
    model = put_on(stage, load_parent(stage, dtype), dtype)
    if divided:
        shard(model, accelerator)
        return model
    if in_4bit(stage):
        quantize(model, dtype, accelerator.device)
    return model.to(accelerator.device)


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
    """Wrap the model in the stage's adapter, then cast the frozen weights to `dtype`.

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


def tuning(stage: Training, name: str) -> list[Example] | None:
    """Examples of the dataset's tuning split, where the stage looks at it.

    Raises:
        MistakeError: `max_length` cuts off every answer.
    """
    if not stage.is_tuned:
        return None
    return list(encode_split([stage.dataset], "tune", name, stage))


def remember_inputs(
    model: PeftModel, stage: Training, sources: list[Source], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """A basis of what the stage's own examples put into each weight matrix, for later stages to protect."""
    filler = load_tokenizer().pad_token_id
    shown = [source.batch(step) for source in sources if not source.replayed for step in range(REMEMBERED_BATCHES)]
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
