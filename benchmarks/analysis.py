"""Strata's analysis of weights beside what a user would run instead: `python benchmarks/analysis.py`.

Three LoRA stages of rank 16 on all layers: their spectra and overlaps from the factors, one stage's by dense SVDs, by
modeldelta and by weightwatcher, and all that Strata's report tells about weights. README.md tells what the columns are.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, Cost, Imports, measure, measure_imports

from stages.project.params import load_params

sys.path.insert(0, str(ROOT))

from subjects import MODELS, make_stages, make_synthetic, write_params

from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint

RANK = 16
STAGES: dict[str, dict[str, Any]] = {
    name: {"method": "lora", "rank": RANK, "span": (0.0, 1.0), "size": size}
    for name, size in {"first": 0.003, "middle": 0.005, "last": 0.01}.items()
}
CHECKED = 7  # matrices that are also decomposed in float64

START = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
def done(spectra):
    print(f"\\nseconds {time.perf_counter() - start}")
    print("spectra", json.dumps({name: list(map(float, values)) for name, values in spectra.items()}))
"""
CODE = {
    "Strata, factors, three stages": """
from itertools import combinations
from analysis.changes.spectra import effective_rank, singular_values
from analysis.changes.subspaces import interference, overlap, strongest
from stages.weights.checkpoint import open_stages
start = time.perf_counter()
base, stages = open_stages(["first", "middle", "last"])
spectra = {}
for path in stages[0].adapter.modules:
    used = []
    for stage in stages:
        factors = stage.adapter.factors(path)
        values = singular_values(None, factors)
        effective_rank(values)
        used.append(strongest(None, factors))
        if stage is stages[0]:
            spectra[path] = values
    for first, second in combinations(used, 2):
        overlap(first.left, second.left), overlap(first.right, second.right)
    interference(used)
done(spectra)
""",
    "dense SVD in float32, one stage": """
from stages.weights.checkpoint import open_stages
start = time.perf_counter()
base, (stage,) = open_stages(["first"])
done({path: torch.linalg.svdvals(stage.delta(path)["weight"]) for path in stage.adapter.modules})
""",
    "modeldelta, one stage": """
from modeldelta.core.weight_diff import compare_models
from modeldelta.utils.model_loader import get_tensor_map
start = time.perf_counter()
rows, _ = compare_models(get_tensor_map("checkpoints/base"), get_tensor_map("whole"))
found = {row.get("name", row.get("module")): row for row in rows if row["has_svd"]}
done({name.removesuffix(".weight"): row["top_singular_values"] for name, row in found.items()})
""",
    "weightwatcher, one stage": """
import logging, weightwatcher
from transformers import AutoModelForCausalLM
logging.disable(logging.CRITICAL)
start = time.perf_counter()
tuned, base = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in ("whole", "checkpoints/base"))
table = weightwatcher.WeightWatcher(model=tuned).analyze(base_model=base)
assert len(table)
done({})  # it tells of the weights, not of the change
""",
    "Strata, all of the report about weights": """
from analysis.changes.deltas import measure
from stages.project.params import load_params
from stages.merging.merged import Merged, open_merged
from stages.weights.checkpoint import open_stages
start = time.perf_counter()
merge = load_params().merge
base, stages = open_stages(["first", "middle", "last"])
exact, file = Merged(base, stages, merge), open_merged(base, stages, merge)
measure(stages, exact, file)
done({})
""",
}
IMPORTS = {  # by the contender's first word
    "Strata,": "import analysis.changes.deltas, analysis.changes.heads",
    "dense": "import analysis.changes.deltas",
    "modeldelta,": "import modeldelta.core.weight_diff, torch",
    "weightwatcher,": "import weightwatcher; from transformers import AutoModelForCausalLM",
}
MATERIALISE = """
import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("checkpoints/base", dtype=torch.bfloat16)
PeftModel.from_pretrained(model, "checkpoints/first").merge_and_unload().save_pretrained("whole")
"""


