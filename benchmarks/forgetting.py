"""What a later stage leaves of an earlier one, and what keeps it: `python benchmarks/forgetting.py`.

A first stage learns made-up facts, a second one other facts of the same form on the same layers: plainly, with
`replay`, with `protect`, and with replay and `surgery`. For each: the loss on both sets of facts, in nats per token.
"""

import json
import random
from pathlib import Path
from typing import Any

from measuring import ROOT
from seeds import each_seed, mean_and_each

from stages import train
from stages.files import write_json
from stages.models.loading import compute_dtype, load_model, load_tokenizer
from stages.models.losses import mean_loss
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.weights.checkpoint import open_stages

FACTS = 48
COMMON = {"method": "lora", "layers": "last 6", "rank": 8, "lr": 2e-3, "steps": 100, "schedule": "constant"}
SECOND: dict[str, dict[str, Any]] = {  # how the second stage is trained
    "plain": {},
    "replay": {"replay": 0.25},
    "protect": {"protect": ["first"]},
    "surgery": {"replay": 0.25, "surgery": "upgrad"},
}


def write(seed: int) -> None:
    """Write params.yaml (JSON is YAML) and the facts of both stages, which share no name."""
    repository = load_params(ROOT / "params.yaml")
    second = {name: COMMON | {"parent": "first", "dataset": "b"} | keys for name, keys in SECOND.items()}
    source = {"source": "file", "path": "unused.jsonl", "eval": 1}
    content = {
        "seed": seed,
        "threads": repository.thread_count,
        "base": repository.base.model_dump(),
        "datasets": {"a": source, "b": source},
        "stages": {"first": COMMON | {"parent": "base", "dataset": "a", "remember": 0.999}} | second,
        "merge": {"weights": {"first": 1.0}},
        "selections": {},
        "routers": {},
        "warn": {},
        "evaluate": {},
    }
    write_json(Path("params.yaml"), content)
    draw = random.Random(seed)
    syllables = ["ba", "ko", "ri", "mu", "ta", "ze", "lo", "vi", "na", "do", "pe", "shu", "gri", "fal", "tor"]

    def name(length: int) -> str:
        return "".join(draw.choice(syllables) for _ in range(length)).capitalize()

    for dataset in "ab":
        folder = Path("data") / dataset
        folder.mkdir(parents=True, exist_ok=True)
        facts = [
            {"prompt": f"The capital of the land of {name(3)} is", "completion": f" {name(2)}"} for _ in range(FACTS)
        ]
        for part in ("train", "eval", "tune"):
            text = "".join(json.dumps(fact) + "\n" for fact in facts)
            (folder / f"{part}.jsonl").write_text(text)


def losses(name: str) -> dict[str, float]:
    """Loss of a stage's effective weights on the facts of both."""
    _, (stage,) = open_stages([name])
    model, tokenizer = load_model(stage, compute_dtype()), load_tokenizer()
    return {dataset: mean_loss(model, tokenizer, list(load_split(dataset, "train")), 16) for dataset in "ab"}


def main() -> None:
    """Train every variant for every seed and print a table: one cell per seed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("first", *SECOND)}

    def run() -> None:
        for name, cells in found.items():
            train.main(name)
            cells.append(losses(name))

    def table() -> str:
        lines = ["| second stage | loss on the first's facts | loss on its own facts |", "|---|--:|--:|"]
        for name, cells in found.items():
            shown = " | ".join(mean_and_each([cell[dataset] for cell in cells], 3) for dataset in "ab")
            lines.append(f"| {'(none yet)' if name == 'first' else name} | {shown} |")
        return "\n".join(lines)

    each_seed(__doc__, write, run, table)


if __name__ == "__main__":
    main()
