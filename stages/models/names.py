"""The way between the names of a model in memory and those of its file, both ways, from transformers' own tables.

A file has the names that its model was published with, and transformers loads it under others: with another prefix, or
with the matrices of all experts as one parameter. What is trained has the names in memory; what is merged is written
under those of the file, so that whatever loads the base loads it too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import MistakeError
from stages.files import read_json

REST = "model.rest.safetensors"  # beside the weights of the text model: the other parts of the checkpoint
COMPUTED = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # buffers in files of older versions

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Index = list[int | list[int]]
"""What part of a parameter: for each of its leading dimensions a position, or [start, end]; [] is all of it."""
Piece = tuple[str, Index]
"""A tensor of a file, and the part of the parameter that it is."""


def full_name(module: str, parameter: str) -> str:
    """Name of a parameter; that of a tensor in no module, such as `logit_scale`, for which `module` is empty."""
    return f"{module}.{parameter}" if module else parameter


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: one, or those that its index names, and what is beside its text model.

    Where `folder` is a file, it is that.

    Raises:
        MistakeError: the index does not name files of this folder.
    """
    if folder.is_file():
        return [folder]
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    rest = [folder / REST] if (folder / REST).exists() else []
    if whole.exists() or not index.exists():
        return [whole, *rest] if whole.exists() else []
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise MistakeError(f"{index} does not name files of its folder; download the model again") from None
    return [*(folder / name for name in names), *rest]


def copy_weights(source: Path, folder: Path) -> None:
    """Copy the files that transformers loads a model's weights from, with their index, into another folder."""
    index = source / "model.safetensors.index.json"
    files = weight_files(source)
    for path in files if (source / "model.safetensors").exists() else [*files, index]:
        shutil.copyfile(path, folder / path.name)  # and not its mode, which may be that of a read-only file


def shapes_in(folder: Path) -> dict[str, list[int]]:
    """Shape of every tensor in the safetensors files of a model's folder, by its name there."""
    return {name: list(file.get_slice(name).get_shape()) for name, file in _files(folder).items()}


