"""What training and merging cost on one GPU; `benchmarks/gpu.sh` runs it where there is one."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import ROOT

sys.path.insert(0, str(ROOT))

import torch

from stages import base, data, merge, pick, score, train
from stages.files import read_json, write_json
from stages.project.params import load_params

STAGES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "layers": "all", "rank": 16},
    "top": {"method": "lora", "layers": "last 6", "rank": 16},
    "full": {"method": "full", "layers": "last 12", "lr": 1e-4},
}


def write(folder: Path) -> None:
    """Write params.yaml (JSON is YAML): the repository's base and first dataset, with stages side by side."""
    repository = load_params(ROOT / "params.yaml")
    name, dataset = next(iter(repository.datasets.items()))
    common = {"parent": "base", "dataset": name, "lr": 1e-3, "steps": 100, "batch_size": 64, "micro_batch_size": 64}
    content = {
        "seed": 0,
        "threads": os.cpu_count(),
        "base": repository.base.model_dump() | {"dtype": "bfloat16"},
        "datasets": {name: dataset.model_dump()},
        "stages": {stage: common | keys for stage, keys in STAGES.items()},
        "merge": {"weights": dict.fromkeys(STAGES, 0.3)},
        "selections": {},
        "warn": {},
        "evaluate": {},
    }
    write_json(folder / "params.yaml", content)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and GB of the GPU at the peak."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    """Run the pipeline's stages one by one and print a table."""
    with tempfile.TemporaryDirectory(prefix="strata-") as name:
        folder = Path(name)
        write(folder)
        os.chdir(folder)
        base.main()
        data.main(next(iter(load_params().datasets)))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16\n")
        print("| stage | s | tokens per s | peak GB |\n|---|--:|--:|--:|")
        for stage in STAGES:
            seconds, peak = measured(lambda stage=stage: train.main(stage))
            tokens = read_json(Path(f"reports/train/{stage}.json"))[stage]["tokens"]
            print(f"| train {stage} | {seconds:.1f} | {tokens / seconds:.0f} | {peak:.2f} |", flush=True)
        for kind in ("data", "checkpoints"):
            pick.main(kind)
        for label, work in (("merge", merge.main), ("score", lambda: score.main("merged"))):
            seconds, peak = measured(work)
            print(f"| {label} | {seconds:.1f} | – | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
