"""What `strata verify` costs: `python benchmarks/verify.py --model 7b`.

Random weights of a Llama's shapes in several files, and three random adapters. The file that is looked at is the base's
own, linked, so that a 7B model takes 14 GB of disk and not 27: every tensor is read from both and solved for, as it
would be in a merged file, and the answer is that nothing of the adapters is there.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import measure, measure_imports
from subjects import MODELS, STAGES, make_stages, make_synthetic


def main(model: str, work: Path | None) -> None:
    """Make the model and print a row of the table."""
    with tempfile.TemporaryDirectory(prefix="strata-", dir=work) as name:
        folder = Path(name)
        make_synthetic(folder, model)
        make_stages(folder)
        (folder / "file").mkdir()
        base = folder / "checkpoints/base"
        for path in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
            (folder / "file" / path.name).symlink_to(path)
        print(row(folder, model))


def row(folder: Path, model: str) -> str:
    """Run the command there and tell what it took, imports apart."""
    stages = " ".join(f"checkpoints/{name}" for name in STAGES)
    command = f"{sys.executable} -m tools.cli verify file --base checkpoints/base --adapter {stages}"
    imports = measure_imports("import tools.verify", folder)
    cost, printed = measure(["sh", "-c", f"{command} 2>&1; exit 0"], folder, imports)
    assert "nothing of first, middle and last is in file" in printed
    size = sum(path.stat().st_size for path in (folder / "file").glob("*.safetensors"))
    return (
        f"{model}, {size / 1e9:.1f} GB: {cost.wall:.0f} s, of which imports {imports.wall:.0f} s; CPU {cost.cpu:.0f} s;"
        f" {cost.anonymous / 1e9:.2f} GB of memory above the imports' {imports.anonymous / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[name for name, shapes in MODELS.items() if shapes], default="synthetic-1b")
    parser.add_argument("--work", type=Path, help="where the temporary folder goes; 14 GB for 7b")
    options = parser.parse_args()
    main(options.model, options.work)