def carry_over(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Copy what a source holds beside a model in memory, such as a vision tower, into a file of its own in `folder`.

    Tensors keep their bytes. What older files hold of buffers that are computed anyway is left behind.
    """
    from safetensors.torch import save_file

    files = _files(source)
    taken = {name for parts in pieces_of(model, shapes_in(source)).values() for name, _ in parts}
    rest = [name for name in files.keys() - taken - model.state_dict().keys() if not name.endswith(COMPUTED)]
    if rest:
        tensors = {name: files[name].get_tensor(name) for name in sorted(rest)}
        save_file(tensors, folder / REST, {"format": "pt"})


def lost(model: PreTrainedModel, folder: Path, pieces: dict[str, list[Piece]]) -> str | None:
    """The first weight of the text model in memory that its folder lacks, or holds another of in the model's dtype."""
    import torch

    files, tied, texts = _files(folder), model.all_tied_weights_keys, _of_text(model)
    for name, weights in model.state_dict(keep_vars=True).items():
        parts = pieces.get(name, [(name, [])])
        if id(weights) not in texts or (parts[0][0] not in files and name in tied):
            continue
        if any(piece not in files for piece, _ in parts):
            return name
        if not torch.equal(assemble(parts, lambda piece: files[piece].get_tensor(piece)).to(weights.dtype), weights):
            return name
    return None


def refuse_lost(model: PreTrainedModel, folder: Path, pieces: dict[str, list[Piece]]) -> None:
    """Hold the weights of a model in memory against the file that it is in.

    All that follows reads the file, and a weight that it missed would be trained and then be lost in the merge.

    Raises:
        MistakeError: one is not there, or is not the same to the bit in the model's dtype.
    """
    if name := lost(model, folder, pieces):
        raise MistakeError(
            f"{type(model).__name__} keeps {name} in its file in a way that is not known here; choose another model"
        )


def _files(folder: Path) -> dict[str, Any]:
    """The open safetensors file that each tensor of a model's folder is in."""
    from safetensors import safe_open

    files = [safe_open(path, framework="pt") for path in weight_files(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118  # it is no dictionary


def assemble(pieces: list[Piece], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A parameter of its pieces, which `read` gives by their names in the file."""
    import torch

    first = read(pieces[0][0])
    if not pieces[0][1]:
        return first
    whole = torch.empty(whole_shape(list(first.shape), pieces), dtype=first.dtype)
    for name, index in pieces:
        part(whole, index).copy_(read(name))
    return whole


def part(whole: torch.Tensor, index: Index) -> torch.Tensor:
    """The part of a parameter that a tensor of the file is, as a view."""
    return whole[tuple(slice(*at) if isinstance(at, list) else at for at in index)] if index else whole


def whole_shape(shape: list[int], pieces: list[Piece]) -> list[int]:
    """Shape of a parameter, of whose pieces the first has `shape`."""
    ends = [[at[1] if isinstance(at, list) else at + 1 for at in index] for _, index in pieces]
    told = sum(isinstance(at, list) for at in pieces[0][1])  # a position is a dimension that the piece does not have
    return [max(column) for column in zip(*ends, strict=True)] + shape[told:]


def text_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Modules of the text model with its embedding and output layer; in a model of images and text not all."""
    from torch import nn

    parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    found = {module for part in parts if part is not None for module in part.modules()}
    is_whole = model.config.get_text_config(decoder=True) is model.config  # or what is called a decoder has no layers
    is_whole = is_whole or not any(isinstance(module, nn.ModuleList) for module in found)
    return set(model.modules()) if is_whole else found


def _of_text(model: PreTrainedModel) -> set[int]:
    """Identities of the parameters and buffers of the text model."""
    return {id(part) for module in text_modules(model) for part in module.state_dict(keep_vars=True).values()}


def pieces_of(model: PreTrainedModel, shapes: dict[str, list[int]]) -> dict[str, list[Piece]]:
    """The parts that parameters and buffers of `model` have in a file, except what is there whole by its own name.

    None are those of a parameter beside the text model, such as a vision tower's, that the file has otherwise: it is
    carried over as it is there.

    Args:
        model: maybe without its weights.
        shapes: of the tensors of the file, by name.

    Raises:
        MistakeError: transformers makes one of the text model by more than putting tensors together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    known, prefix, tables = (
        model.state_dict(keep_vars=True),
        model.base_model_prefix,
        get_model_conversion_mapping(model),
    )
    renamings = [table for table in tables if isinstance(table, WeightRenaming)]
    converters = [table for table in tables if isinstance(table, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, dict[str | None, list[str]]] = {}  # by parameter, then by the pattern of a converter
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # as transformers does where the file has the names in memory
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target in known:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    texts = _of_text(model)
    pieces: dict[str, list[Piece]] = {}
    for target, names in found.items():
        patterns = [pattern for pattern in names if pattern is not None]
        if id(known[target]) not in texts:
            if names.get(None, [""])[-1] != target:
                pieces[target] = []
        elif patterns:
            pieces[target] = _put_together(target, by_pattern[patterns[0]], names, shapes)
        elif names[None][-1] != target:
            pieces[target] = [(names[None][-1], [])]
    return pieces


def _put_together(
    target: str, converter: WeightConverter, names: dict[Any, list[str]], shapes: dict[str, list[int]]
) -> list[Piece]:
    """Parts of a parameter that transformers stacks (experts), concatenates, or stacks and then concatenates."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stacks = isinstance(converter.operations[0], MergeModulelist)
    rest = converter.operations[1:] if stacks else converter.operations
    if len(rest) > 1 or not all(type(operation) is Concatenate for operation in rest):
        made = ", ".join(map(repr, converter.operations))
        raise MistakeError(
            f"transformers makes {target} of {next(iter(names.values()))[0]} by {made}, which cannot be undone in a"
            " merged file; choose another model"
        )
    dim: int = rest[0].dim if rest else 0  # type: ignore[attr-defined]
    start, parts = 0, list[Piece]()
    for pattern in converter.source_patterns:
        for number, name in enumerate(names.get(pattern, [])):
            shape = [1, *shapes[name]] if stacks else shapes[name]
            index: Index = [[0, size] for size in shape[:dim]]
            index += [[start, start + shape[dim]]] if rest else []
            parts.append((name, [number, *index[1:]] if stacks else index))
            start += 0 if stacks else shape[dim]
        if stacks and rest and pattern in names:
            start += shapes[names[pattern][0]][dim - 1]
    return parts
