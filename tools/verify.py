"""How much of each adapter is in a file, made by anybody: `strata verify FILE --base B --adapter A …`.

Or whether it is what was signed (`--key`), or what a bill of materials has (`--sbom`). Needs no project.
Exit code 1 and a sentence for each finding where the file is not the base and the adapters, such as where one is left
out, scaled otherwise, or lost to rounding; docs/verify.md has them all.
"""

from __future__ import annotations

import dataclasses
import json as format_json
import math
import shutil
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

import stages.models.modeling_houlsby  # noqa: F401  makes its models known to transformers
from analysis.changes.verified import Apart, Fitted, fit, set_apart, solve
from analysis.telling.text import percent
from stages.errors import MistakeError, first_line
from stages.files import ADAPTER, read_record, rounded
from stages.models.architecture import describe, empty_model
from stages.models.names import pieces_of, weight_files
from stages.training.importing import try_out
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint
from stages.weights.foreign import names_in_peft, read_config
from stages.weights.tensor_file import TensorFile
from tools.exporting import sbom as bill
from tools.exporting import sign
from tools.terminal import short_names
from tools.verdict import Verified, by_kind, judge, listed, several

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGAIN = "write or copy it again"
WORTH_TELLING = 0.005  # of a change, what rounding takes


def add_arguments(parser: ArgumentParser) -> None:
    """The file, what it was made of, and how much must be there."""
    parser.add_argument("file", type=Path, help="a .safetensors file, or the folder of a model")
    parser.add_argument("--base", type=Path, help="folder of the model that it was made of")
    parser.add_argument(
        "--adapter", type=Path, action="extend", nargs="+", help="folders of PEFT adapters, or of stages"
    )
    parser.add_argument(
        "--expect", type=float, help="the least factor of each adapter (default: 0.9 divided by how many there are)"
    )
    parser.add_argument("--key", type=Path, help="public key of who signed the folder, PEM")
    parser.add_argument("--signature", type=Path, help="made with that key (default: model.sig in the folder)")
    parser.add_argument("--sbom", type=Path, help="bill of materials of the model, CycloneDX")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")


def main(
    file: Path,
    base: Path | None,
    adapter: list[Path] | None,
    expect: float | None,
    key: Path | None,
    signature: Path | None,
    sbom: Path | None,
    json: bool,
) -> None:
    """Print what is in the file, and a sentence for each finding.

    Raises:
        MistakeError: there is a finding, or what the file is to be held against cannot be read or was not said.
    """
    if (base is None) != (adapter is None) or (signature and not key) or not (base or key or sbom):
        raise MistakeError(
            "verify holds a file against --base with --adapter, --key of a signature, or --sbom; give one"
        )
    if not file.exists():
        raise MistakeError(f"{file} is not there; name a .safetensors file, or the folder of a model")
    findings, right = _beside(file, key, signature, sbom)
    figures, rows = {"file": str(file)}, list[str]()
    if base and adapter:
        with tempfile.TemporaryDirectory() as room:
            verified, found = verify(file, base, adapter, expect, Path(room))
        findings, right = [*findings, *found], [*right, *([] if found else [sum_up(verified)])]
        figures, rows = numbers(verified), ["", *table(verified)]
    if json:
        print(format_json.dumps(rounded(figures | {"findings": findings}), indent=2, ensure_ascii=False))
    else:
        print("\n".join([*(f"- {text}" for text in findings or right), *rows]).rstrip())
    if findings:
        raise MistakeError(f"{file} has {len(findings)} finding{'s' if len(findings) > 1 else ''}")


def _beside(file: Path, key: Path | None, signature: Path | None, sbom: Path | None) -> tuple[list[str], list[str]]:
    """Findings of what was given beside the file, and what is said where they are none."""
    findings, right = [], []
    if key:
        signed = signature or file / sign.FILE
        findings += sign.check(file, signed, key)
        right.append(f"{file} is what was signed with the key {key}")
    if sbom:
        findings += bill.check(sbom, file)
        right.append(f"{file} and what it was made of are those of {sbom}")
    return findings, right


