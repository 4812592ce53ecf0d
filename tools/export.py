"""Take the model away: `strata export WHAT`, which writes to export/ what somebody else runs.

merged/ stays as the merge wrote it. Each WHAT is a module of tools/exporting.
"""

import importlib
import re
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any

from tools.terminal import positive

KINDS = {
    "model": "export/model: the merged model with its card, picture, lineage and a notebook",
    "gguf": "export/gguf: the merge in a file of llama.cpp, and a Modelfile for Ollama",
    "lora": "export/lora: each stage as a plain LoRA, for servers that load nothing else",
    "shards": "export/shards: the merged model in files of a bounded size",
    "sbom": "export/sbom.cdx.json: what the model was made of, as a bill of materials (CycloneDX)",
    "sign": "export/model/model.sig: a signature of its files with your key (OpenSSF model signing)",
    "hub": "push export/model to the Hugging Face hub",
}
TYPES = ("f32", "f16", "bf16", "q8_0")


def add_arguments(parser: ArgumentParser) -> None:
    """What to export, and how."""
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    parsers = {kind: kinds.add_parser(kind, help=text, description=f"{text}.") for kind, text in KINDS.items()}
    folder = re.sub(r"[^\w.-]+", "-", Path.cwd().name) or "model"
    for kind in ("model", "gguf", "sbom"):
        parsers[kind].add_argument("--name", type=name, default=folder, help="what it is called; %(default)s")
    parsers["model"].add_argument("--license", help="of the base, as the hub calls it, where nothing beside it tells")
    parsers["gguf"].add_argument("--type", choices=TYPES, default="q8_0", help="of the weights; %(default)s")
    parsers["gguf"].add_argument(
        "--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py, or a program that takes its arguments"
    )
    parsers["lora"].add_argument("--rank", type=positive, default=64, help="at most so much; %(default)s")
    parsers["lora"].add_argument("--merged", action="store_true", help="the merged model, and no stage by itself")
    parsers["shards"].add_argument("--size", default="2GB", help="of a file at most, such as 500MB; %(default)s")
    parsers["sign"].add_argument(
        "folder", type=Path, nargs="?", default=Path("export/model"), help="what to sign; %(default)s"
    )
    parsers["sign"].add_argument("--key", type=Path, required=True, help="private key on an elliptic curve, PEM")
    parsers["hub"].add_argument("repo", help="where to, owner/name")
    parsers["hub"].add_argument("--public", action="store_true", help="for everybody to see; otherwise private")
    parsers["hub"].add_argument("--dry-run", action="store_true", help="list the files, and push none")


def main(kind: str, **options: Any) -> None:
    """Export one kind of thing."""
    importlib.import_module(f"tools.exporting.{kind}").main(**options)


def name(text: str) -> str:
    """An argument that the hub and a file can be called."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise ArgumentTypeError(f"{text!r} is no name; use letters, digits, points, hyphens and underscores")
    return text
