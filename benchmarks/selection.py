"""What choosing tokens is worth where half of the answers are wrong: `python benchmarks/selection.py`.

A few right sums train a reference. Many sums, of which half have wrong answers, are then learned as they are, by the
tokens that the reference chooses (`selections`), and, as the best that a choice could do, without the wrong ones. For
each: loss and accuracy on sums that none has seen.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import ROOT

sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from stages import base, params, select, train
from stages.files import write_json
from stages.model import compute_dtype, load_model, load_tokenizer
from stages.records import load_split
from stages.score import score
from stages.weights.checkpoint import open_stages

RIGHT, MIXED, ASKED, KEEP = 200, 800, 100, 0.5
COMMON = {"parent": "base", "method": "lora", "layers": "0-11", "rank": 16, "lr": 1.5e-3, "steps": 80}
STAGES = {  # name: what it learns from
    "reference, few right sums": "few",
    "many sums, half of them wrong": "mixed",
    "the tokens that the reference chooses": "chosen",
    "the right ones alone": "right",
}


def write(seed: int) -> None:
    """Write params.yaml (JSON is YAML) and the sums."""
    repository = params.load(ROOT / "params.yaml")
    source = {"source": "file", "path": "unused.jsonl", "eval": ASKED}
    content: dict[str, Any] = {
        "seed": seed,
        "threads": repository.threads,
        "base": repository.base.model_dump(),
        "datasets": dict.fromkeys(("few", "mixed", "right"), source),
        "selections": {"chosen": {"dataset": "mixed", "parent": "base", "reference": "few", "keep": KEEP}},
        "stages": {dataset: COMMON | {"dataset": dataset} for dataset in STAGES.values()},
        "merge": {"weights": {"few": 1.0}},
        "evaluate": {},
    }
    write_json(Path("params.yaml"), content)
    draw = random.Random(seed)
    pairs = draw.sample([(a, b) for a in range(1, 100) for b in range(1, 100)], RIGHT + MIXED + ASKED)
    sums = [{"prompt": f"State the final answer to {a} + {b} =", "completion": f" {a + b}"} for a, b in pairs]
    few, many, asked = sums[:RIGHT], sums[RIGHT:-ASKED], sums[-ASKED:]
    wrong = [record | {"completion": f" {draw.randint(2, 198)}"} for record in many[MIXED // 2 :]]
    right = many[: MIXED // 2]
    mixed = draw.sample(right + wrong, MIXED)
    for name, records in {"few": few, "mixed": mixed, "right": right}.items():
        folder = Path("data") / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in {"train": records, "eval": asked, "tune": []}.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
        write_json(Path(f"reports/data/{name}.json"), {name: {}})


def main() -> None:
    """Train all stages for every seed and print a table: one number per seed in brackets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output.resolve() if arguments.output else None
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STAGES.values()}
    with tempfile.TemporaryDirectory(prefix="strata-") as folder:
        os.chdir(folder)
        for seed in tqdm(range(arguments.seeds), desc="seeds"):
            write(seed)
            if not Path("checkpoints/base").exists():
                base.main()
            for name, cells in found.items():
                if name == "chosen":
                    select.main("chosen")
                train.main(name)
                _, (stage,) = open_stages([name])
                asked = list(load_split("mixed", "eval"))
                model = load_model(stage, compute_dtype())
                cells.append(score(model, load_tokenizer(), asked, params.load().evaluate))
    lines = ["| learned from | loss | right answers |", "|---|--:|--:|"]
    for label, name in STAGES.items():
        loss = ", ".join(f"{cell['loss']:.2f}" for cell in found[name])
        right = ", ".join(f"{100 * cell['accuracy']:.0f}" for cell in found[name])
        means = [statistics.mean(cell[key] for cell in found[name]) for key in ("loss", "accuracy")]
        lines.append(f"| {label} | {means[0]:.2f} ({loss}) | {100 * means[1]:.0f} % ({right}) |")
    text = "\n".join(lines)
    print(f"torch {torch.__version__}; mean (each seed)\n\n{text}")
    if output:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