def verify(file: Path, base: Path, folders: list[Path], expect: float | None, room: Path) -> tuple[Verified, list[str]]:
    """What a file holds, and a sentence for each finding.

    Args:
        file: of a model, or its folder.
        base: folder of what it is to be made of.
        folders: of the adapters.
        expect: the least factor of each; None for ENOUGH divided by how many they are.
        room: an empty folder for what is written on the way.

    Raises:
        MistakeError: the base or an adapter is none.
    """
    if expect is not None and not math.isfinite(expect):
        raise MistakeError(f"--expect is {expect}; write a number, such as 0.9")
    model = _model(base)
    first = _opened(base, model)
    known, stored = first.architecture, first.stored_names
    copies = [name for name in known.tied if known.pieces.get(name, [(name, [])])[0][0] in stored]
    first.architecture = dataclasses.replace(known, copies=copies)
    adapters = _adapters(folders, first, room)
    verified = Verified(str(file), str(base), adapters, [], expect)
    try:
        second = _opened(file, model)
    except MistakeError as mistake:  # as of a file that is cut short
        return verified, [str(mistake)]
    apart = set_apart(first, second)
    if "router.weight" in apart.extra and any(".changes." in name for name in apart.extra):
        return verified, [f"{file} is a routed model, which keeps the base and each change apart; name a merged file"]
    if parts := [name for name in apart.extra if ".base_layer." in name or ".lora_" in name]:
        beside = f"{file} has an adapter beside its weights, as {parts[0]}; save what merge_and_unload returns"
        return verified, [beside]
    findings = [*_misfits(verified, apart, is_file=file.is_file()), *_ties(verified, first, second)]
    verified.tensors.extend(fit(first, second, adapters, apart))
    return verified, [*findings, *(judge(verified) if verified.tensors else [])]


def _model(base: Path) -> PreTrainedModel:
    """The base without its weights."""
    folder = base if base.is_dir() else base.parent
    if not (folder / "config.json").exists() or not weight_files(base):
        raise MistakeError(
            f"{base} is no model with config.json and model.safetensors or its index; name the base's folder"
        )
    try:
        return empty_model(folder)
    except Exception as error:  # transformers raises what it likes at a config.json that is not as it should be
        raise MistakeError(
            f"{folder / 'config.json'} makes no causal language model ({first_line(error)}); name the base's folder"
        ) from None


def _opened(path: Path, model: PreTrainedModel) -> Checkpoint:
    """A file, or a folder of several, whose tensors are found as transformers would find them for a model."""
    if not any(name for file in weight_files(path) for name in TensorFile(file, AGAIN)):
        raise MistakeError(f"{path} holds no tensors in model.safetensors or files of its index; name the file itself")
    checkpoint = Checkpoint(path, path.name, fix=AGAIN)
    shapes = {name: checkpoint.file(name).specification(name)[0] for name in checkpoint.stored_names}
    checkpoint.architecture = describe(model, pieces_of(model, shapes))
    return checkpoint


def _adapters(folders: list[Path], base: Checkpoint, room: Path) -> list[VirtualCheckpoint]:
    """Adapters on the base, each tried on it."""
    names = short_names(folders)
    if same := next((name for name in names if names.count(name) > 1), ""):
        raise MistakeError(f"--adapter has {same} twice; name each once, in folders of different names")
    adapters = [_adapter(folder, name, base, room) for folder, name in zip(folders, names, strict=True)]
    for adapter, folder in zip(adapters, folders, strict=True):
        try_out(adapter.adapter, base, folder)
    return adapters


def _adapter(folder: Path, name: str, base: Checkpoint, room: Path) -> VirtualCheckpoint:
    """A PEFT adapter on the base, or a stage of Strata's on its parent, which is in the folder beside."""
    config, weights = (folder / each for each in ADAPTER)
    if not config.exists():
        raise MistakeError(f"{folder} is no PEFT adapter, for it has no {config.name}; name the adapter's folder")
    if (folder / "stage.json").exists():
        parent = read_record(folder).get("parent", "base")
        on = base if parent == "base" else _adapter(folder.parent / parent, parent, base, room)
        return VirtualCheckpoint(name, on, folder)
    file = TensorFile(weights, AGAIN)
    around = base.folder if base.folder.is_dir() else base.folder.parent
    names = names_in_peft(file, read_config(config), around, base.architecture)
    if any(key != peft for key, peft in names.items()):
        folder = room / str(len(list(room.iterdir())))
        folder.mkdir()
        shutil.copy(config, folder)
        save_file({peft: file.read(key) for key, peft in names.items()}, folder / weights.name, {"format": "pt"})
    return VirtualCheckpoint(name, base, folder)


