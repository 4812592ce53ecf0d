"""Benchmarks that train for several seeds in a project folder of their own and tell one table."""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from measuring import ROOT

sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from stages import base


def each_seed(doc: str | None, write: Callable[[int], None], run: Callable[[], None], table: Callable[[], str]) -> None:
    """Write a project and run it for every seed, then print the table; `doc` describes the command."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    output = arguments.output.resolve() if arguments.output else None
    with tempfile.TemporaryDirectory(prefix="strata-") as folder:
        os.chdir(folder)
        for seed in tqdm(range(arguments.seeds), desc="seeds"):
            write(seed)
            if not Path("checkpoints/base").exists():
                base.main()
            run()
    text = table()
    print(f"torch {torch.__version__}; mean (each seed)\n\n{text}")
    if output:
        output.write_text(text + "\n")


def mean_and_each(values: Sequence[float], digits: int) -> str:
    """Such as `0.52 (0.51, 0.53)`."""
    return f"{statistics.mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"
