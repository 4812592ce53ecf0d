"""What training and merging cost on one GPU; `benchmarks/gpu.sh` runs it where there is one.

Two bases: SmolLM2-135M, and a random Llama of 1.1 billion. Each learns passages of the project's own code.
"""

import importlib.util
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
from accelerate.state import AcceleratorState
from subjects import make_synthetic

from stages import base, data, merge, pick, score, train
from stages.files import read_json, write_json
from tests.conftest import make_tokenizer

COMMON = {"parent": "base", "dataset": "code", "lr": 1e-4, "steps": 50, "batch_size": 16, "micro_batch_size": 16}
STAGES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "layers": "all", "rank": 16},
    "top": {"method": "lora", "layers": "last 6", "rank": 16},
    "full": {"method": "full", "layers": "last 6"},
}
FOUR_BIT = {"four": STAGES["lora"] | {"load_in_4bit": True}}
RECORDS, LETTERS = 600, {"smollm2": 3000, "synthetic-1b": 1000}  # about a thousand tokens each


def write(folder: Path, model: str) -> list[str]:
    """Write params.yaml (JSON is YAML), the dataset and the source of the base; returns the stages' names."""
    stages = STAGES | (FOUR_BIT if importlib.util.find_spec("bitsandbytes") else {})
    text = "".join(path.read_text() for path in sorted(ROOT.glob("stages/**/*.py")))
    text *= 1 + RECORDS * LETTERS[model] // len(text)
    passages = [text[start : start + LETTERS[model]] for start in range(0, RECORDS * LETTERS[model], LETTERS[model])]
    write_json(folder / "code.json", [{"text": f"{number}\n{passage}"} for number, passage in enumerate(passages)])
    source = "bundled:smollm2-135m-instruct"
    if model != "smollm2":
        make_synthetic(folder / "made", model)
        source = str(folder / "made/checkpoints/base")
        Path(source, "stage.json").unlink()
        make_tokenizer().save_pretrained(source)
    content = {
        "seed": 0,
        "threads": os.cpu_count(),
        "base": {"model": source, "dtype": "bfloat16"},
        "datasets": {"code": {"source": "file", "path": "code.json", "eval": 50, "score": "loss"}},
        "stages": {stage: COMMON | keys for stage, keys in stages.items()},
        "merge": {"weights": dict.fromkeys(stages, 0.3)},
        "selections": {},
        "routers": {},
        "warn": {},
        "evaluate": {},
    }
    write_json(folder / "params.yaml", content)
    return list(stages)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and GB of the GPU at the peak."""
    AcceleratorState._reset_state(reset_partial_state=True)  # each stage is a process of its own otherwise
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9


def table(model: str) -> None:
    """Run the pipeline's stages one by one in the current folder, and print what each costs."""
    stages = write(Path.cwd(), model)
    base.main()
    data.main("code")
    print(f"\n| {model} | s | tokens per s | peak GB |\n|---|--:|--:|--:|", flush=True)
    for stage in stages:
        seconds, peak = measured(lambda stage=stage: train.main(stage))
        tokens = read_json(Path(f"reports/train/{stage}.json"))[stage]["tokens"]
        print(f"| train {stage} | {seconds:.1f} | {tokens / seconds:.0f} | {peak:.2f} |", flush=True)
    for kind in ("data", "checkpoints"):
        pick.main(kind)
    for label, work in (("merge", merge.main), ("score", lambda: score.main("merged"))):
        seconds, peak = measured(work)
        print(f"| {label} | {seconds:.1f} | – | {peak:.2f} |", flush=True)


def main() -> None:
    """A table for each base."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    for model in LETTERS:
        with tempfile.TemporaryDirectory(prefix="strata-") as name:
            os.chdir(name)
            table(model)
            os.chdir(ROOT)


if __name__ == "__main__":
    main()