def _misfits(verified: Verified, apart: Apart, is_file: bool) -> Iterator[str]:
    """Names, shapes and dtypes that are not the base's."""
    file, base = verified.file, verified.base
    missing, extra = apart.missing, apart.extra
    if prefix := next((e.removesuffix(m) for m in missing for e in extra if e.endswith(f".{m}")), ""):
        yield (
            f"{file} has {prefix} before the names of its tensors, under which nothing loads them; save the model that"
            " is inside"
        )
    else:
        if missing:
            hint = "name its folder if it has several files" if is_file else "write it again whole"
            yield f"{file} lacks {several(missing)}, which {base} has; {hint}"
        if extra:
            yield f"{file} has {several(extra)}, which {base} has not; name the base that has"
    if apart.unlike:
        told = next(iter(apart.unlike.values()))
        yield f"{file} has {several(list(apart.unlike))}, {told} as {base}; name the base that is like it"


def _ties(verified: Verified, base: Checkpoint, file: Checkpoint) -> Iterator[str]:
    """Adapters of one of two modules whose weights the file has in common."""
    for head, source in base.tied.items():
        for adapter in verified.adapters:
            changed = adapter.adapter.modules & {head, source}
            if head in file.tied and len(changed) == 1:
                yield (
                    f"{verified.file} has one weight for {source} and {head}, so that {adapter.name}, which changes"
                    f" {changed.pop()} alone, changes both; store {head}.weight too, with tie_word_embeddings: false"
                )


def sum_up(verified: Verified) -> str:
    """What a file is that is right."""
    factors = [solve(verified.of(number)) for number in range(len(verified.adapters))]
    sizes = " + ".join(
        f"{solved.held[number]:.2f} × {verified.adapters[number].name}" for number, solved in enumerate(factors)
    )
    adapted, changed = [t for t in verified.sound if t.is_adapted], sum(float(t.gram[-1, -1]) for t in verified.sound)
    rest = sum(t.solved.rest - t.solved.rest_right for t in adapted) / changed
    told = f"{verified.file} is {verified.base} + {sizes}, rounded to {verified.dtype}"
    lost = {number: 1 - solved.right[number] for number, solved in enumerate(factors)}
    lost = {number: share for number, share in lost.items() if share >= WORTH_TELLING}
    taken = listed([f"{percent(share)} of {verified.adapters[number].name}" for number, share in lost.items()])
    is_kept = all(factors[number].held[number] > 1 - share / 2 for number, share in lost.items())
    if lost and is_kept and sum(t.solved.rest for t in adapted) <= sum(t.noise for t in adapted):
        return (
            f"{told} stochastically, which takes nothing of them and scatters {percent(rest)} of what changed; rounding"
            f" to the nearest number would take {taken}"
        )
    other = f"a rest of {percent(rest)} of what changed" if rest > WORTH_TELLING else "nothing else"
    return f"{told}, and {other}; rounding takes {taken}" if taken else f"{told}, and {other}"


def table(verified: Verified) -> list[str]:
    """Lines with the factor of each adapter in each kind of module, what a right merge has, and rounding's share."""
    rows = [("adapter", "in", "tensors", "factor", "a right merge", "rounding ÷ change")]
    for adapter, kinds in numbers(verified)["adapters"].items():
        for kind, each in {"all": kinds, **kinds.get("modules", {})}.items():
            if each.get("tensors"):
                told = (f"{each['factor']:.2f}", f"{each['right']:.2f}", percent(each["rounding"]))
                rows.append((adapter, kind, str(each["tensors"]), *told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines if len(lines) > 1 else []


def numbers(verified: Verified) -> dict[str, Any]:
    """All that was measured, for JSON."""
    adapters = {}
    for number, adapter in enumerate(verified.adapters):
        mine = verified.of(number)
        kinds = {kind: _numbers(tensors, number) for kind, tensors in by_kind(mine).items()}
        adapters[adapter.name] = (_numbers(mine, number) | {"modules": kinds}) if mine else {"tensors": 0}
    told = {"file": verified.file, "base": verified.base, "least": verified.least}
    return told | {"dtype": verified.dtype if verified.tensors else None, "adapters": adapters}


def _numbers(tensors: list[Fitted], number: int) -> dict[str, float]:
    solved, size = solve(tensors), sum(tensor.gram[number, number] for tensor in tensors)
    return {
        "tensors": len(tensors),
        "factor": float(solved.held[number]),
        "error": float(solved.error[number]),
        "right": float(solved.right[number]),
        "rounding": float(sum(tensor.lost for tensor in tensors) / size) ** 0.5,
    }
