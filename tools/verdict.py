"""What a file holds of its adapters, in words: a sentence for each finding, none where all is as it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from analysis.changes.verified import Fitted, Solved, solve
from analysis.telling.text import in_layers, percent
from stages.models.architecture import OUTSIDE
from stages.weights.adapter import Adapter
from stages.weights.checkpoint import VirtualCheckpoint

ENOUGH = 0.9  # of one adapter; of several each a part, so that their average passes
HOLDS = 0.3  # of a change a right merge must hold so that its tensor is judged by itself
HALF = 0.5  # of a change in a kind of modules that rounding may take
EVEN = 0.1  # how far factors may be apart, as a share
NONE = 0.01  # a factor that is none
ERRORS = 5  # standard errors that chance may make
MOST = 0.9  # of the matrices of a file, that are of another base


@dataclass(frozen=True)
class Verified:
    """A file, what it is held against, and what came of it.

    Attributes:
        file: as the user calls it.
        base: as the user calls it.
        adapters: n of them.
        tensors: of the file, with n adapters.
        expect: the least factor of each adapter; None where the user says none.
    """

    file: str
    base: str
    adapters: list[VirtualCheckpoint]
    tensors: list[Fitted]
    expect: float | None = None

    @property
    def least(self) -> float:
        """The least factor that is no finding."""
        return ENOUGH / len(self.adapters) if self.expect is None else self.expect

    @property
    def most(self) -> float:
        """The largest factor that is no finding: a little above 1, or above what the user expects."""
        return (1 + EVEN) * (max(1.0, self.expect / ENOUGH) if self.expect is not None else 1.0)

    @property
    def sound(self) -> list[Fitted]:
        """Tensors whose numbers are finite."""
        return [tensor for tensor in self.tensors if tensor.is_finite]

    @property
    def dtype(self) -> str:
        """The digits of most of its numbers that an adapter changes, such as `bfloat16`."""
        counts: Counter[torch.dtype] = Counter()
        for tensor in [tensor for tensor in self.tensors if tensor.is_adapted] or self.tensors:
            counts[tensor.dtype] += tensor.entries
        return written(counts.most_common(1)[0][0])

    def of(self, number: int) -> list[Fitted]:
        """Tensors that an adapter changes."""
        return [tensor for tensor in self.sound if tensor.gram[number, number] > 0]


def judge(verified: Verified) -> Iterator[str]:
    """A sentence for each thing that is not as it should be, and what to do about it."""
    if broken := [tensor for tensor in verified.tensors if not tensor.is_finite]:
        yield f"{verified.file} has numbers that are not finite in {_these(broken)}; write it again"
    adapted = [tensor for tensor in verified.sound if tensor.is_adapted]
    if adapted and not any(tensor.is_changed for tensor in verified.sound):
        yield _untouched(verified, adapted)
    elif strange := _of_another_base(verified):
        yield (
            f"either {verified.base} is not what {verified.file} was made of, or a training of all of it is not among"
            f" the adapters: none explains {_these(strange)}, which differ by {_distance(strange)} of their size"
        )
    else:
        for number in range(len(verified.adapters)):
            yield from _judge_adapter(verified, number)
        yield from _judge_rest(verified)


def _untouched(verified: Verified, adapted: list[Fitted]) -> str:
    names = listed([adapter.name for adapter in verified.adapters])
    fix = "save what merge_and_unload returns, and not the model before it"
    if not np.nanmax(solve(adapted).right) > HOLDS:
        fix = f"{verified.dtype} is too coarse for a change so small, so write float32"
    return (
        f"nothing of {names} is in {verified.file}: all {len(verified.sound)} tensors that were compared are those of"
        f" {verified.base}; {fix}"
    )


def _of_another_base(verified: Verified) -> list[Fitted]:
    """The matrices that no adapter explains, where they are nearly all; [] otherwise."""
    matrices = [tensor for tensor in verified.sound if tensor.is_matrix]
    strange = [tensor for tensor in matrices if not tensor.is_explained]
    if len(strange) < MOST * len(matrices):
        return []
    plain = [tensor for tensor in matrices if not tensor.is_adapted]
    if plain:  # one that is the base's tells of which base the file is
        return strange if all(tensor.is_changed for tensor in plain) else []
    return strange if _rest(strange) > 0.25 * sum(tensor.size for tensor in strange) else []


def _judge_adapter(verified: Verified, number: int) -> Iterator[str]:
    adapter, mine = verified.adapters[number], verified.of(number)
    name, file = adapter.name, verified.file
    if not mine:
        yield f"{name} changes nothing that {file} and {verified.base} both have, so nothing of it can be found"
        return
    whole = solve(mine)
    held, right = whole.held[number], whole.right[number]
    known = [t for t in mine if t.solved.right[number] > HOLDS and ERRORS * t.solved.error[number] < HOLDS]
    absent = [t for t in known if _is_none(t.solved.held[number], t.solved.error[number])]
    present = [t for t in known if t not in absent]
    if not present and (absent or (right > HOLDS and _is_none(held, whole.error[number]))):
        yield f"nothing of {name} is in {file}; merge it too, or leave it out of --adapter"
        return
    usual = _median(present, number) if present else held
    if absent:
        yield (
            f"{name} is left out of {_where(absent, mine, adapter)}, and is in {file} elsewhere by {usual:.2f}; merge"
            " these too"
        )
    yield from _judge_factor(verified, number, present, usual)
    yield from _judge_rounding(verified, number, [tensor for tensor in mine if tensor not in absent])


def _judge_factor(verified: Verified, number: int, present: list[Fitted], usual: float) -> Iterator[str]:
    """Whether an adapter's factor is the same in all tensors that it is in, no known mistake's, and enough."""
    adapter, mine = verified.adapters[number], verified.of(number)
    name, file = adapter.name, verified.file
    uneven = [t for t in present if not _is_near(t, number, usual, EVEN)]
    is_odd = bool(uneven) or not verified.least <= usual <= verified.most
    mistakes = _mistakes(adapter.adapter, present, is_odd) if is_odd or verified.expect is None else []
    if reasons := [text for text, wrong in mistakes if _fits(present, number, wrong)]:
        factor, why = _span(present, number), ", or ".join(reasons)
        yield f"{name} is in {file} by {factor}, as where {why}; if not meant, merge it again"
    elif uneven:
        yield (
            f"{name} is in {file} by {_span(uneven, number)} in {_where(uneven, mine, adapter)}, and by {usual:.2f}"
            " elsewhere; if not meant, merge it again"
        )
    elif usual < verified.least - NONE and not _is_lost(solve(mine), number, verified.least):
        yield (
            f"{name} is in {file} by {usual:.2f}, and the least is {verified.least:.2f}; merge it again, or give"
            f" --expect {usual - NONE:.2f} if that is its weight"
        )
    elif usual > verified.most + NONE:
        yield (
            f"{name} is in {file} by {usual:.2f}, more than once; merge it again, or give --expect"
            f" {usual - NONE:.2f} if that is its weight"
        )


def _judge_rounding(verified: Verified, number: int, mine: list[Fitted]) -> Iterator[str]:
    """Whether the file's dtype is too coarse for what an adapter changes, or takes most of it in a kind of modules."""
    least = ENOUGH if verified.expect is None else verified.expect
    lost = mine
    if not _is_lost(solve(mine), number, least):
        kinds = by_kind(mine).values()
        lost = [tensor for kind in kinds if _is_lost(solve(kind), number, min(least, HALF)) for tensor in kind]
    if lost:
        found, adapter = solve(lost), verified.adapters[number]
        yield (
            f"{adapter.name} is in {verified.file} by {found.held[number]:.2f} in {_where(lost, mine, adapter)}, for"
            f" {written(lost[0].dtype)} is too coarse: a right merge would have {found.right[number]:.2f} there; write"
            " float32"
        )


