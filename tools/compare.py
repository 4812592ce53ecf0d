"""What sets models apart, layer by layer: `strata compare A B [C …]`.

A is a folder with a model's safetensors; each of the others is such a folder or a PEFT adapter made for A. None need
be Strata's. Writes one self-contained page, compare.html or what `--output` names, and prints its headline. Of files
alone it can tell how far each is from A and whether they moved the same way, not what they can do.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import stages.models.modeling_houlsby  # noqa: F401  makes its models known to transformers
from analysis.changes.measured import COLUMNS
from analysis.changes.tables import cosine_by_chance, cosines, significant, summarise
from analysis.changes.tally import Tally, Where
from analysis.changes.tensors import TensorChange, has_unit_gain, spacing
from analysis.telling.figures import cosine_maps, heat_maps
from analysis.telling.page import render
from analysis.telling.text import percent, ranges
from stages.errors import MistakeError
from stages.files import write_text
from stages.models.architecture import OUTSIDE
from stages.models.names import full_name, weight_files
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint
from stages.weights.foreign import read_config
from tools.terminal import short_names

ROUNDED = 0.5  # what rounding alone would alter, as a share of the difference, from which the headline tells
ALIKE = 0.1  # cosine, of either sign, from which two models are said to have moved together or apart

Model = Checkpoint | VirtualCheckpoint


@dataclass(frozen=True)
class Compared:
    """How models differ from the first.

    Attributes:
        names: of the others.
        rows: one per model and tensor that differs, with the parts of METRICS; the error is what rounding to the
            model's dtype alters, of which a file of weights tells only the size that is to be expected.
        grams: by layer, inner products of the differences, float64 [names, names].
        tensors: how many were compared.
        missing: by model, tensors that it or the first lacks, or whose shape is another.
        modules: kinds of modules in the order of the model.
        layers: how many layers the first has.
    """

    names: list[str]
    rows: pd.DataFrame
    grams: dict[int, np.ndarray]
    tensors: int
    missing: dict[str, list[str]]
    modules: list[str]
    layers: int

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products over the whole model."""
        return sum(self.grams.values(), np.zeros((len(self.names), len(self.names))))

    @cached_property
    def whole(self) -> pd.DataFrame:
        """Metrics of each model over all tensors in which it differs, by name."""
        return summarise(self.rows, ["stage"]).set_index("stage").reindex(self.names).astype(float)


def add_arguments(parser: ArgumentParser) -> None:
    """Which models, and where the page goes."""
    parser.add_argument("first", type=Path, help="folder of the model that the others are compared with")
    parser.add_argument(
        "others", type=Path, nargs="+", help="folders of models, or of PEFT adapters made for the first"
    )
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page to write")


def main(first: Path, others: list[Path], output: Path) -> None:
    """Compare the other models with the first and write the page."""
    base, models = open_models([first, *others])
    compared = compare(base, models)
    sentences = headline(compared, base.name)
    page = {"first": base.name, "compared": compared, "headline": sentences, "pictures": draw(compared)}
    write_text(output, render("compare.html", page))
    print("\n".join(f"- {sentence}" for sentence in sentences))
    print(f"\nThe page is {output}")


def open_models(folders: list[Path]) -> tuple[Checkpoint, list[Model]]:
    """The first model and the others, named after their folders, with the folder above where two have one name.

    Raises:
        MistakeError: a folder is no model, nor an adapter.
    """
    names = short_names(folders)
    if not (folders[0] / "config.json").exists() or not weight_files(folders[0]):
        raise MistakeError(
            f"{folders[0]} is no model with config.json and model.safetensors or its index; name its folder first"
        )
    first = Checkpoint(folders[0], names[0])
    models: list[Model] = []
    for folder, name in zip(folders[1:], names[1:], strict=True):
        if (folder / "adapter_config.json").exists():
            read_config(folder / "adapter_config.json")
            models.append(VirtualCheckpoint(name, first, folder))
        elif weight_files(folder):
            models.append(Checkpoint(folder, name))
        else:
            raise MistakeError(
                f"{folder} holds no model.safetensors, no index and no adapter_config.json; name another folder"
            )
    return first, models


def compare(first: Checkpoint, models: list[Model]) -> Compared:
    """Read every tensor of every model, one at a time, and what it adds to the first's.

    Raises:
        MistakeError: a model has no tensor in common with the first.
    """
    names = [model.name for model in models]
    tally, missing = Tally(names), {name: list[str]() for name in names}
    tensors = _tensors(first, models)
    for path, parameter in tensors:
        where = Where(*first.architecture.place(path), parameter)
        deltas: dict[str, torch.Tensor] = {}
        for model in models:
            change = _change(first, model, path, parameter)
            if change is None:
                missing[model.name].append(full_name(path, parameter))
            elif bool(change.delta.any()):
                deltas[model.name] = change.delta
                tally.add_row(model.name, where, change)
        if deltas:
            tally.add_products(where.layer, deltas)
    for name, lacking in missing.items():
        if len(lacking) == len(tensors):
            raise MistakeError(
                f"{name} has no tensor of the same name and shape as {first.folder}; compare its own base"
            )
    rows = pd.DataFrame(tally.rows, columns=COLUMNS)
    kinds, layers = first.architecture.kinds, first.architecture.layers
    return Compared(names, rows, tally.grams, len(tensors), missing, kinds, layers)


