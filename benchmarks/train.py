"""Strata's training beside what a user would run instead: `python benchmarks/train.py`.

transformers' Trainer, TRL's SFTTrainer and Strata train the same LoRA from the same seed on the same batches of
SmolLM2-135M, each in a process of its own, one after the other; README.md tells what the columns mean.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from measuring import ROOT, Cost, Imports, measure, measure_imports

sys.path.insert(0, str(ROOT))

from transformers import AutoTokenizer

from stages.files import write_json
from stages.project.params import load_params
from stages.records.tokens import encode
from stages.training.batches import Source, derive_seed

SETTINGS = {"rank": 8, "alpha": 16.0, "lr": 1e-3, "batch_size": 8, "micro_batch_size": 8, "schedule": "cosine"}
EXAMPLES, LENGTH, PASSES = 64, 128, 3
CASES = {  # name: layers, share of tokens that are learned
    "top 6 layers, 25 % of tokens learned": ("last 6", 0.25),
    "top 6 layers, all tokens learned": ("last 6", 1.0),
    "all layers, 25 % of tokens learned": ("all", 0.25),
    "all layers, all tokens learned": ("all", 1.0),
}
IMPORTS = {
    "Trainer": "import transformers; from transformers import Trainer, AutoModelForCausalLM; import peft",
    "SFTTrainer": "from trl import SFTTrainer; from transformers import AutoModelForCausalLM; import peft",
    "Strata": "import stages.train",
}
STRATA = """
import json, sys, time
import stages.training.loop, stages.train
fit, step, ends = stages.train.fit, stages.training.loop.Run.step, []
def stepped(*args):
    point = step(*args)
    ends.append(time.perf_counter())
    return point
def timed(*args, **kwargs):
    start = time.perf_counter()
    curve = fit(*args, **kwargs)
    print(f"\\nseconds {time.perf_counter() - start}\\nlosses {json.dumps([point['loss'] for point in curve])}")
    print("ends", json.dumps([end - start for end in ends]))
    return curve
stages.training.loop.Run.step, stages.train.fit = stepped, timed
stages.train.main("one")
"""
OTHERS = """
import json, sys, time
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from stages.models.layers import select
from stages.project.params import load_params
name, dtype = sys.argv[1:]
settings = load_params(); stage = settings.stages["one"]
torch.set_num_threads(settings.thread_count)
set_seed(int(open("seed").read()))
model = AutoModelForCausalLM.from_pretrained("checkpoints/base", dtype=torch.float32)
config = stage.adapter_config(model, select(model, stage.layers))
rows = [json.loads(line) for line in open("batches.jsonl")]
if dtype == "bfloat16":  # as Strata does: what is frozen in bfloat16, what is trained in float32
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
else:
    model = get_peft_model(model, config)