def _judge_rest(verified: Verified) -> Iterator[str]:
    """What changed and is no adapter's."""
    strange = [tensor for tensor in verified.sound if not tensor.is_explained]
    if plain := [tensor for tensor in strange if not tensor.is_adapted]:
        yield (
            f"no adapter given changes {_these(plain)}, and {verified.file} differs there by {_distance(plain)} of"
            " its size; name what changed it, or merge again"
        )
    if mixed := [tensor for tensor in strange if tensor.is_adapted]:
        share = _rest(mixed) / sum(tensor.gram[-1, -1] for tensor in mixed)
        yield (
            f"{percent(share)} of what changed in {_these(mixed)} is no adapter's, as where another was added, or a"
            " merge trims (TIES, DARE); name it, or merge again"
        )


def _mistakes(adapter: Adapter, tensors: list[Fitted], is_odd: bool) -> Iterator[tuple[str, list[float]]]:
    """Known ways to a wrong factor, and what each makes it in every tensor; some only where the factor is odd."""
    yield "it is applied twice", [2.0] * len(tensors)
    config = adapter.config
    ranks = [adapter.rank(tensor.path) or 0 if tensor.path in adapter.modules else 0 for tensor in tensors]
    if config["peft_type"] != "LORA" or not all(ranks):
        return
    if config.get("use_rslora"):
        yield "its alpha/√r (use_rslora) is read as alpha/r", [rank**-0.5 for rank in ranks]
    else:
        yield "its alpha/r is read as alpha/√r (use_rslora)", [rank**0.5 for rank in ranks]
    if is_odd:
        scales = [adapter.scaling(tensor.path) for tensor in tensors]
        yield "its scale, alpha/r, is left out", [1 / scale for scale in scales]
        yield "its scale, alpha/r, is applied twice", scales
        power = 0.5 if config.get("use_rslora") else 1.0
        plain = config.get("lora_alpha", 8) / config.get("r", 8) ** power
        yield "its rank_pattern and alpha_pattern are not read", [plain / scale for scale in scales]