def _tensors(first: Checkpoint, models: list[Model]) -> list[tuple[str, str]]:
    """Modules and parameters that any of the models stores, those of the first in its order."""
    stored = [model.modules for model in (first, *models) if isinstance(model, Checkpoint)]
    return list(dict.fromkeys((path, name) for modules in stored for path, names in modules.items() for name in names))


@dataclass(frozen=True)
class StoredChange(TensorChange):
    """A change of which the file is all there is: what rounding altered is not known, only what it does on average."""

    @property
    def error(self) -> torch.Tensor:
        """For each entry what rounding to the file's dtype alters in root mean square, float32.

        Rounding to nearest moves a number by up to half of the spacing, evenly spread, so by 1/√12 of it.
        """
        return spacing(self.file) / 12**0.5

    @cached_property
    def asked(self) -> torch.Tensor:
        """Nothing that is known."""
        return torch.zeros_like(self.exact)


def _change(first: Checkpoint, model: Model, path: str, parameter: str) -> TensorChange | None:
    """What sets a model's tensor apart from the first's; None where one of the two lacks it, or the shapes differ."""
    try:
        stored = first.stored(full_name(path, parameter))
        file = None if isinstance(model, VirtualCheckpoint) else model.stored(full_name(path, parameter))
        exact = model.module(path)[parameter] if file is None else file.float()
    except KeyError:
        return None
    if exact.shape != stored.shape:
        return None
    weight, unit_gain = stored.float(), has_unit_gain(first.architecture, path, parameter)
    if file is None:
        return TensorChange(weight, exact - weight, exact, exact.to(stored.dtype), unit_gain)
    return StoredChange(weight, exact - weight, exact, file, unit_gain)


def headline(compared: Compared, first: str) -> list[str]:
    """A sentence of fact for every model, and one for every two that moved together or against each other."""
    return [*(_differs(compared, first, name) for name in compared.names), *_together(compared)]


def _differs(compared: Compared, first: str, name: str) -> str:
    rows, whole = compared.rows[compared.rows["stage"] == name], compared.whole.loc[name]
    missing = len(compared.missing[name])
    rest = f" {missing} tensors could not be compared." if missing else ""
    if not len(rows):
        return f"{name} equals {first} in every tensor that both have.{rest}"
    layers = sorted(set(rows["layer"]) - {OUTSIDE})
    where = f"layers {ranges(layers)}" if layers else ""
    outside = "what lies outside the layers" if OUTSIDE in set(rows["layer"]) else ""
    size = f", by {percent(whole.relative_change)} of their size" if np.isfinite(whole.relative_change) else ""
    sentence = (
        f"{name} differs from {first} in {len(rows)} of {compared.tensors} tensors, in"
        f" {' and '.join(filter(None, [where, outside]))}{size}."
    )
    if whole.floor_share > ROUNDED:
        sentence += f" Rounding alone accounts for {percent(min(whole.floor_share, 1.0))} of that."
    return sentence + rest


def _together(compared: Compared) -> Iterator[str]:
    angles, names = cosines(compared.gram), compared.names
    pairs = len(names) * (len(names) - 1) // 2
    for i, j in zip(*np.triu_indices(len(names), 1), strict=True):
        first, second, angle = names[i], names[j], angles[i, j]
        # Two files of one dtype round the first in the same way, and have that in common whatever they changed.
        rounded = compared.whole.loc[[first, second], "floor_share"].max() > ROUNDED
        is_alike = abs(angle) > ALIKE and not rounded
        if is_alike and abs(angle) > significant(pairs) * cosine_by_chance(compared.rows, first, second):
            way = "the same way" if angle > 0 else "against each other"
            yield f"{first} and {second} moved {way} (cosine {angle:+.2f})."


def draw(compared: Compared) -> dict[str, str]:
    """The pictures as SVG: where each model differs, and, if there are several, who moved with whom."""
    pictures, names, layers = {}, compared.names, compared.layers
    cells = summarise(compared.rows[compared.rows["layer"] != OUTSIDE], ["stage", "layer", "module"])
    if len(compared.rows):
        pictures["layers"] = heat_maps(cells, names, names, compared.modules, layers)
    if len(set(compared.rows["stage"])) > 1:
        pictures["cosines"] = cosine_maps(compared.gram, compared.grams, names, layers, paired=len(names))
    return pictures