common = dict(
    output_dir="out", max_steps=stage.steps, per_device_train_batch_size=stage.batch_size, learning_rate=stage.lr,
    lr_scheduler_type=stage.schedule, warmup_steps=-(-stage.steps // 10), max_grad_norm=stage.clip, weight_decay=0.0,
    logging_steps=1, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
    bf16=dtype == "bfloat16", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    train_sampling_strategy="sequential",
)
tokenizer = AutoTokenizer.from_pretrained("checkpoints/base")
if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token
if name == "Trainer":
    def collate(found):
        longest = max(len(row["input_ids"]) for row in found)
        def padded(key, filler):
            return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in found])
        ids = padded("input_ids", tokenizer.pad_token_id)
        return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": padded("attention_mask", 0)}
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    trainer = Trainer(model, TrainingArguments(**common), train_dataset=Dataset.from_list(rows), data_collator=collate)
else:
    from trl import SFTConfig, SFTTrainer
    arguments = SFTConfig(**common, max_length=None, gradient_checkpointing=False,
                          dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
start = time.perf_counter()
trainer.train()
print(f"\\nseconds {time.perf_counter() - start}")
print("losses", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
"""


@dataclass(frozen=True)
class Row:
    """One contender in one case: its cost, its loss at every step, and of Strata when each step ended, in seconds."""

    contender: str
    cost: Cost
    losses: list[float]
    ends: list[float]

    def passes(self) -> str:
        """Seconds of each pass over the examples."""
        marks = [0.0, *self.ends[EXAMPLES // SETTINGS["batch_size"] - 1 :: EXAMPLES // SETTINGS["batch_size"]]]
        return ", ".join(f"{end - start:.1f}" for start, end in itertools.pairwise(marks))


def prepare(folder: Path, dtype: str) -> None:
    """Make the base, once for all cases."""
    write(folder, "all", dtype)
    # The base alone asks for a dataset that can be read; every case has another.
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(3)))
    measure([sys.executable, "-m", "stages.base"], folder)


def write(folder: Path, layers: str, dtype: str) -> None:
    """Write params.yaml (JSON is YAML)."""
    repository = load_params(ROOT / "params.yaml")
    stage = {"parent": "base", "dataset": "text", "method": "lora", "layers": layers, **SETTINGS}
    content = {
        "seed": 0,
        "threads": repository.thread_count,
        "base": {"model": "bundled:smollm2-135m-instruct", "dtype": dtype},
        "datasets": {"text": {"source": "file", "path": "text.jsonl", "eval": 1}},
        "stages": {"one": stage | {"steps": EXAMPLES // SETTINGS["batch_size"] * PASSES}},
        "merge": {"weights": {"one": 1.0}},
        "selections": {},
        "routers": {},
        "warn": {},
        "evaluate": {},
    }
    write_json(folder / "params.yaml", content)


def write_examples(folder: Path, share: float) -> None:
    """Passages of the project's own documents as prompts and completions, and the batches that Strata makes of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoints/base")
    text = "".join(path.read_text() for path in sorted(ROOT.glob("**/*.py")) if "stages" in path.parts)
    ids = tokenizer(text)["input_ids"]
    learned = round(share * LENGTH)
    records = []
    for start in range(0, EXAMPLES * LENGTH, LENGTH):
        passage = ids[start : start + LENGTH - 1]
        prompt, completion = (tokenizer.decode(part) for part in (passage[:-learned], passage[-learned:]))
        records.append({"prompt": prompt, "completion": completion} if share < 1 else {"text": prompt + completion})
    (folder / "data/text").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    for part in ("train", "eval", "tune"):
        (folder / f"data/text/{part}.jsonl").write_text("".join(lines))
    settings = load_params(folder / "params.yaml")
    stage = settings.stages["one"]
    seed = derive_seed(0, "one")
    (folder / "seed").write_text(str(seed))
    examples = [example for record in records for example in encode(record, tokenizer, 1024)]
    source = Source("text", examples, stage.batch_size, derive_seed(0, "text"), seed)
    with (folder / "batches.jsonl").open("w") as file:
        for step in range(stage.steps):
            for example in source.batch(step):
                labels = [i if w else -100 for i, w in zip(example.ids, example.weights, strict=True)]
                file.write(json.dumps({"input_ids": example.ids, "labels": labels}) + "\n")


def compete(folder: Path, dtype: str, imports: dict[str, Imports]) -> list[Row]:
    """Run every contender; Strata twice, for the second finds what the first one's frozen layers made."""
    shutil.rmtree(folder / ".dvc", ignore_errors=True)
    commands = {
        "Trainer": [sys.executable, "-c", OTHERS, "Trainer", dtype],
        "SFTTrainer": [sys.executable, "-c", OTHERS, "SFTTrainer", dtype],
        "Strata": [sys.executable, "-c", STRATA],
        "Strata, again": [sys.executable, "-c", STRATA],
    }
    rows = []
    for contender, command in commands.items():
        print(f"  {contender} …", file=sys.stderr, flush=True)
        cost, printed = measure(command, folder, imports[contender.partition(",")[0]])
        rows.append(Row(contender, cost, told(printed, "losses"), told(printed, "ends")))
    return rows


def told(printed: str, word: str) -> list[float]:
    """The numbers of the line that begins with `word`; none without one."""
    lines = [line.removeprefix(f"{word} ") for line in printed.splitlines() if line.startswith(f"{word} ")]
    return [float(number) for number in json.loads(lines[0])] if lines else []


def table(case: str, rows: list[Row], kept: float) -> str:
    """One case as markdown; ratios are the other's seconds over Strata's."""
    ours = next(row for row in rows if row.contender == "Strata")
    lines = [
        f"### {case}",
        "",
        "| contender | training s | ÷ Strata | CPU s, all | peak anonymous MB | last loss | largest difference |",
        "|---|" + "--:|" * 6,
    ]
    for row in rows:
        gap = max(abs(a - b) for a, b in zip(row.losses, ours.losses, strict=True))
        seconds, ratio = row.cost.reported, row.cost.reported / ours.cost.reported
        lines.append(
            f"| {row.contender} | {seconds:.1f} | {ratio:.2f} | {row.cost.cpu:.0f} | {row.cost.anonymous / 1e6:.0f}"
            f" | {row.losses[-1]:.4f} | {gap:.1e} |"
        )
    passes = "; ".join(f"{row.contender}: {row.passes()} s" for row in rows if row.ends)
    notes = f"Seconds of each pass: {passes}. Kept on disk by the prefix cache: {kept / 1e6:.0f} MB."
    return "\n".join([*lines, "", notes, ""])


def main() -> None:
    """Run every case and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))), help="numbers, comma-separated")
    parser.add_argument("--output", type=Path, help="also write the tables to this file, after each case")
    arguments = parser.parse_args()
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft", "trl"))
    parts = [f"{packages}; {arguments.dtype}; {EXAMPLES} examples of {LENGTH} tokens, {PASSES} passes.\n"]
    with tempfile.TemporaryDirectory(prefix="strata-") as name:
        folder = Path(name).resolve()
        prepare(folder, arguments.dtype)
        imports = {contender: measure_imports(code, folder) for contender, code in IMPORTS.items()}
        for number in map(int, arguments.cases.split(",")):
            case, (layers, share) = list(CASES.items())[number]
            print(f"{case} …", file=sys.stderr, flush=True)
            write(folder, layers, arguments.dtype)
            write_examples(folder, share)
            rows = compete(folder, arguments.dtype, imports)
            kept = sum(path.stat().st_size for path in (folder / ".dvc").rglob("prefix/*/*.safetensors"))
            parts.append(table(case, rows, kept))
            if arguments.output:
                arguments.output.write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))


if __name__ == "__main__":
    main()
