"""What choosing tokens is worth where half of the answers are wrong: `python benchmarks/selection.py`.

A few right sums train a reference. Many sums, of which half have wrong answers, are then learned as they are, by the
tokens that the reference chooses (`selections`), and, as the best that a choice could do, without the wrong ones. For
each: loss and accuracy on sums that none has seen.
"""

import json
import random
from pathlib import Path
from typing import Any

from measuring import ROOT
from seeds import each_seed, mean_and_each

from stages import select, train
from stages.files import write_json
from stages.models.loading import compute_dtype, load_model, load_tokenizer
from stages.models.scoring import score
from stages.project.params import load_params
from stages.records.lines import load_split
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
    repository = load_params(ROOT / "params.yaml")
    source = {"source": "file", "path": "unused.jsonl", "eval": ASKED}
    content: dict[str, Any] = {
        "seed": seed,
        "threads": repository.thread_count,
        "base": repository.base.model_dump(),
        "datasets": dict.fromkeys(("few", "mixed", "right"), source),
        "selections": {"chosen": {"dataset": "mixed", "parent": "base", "reference": "few", "keep": KEEP}},
        "routers": {},
        "stages": {dataset: COMMON | {"dataset": dataset} for dataset in STAGES.values()},
        "merge": {"weights": {"few": 1.0}},
        "warn": {},
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
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STAGES.values()}

    def run() -> None:
        for name, cells in found.items():
            if name == "chosen":
                select.main(name)
            train.main(name)
            _, (stage,) = open_stages([name])
            model, asked = load_model(stage, compute_dtype()), list(load_split("mixed", "eval"))
            rows = score(model, load_tokenizer(), asked, ["exact"] * len(asked), load_params().evaluate)
            loss = sum(row["loss"] for row in rows) / sum(row["weight"] for row in rows)
            cells.append({"loss": loss, "accuracy": sum(row["score"] for row in rows) / len(rows)})

    def table() -> str:
        lines = ["| learned from | loss | right answers, % |", "|---|--:|--:|"]
        for label, name in STAGES.items():
            loss = mean_and_each([cell["loss"] for cell in found[name]], 2)
            right = mean_and_each([100 * cell["accuracy"] for cell in found[name]], 0)
            lines.append(f"| {label} | {loss} | {right} |")
        return "\n".join(lines)

    each_seed(__doc__, write, run, table)


if __name__ == "__main__":
    main()
