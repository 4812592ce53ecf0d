"""How far it goes: `python benchmarks/size.py model`, `stages` or `records`.

`model`: every stage of the pipeline on a random Llama of 1.1 billion in several files, from base to report, with the
time and memory of each. `stages`: a hundred stages in one params.yaml, and how long `dvc repro` that has nothing to do,
`dvc status`, `dvc dag`, `strata plan` and `strata check` take. `records`: a dataset from five million lines of a jsonl
file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
from measuring import measure
from subjects import make_synthetic

from tests.conftest import ARCHITECTURES, make_tokenizer
from tests.forked import Pipeline, copy_repository

RECORDS, STAGES = 5_000_000, 100
LORA = {"parent": "base", "dataset": "sums", "method": "lora", "rank": 16, "lr": 0.001, "steps": 10, "batch_size": 8}
FULL = {"parent": "low", "dataset": "sums", "method": "full", "layers": "10-10", "lr": 1e-5, "steps": 10}


def write_project(base: str, stages: dict[str, Any], dtype: str, threads: int = 2) -> None:
    """params.yaml (JSON is YAML) and a dataset in the current folder."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(20) for b in range(20)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    params = {
        "seed": 0,
        "threads": threads,
        "launch": "python",
        "base": {"model": base, "dtype": dtype},
        "selections": {},
        "routers": {},
        "datasets": {"sums": {"source": "file", "path": "sums.jsonl", "eval": 20}},
        "stages": stages,
        "merge": {"method": "task_arithmetic", "weights": dict.fromkeys(stages, 1.0), "dtype": dtype},
        "evaluate": {"max_new_tokens": 4},
        "warn": {},
    }
    Path("params.yaml").write_text(json.dumps(params), encoding="utf-8")


def told(commands: Iterable[str]) -> None:
    """Run commands of Python one after the other and print what each costs."""
    print("| command | wall s | CPU s | peak memory, GB |\n|---|--:|--:|--:|")
    for command in commands:
        cost, _ = measure([sys.executable, "-m", *command.split()], Path())
        print(f"| {command} | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.total / 1e9:.1f} |", flush=True)


def model() -> None:
    """1.1 billion parameters: LoRA on the last six layers, and on top of it all weights of one layer."""
    make_synthetic(Path("source"), "synthetic-1b")
    base = Path("source/checkpoints/base")
    (base / "stage.json").unlink()
    make_tokenizer().save_pretrained(base)
    write_project(str(base), {"low": LORA | {"layers": "last 6"}, "all": FULL}, "bfloat16")
    models = ["base", "low", "all", "merged"]
    told([
        "stages.base", "stages.data sums", "stages.train low", "stages.train all", "stages.pick data",
        "stages.pick checkpoints", "stages.merge", *(f"stages.score {name}" for name in models), "stages.evaluate",
        *(f"analysis.probe {name}" for name in models), "analysis.measure", "analysis.report",
    ])  # fmt: skip


def stages() -> None:
    """A hundred stages, ten chains of ten, on a tiny model."""
    ARCHITECTURES["llama-untied"]().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    names = [f"stage{number:03}" for number in range(STAGES)]
    parents = ["base" if number % 10 == 0 else names[number - 1] for number in range(STAGES)]
    made = {
        name: LORA | {"parent": parent, "layers": "0-1", "rank": 2, "steps": 2}
        for name, parent in zip(names, parents, strict=True)
    }
    write_project("model", made, "float32", threads=1)
    copy_repository(Path())
    with pytest.MonkeyPatch.context() as patch:  # stages run in forks of this process
        Pipeline(patch).repro()
    told(["dvc repro", "dvc status", "dvc dag", "tools.cli plan", "tools.cli check"])


def records() -> None:
    """Five million prompts with completions, of which 100 are asked."""
    with Path("big.jsonl").open("w", encoding="utf-8") as file:
        for number in range(RECORDS):
            file.write(json.dumps({"prompt": f"What is {number} + 1?", "completion": str(number + 1)}) + "\n")
    write_project("model", {"a": LORA | {"layers": "0-1"}}, "float32")
    params = json.loads(Path("params.yaml").read_text(encoding="utf-8"))
    params["datasets"]["sums"] = {"source": "file", "path": "big.jsonl", "eval": 100}
    Path("params.yaml").write_text(json.dumps(params), encoding="utf-8")
    print(f"{RECORDS:,} records, {Path('big.jsonl').stat().st_size / 1e9:.2f} GB")
    told(["stages.data sums"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["model", "stages", "records"])
    parser.add_argument("--work", type=Path, help="where the temporary folder goes; 8 GB for the model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="strata-", dir=options.work) as folder:
        os.chdir(folder)
        {"model": model, "stages": stages, "records": records}[options.what]()
        os.chdir("/")
