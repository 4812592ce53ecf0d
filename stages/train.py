"""Train one stage on top of its parent: `python -m stages.train NAME`.

Writes checkpoints/NAME, a PEFT adapter with stage.json (what it is and where it comes from), and the loss
curve and what it took in reports/train. Killed at any instant, it goes on from its last saved step to the same bits.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from stages.errors import placed, run
from stages.files import ADAPTER, CHECKPOINTS, REPORTS, TRACKED, publish, sha256, write_json, write_text
from stages.models.loading import compute_dtype, device
from stages.project.check import check_against_base, load_checked
from stages.project.params import Params
from stages.settings.stage import Imported, Stage, Training
from stages.training.batches import derive_seed, encode_split, sources
from stages.training.importing import import_adapter
from stages.training.launch import check_processes, launch
from stages.training.loop import Curve, fit
from stages.training.model import build, refuse_moved, refuse_unsaved, sums_of_frozen
from stages.training.prefix import Prefix
from stages.training.protection import BASES, remember_inputs, save_bases
from stages.training.quantize import in_4bit
from stages.training.record import describe, lineage
from stages.training.resume import resume_folder
from stages.training.shard import is_divided


def main(name: str) -> None:
    """Publish the checkpoint of stage `name`, which is trained or imported, and what reports/train has of it."""
    settings = load_checked()
    check_against_base(settings)
    stage: Stage = settings.find("stages", name)
    if isinstance(stage, Training):
        launch(name, settings.launch, stage.processes)
    precision = "bf16" if compute_dtype() == torch.bfloat16 else "no"
    tracked = Path(os.environ.get("DVC_ROOT", "."), TRACKED).absolute()
    os.environ.setdefault("TRACKIO_DIR", str(tracked))  # accelerate tells Trackio no folder
    # On a CPU accelerate takes every process for the only one, unless it is told.
    accelerator = Accelerator(
        cpu=device().type == "cpu",
        mixed_precision=precision,
        log_with=settings.tracker,
        project_dir=tracked,
    )
    accelerator.init_trackers(name)
    if isinstance(stage, Training):
        check_processes(name, stage, accelerator)
        train(name, stage, settings, accelerator)
    elif isinstance(stage, Imported) and accelerator.is_main_process:
        write_reports(name, {"trained_parameters": import_adapter(name, stage, lineage(stage.parent))}, [])


def train(name: str, stage: Training, settings: Params, accelerator: Accelerator) -> None:
    """Train the stage in this process and those beside it, of which the main one publishes it."""
    torch.set_num_threads(settings.thread_count)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode fills every new tensor; switching that off saves 3 % of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # One seed for all stages would give them the same A matrices, which looks like agreement.
    seed = derive_seed(settings.seed, name)
    set_seed(seed)
    dtype, record = compute_dtype(), describe(name, stage, settings, seed)
    code = sha256(sorted(Path("stages").rglob("*.py")))
    with resume_folder(record | {"code": code, "device": accelerator.device.type}, accelerator) as work:
        model = build(name, stage, dtype, accelerator)
        record["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shown = sources(settings, name, stage, seed)
        tuning = list(encode_split([stage.dataset], "tune", name, stage)) if stage.is_tuned else None
        key = {key: record[key] for key in ("lineage", "threads", "versions")}
        key |= {"dtype": dtype, "device": accelerator.device.type, "4bit": in_4bit(stage)}
        # The cache is off with FSDP: a hit would skip layers whose weights the other processes are waiting to gather.
        prefix = Prefix(model, key, 0 if is_divided(accelerator) else settings.prefix_cache * 1e9)
        before = {} if is_divided(accelerator) else sums_of_frozen(model)
        tell = functools.partial(write_curve, name) if accelerator.is_main_process else lambda curve: None
        curve = fit(model, stage, shown, seed, accelerator, work, prefix, tuning, title=name, tell=tell)
        bases = remember_inputs(model, stage.remember, shown, accelerator) if stage.remember else None
        if accelerator.is_main_process:
            with publish(CHECKPOINTS / name) as folder, placed(f"params.yaml: stages.{name}."):
                refuse_moved(stage, model, before)
                stage.save(model, folder)
                refuse_unsaved(stage, model, folder)
                record["sha256"] = sha256(folder / file for file in ADAPTER)
                if bases:
                    save_bases(bases, folder)
                    record["inputs_sha256"] = sha256([folder / BASES])
                write_json(folder / "stage.json", record)
            write_reports(name, record, curve, cut=sum(source.cut for source in shown))
    accelerator.end_training()


def write_reports(name: str, record: dict[str, Any], curve: Curve, cut: int = 0) -> None:
    """Loss curve for `dvc plots` and a few numbers for the report; no times, so that a rerun is identical."""
    spent = {
        "steps": len(curve),
        "tokens": sum(int(point["tokens"]) for point in curve),
        "trained_parameters": record["trained_parameters"],
        "cut_examples": cut,
    }
    if last := curve[-10:]:  # an imported adapter was trained elsewhere
        spent = {"loss": round(sum(point["loss"] for point in last) / len(last), 4)} | spent
    write_json(REPORTS / "train" / f"{name}.json", {name: spent})
    write_curve(name, curve)


def write_curve(name: str, curve: Curve) -> None:
    """The losses so far, for `dvc plots` and `strata watch`."""
    points = [
        {"stage": name, "step": point["step"]}
        | {key: round(point[key], 5) for key in ("loss", "tuning_loss") if key in point}
        for point in curve
    ]
    write_text(REPORTS / "train" / f"{name}.curve.json", json.dumps(points, indent=1) + "\n")


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