@dataclass(frozen=True)
class Row:
    """One contender: its cost, and the singular values that it told of the first stage, by module."""

    contender: str
    cost: Cost
    spectra: dict[str, list[float]]


def prepare(folder: Path, model: str, others: bool) -> None:
    """Make the base, the stages, the merged file, and the first stage as a whole model if others are to look at it."""
    names = list(STAGES)
    write_params(folder, "task_arithmetic", {}, names, STAGES)
    if MODELS[model] is None:
        measure([sys.executable, "-m", "stages.base"], folder)
    else:
        make_synthetic(folder, model)
    write_params(folder, "task_arithmetic", {}, names, STAGES)  # again, for now the depth is known
    make_stages(folder, STAGES)
    measure([sys.executable, "-m", "stages.merge"], folder)
    if others:
        measure([sys.executable, "-c", MATERIALISE], folder)


def run(contender: str, folder: Path, threads: int, imports: Imports) -> Row:
    """Measure one contender."""
    cost, printed = measure([sys.executable, "-c", START + CODE[contender], str(threads)], folder, imports)
    told = next(line for line in printed.splitlines() if line.startswith("spectra "))
    return Row(contender, cost, json.loads(told.removeprefix("spectra ")))


def truth(folder: Path) -> dict[str, list[float]]:
    """Singular values of the first stage's first deltas, by dense decomposition in float64."""
    base = Checkpoint(folder / "checkpoints/base", "base")
    adapter = VirtualCheckpoint("first", base, folder / "checkpoints/first").adapter
    found = {}
    for path in sorted(adapter.modules)[:CHECKED]:
        left, right = adapter.factors(path)  # type: ignore[misc]
        found[path] = torch.linalg.svdvals(left.double() @ right.double())[:RANK].tolist()
    return found


def error(row: Row, exact: dict[str, list[float]]) -> str:
    """Largest error of the first RANK singular values, over the largest of them, as many as are told."""
    worst = 0.0
    for path, values in exact.items():
        worst = max(worst, *(abs(a - b) / values[0] for a, b in zip(row.spectra[path], values, strict=False)))
    return f"{worst:.1e}"


def rank(row: Row, exact: dict[str, list[float]]) -> str:
    """How many singular values of a matrix are above a thousandth of the largest, at most, of those that are told."""
    spectra = [row.spectra[path] for path in exact]
    return str(max(sum(value > 1e-3 * values[0] for value in values) for values in spectra))


def report(model: str, rows: list[Row], exact: dict[str, list[float]]) -> str:
    """All that was measured, as markdown."""
    lines = [
        f"## Three stages of rank {RANK} on {model}",
        "",
        "| contender | seconds | CPU s, all | peak anonymous MB | error of σ | rank told |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cost, told = row.cost, (error(row, exact), rank(row, exact)) if row.spectra else ("–", "–")
        numbers = f"{cost.reported:.2f} | {cost.cpu:.0f} | {cost.anonymous / 1e6:.0f}"
        lines.append(f"| {row.contender} | {numbers} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all contenders and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--contenders", default="", help="those alone whose names begin like this, such as Strata")
    parser.add_argument("--output", type=Path, help="also write the table to this file, after each contender")
    arguments = parser.parse_args()
    threads, rows = load_params(ROOT / "params.yaml").thread_count, []
    with tempfile.TemporaryDirectory(prefix="strata-") as name:
        folder = Path(name)
        contenders = [contender for contender in CODE if contender.startswith(arguments.contenders)]
        prepare(folder, arguments.model, others=any(not contender.startswith("Strata") for contender in contenders))
        exact = truth(folder)
        for contender in contenders:
            print(f"{contender} …", file=sys.stderr, flush=True)
            code = IMPORTS[contender.partition(" ")[0]]
            measure_imports(code, folder)  # the first reads the libraries from the disk
            rows.append(run(contender, folder, threads, measure_imports(code, folder)))
            if arguments.output:
                arguments.output.write_text(report(arguments.model, rows, exact), encoding="utf-8")
    print(report(arguments.model, rows, exact))


if __name__ == "__main__":
    main()