def by_kind(tensors: list[Fitted]) -> dict[str, list[Fitted]]:
    """Tensors by what their like are called together."""
    kinds: dict[str, list[Fitted]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.kind, []).append(tensor)
    return kinds


def _is_none(factor: float, error: float) -> bool:
    return abs(factor) <= NONE + ERRORS * error


def _is_lost(solved: Solved, number: int, least: float) -> bool:
    """Whether a right merge has less of an adapter than there must be, and the file has about that."""
    held, right = solved.held[number], solved.right[number]
    return bool(right < min(least, 1) - NONE and (1 - EVEN) * right - NONE <= held < least)


def _is_near(tensor: Fitted, number: int, factor: float, tolerance: float) -> bool:
    """Whether an adapter may have this factor in a tensor, by its rounding and by chance."""
    solved = tensor.solved
    room = abs(factor) * (tolerance + abs(1 - solved.right[number])) + ERRORS * solved.error[number]
    return bool(abs(solved.held[number] - factor) <= room)


def _fits(tensors: list[Fitted], number: int, factors: list[float]) -> bool:
    """Whether an adapter has these factors in tensors that rounding takes little of, and they are not all 1."""
    pairs = [
        (tensor, factor)
        for tensor, factor in zip(tensors, factors, strict=True)
        if tensor.solved.right[number] > 1 - EVEN
    ]
    is_other = any(abs(factor - 1) > EVEN for _, factor in pairs)
    return is_other and all(_is_near(tensor, number, factor, EVEN / 2) for tensor, factor in pairs)


def _median(tensors: list[Fitted], number: int) -> float:
    """The factor of an adapter in the middle of its change: half of its size is in tensors with no larger one."""
    ordered = sorted(tensors, key=lambda tensor: float(tensor.solved.held[number]))
    sizes = np.cumsum([tensor.gram[number, number] for tensor in ordered])
    return float(ordered[int(np.searchsorted(sizes, sizes[-1] / 2))].solved.held[number])


def _span(tensors: list[Fitted], number: int) -> str:
    """The factors of an adapter, from the least to the largest."""
    factors = [float(tensor.solved.held[number]) for tensor in tensors]
    least, largest = min(factors), max(factors)
    return (
        f"{least:.2f} to {largest:.2f}" if largest - least > EVEN * abs(largest) else f"{_median(tensors, number):.2f}"
    )


def _where(some: list[Fitted], tensors: list[Fitted], adapter: VirtualCheckpoint) -> str:
    """Some of an adapter's tensors in words: its kinds of modules, its layers, or how many."""
    if len(some) == len(tensors):
        return "all that it changes"
    for attribute in ("kind", "layer"):
        rest = {getattr(tensor, attribute) for tensor in tensors if tensor not in some}
        names = list(dict.fromkeys(getattr(tensor, attribute) for tensor in some))
        if not rest.intersection(names) and OUTSIDE not in names:
            return (
                in_layers(sorted(names)) if attribute == "layer" else listed([_called(n, some, adapter) for n in names])
            )
    return _these(some)


def _called(kind: str, tensors: list[Fitted], adapter: VirtualCheckpoint) -> str:
    saved = tuple(adapter.adapter.config.get("modules_to_save") or [])  # ends of names, to PEFT
    is_saved = all(tensor.path.endswith(saved) for tensor in tensors if tensor.kind == kind)
    return f"{kind} (of modules_to_save)" if is_saved else kind


def several(names: list[str]) -> str:
    """Names of tensors as the first of them and how many."""
    return names[0] if len(names) == 1 else f"{len(names)} tensors, such as {names[0]}"


def _these(tensors: list[Fitted]) -> str:
    return several([tensor.name for tensor in tensors])


def _rest(tensors: list[Fitted]) -> float:
    """‖·‖² of what no adapter explains."""
    return sum(tensor.solved.rest for tensor in tensors)


def _distance(tensors: list[Fitted]) -> str:
    return percent((_rest(tensors) / (sum(tensor.size for tensor in tensors) or np.nan)) ** 0.5)


def written(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def listed(names: list[str]) -> str:
    """Names as `one, two and three`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
