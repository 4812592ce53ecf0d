"""`strata export lora`: a stage, or the merge, as a plain LoRA of one rank, for servers that load nothing else.

Such a server applies one adapter of an exact LoRA's form to the base: no DoRA, no ranks of their own for some modules.
So each adapter holds all that sets its model apart from the base, the stage's ancestors included. A sum of LoRAs is
held exactly; of any other change, the part of the largest rank-r approximation (Eckart & Young 1936).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from tqdm import tqdm

from analysis.telling.text import percent
from stages.errors import MistakeError
from stages.files import publish
from stages.merge import base_name, provenance
from stages.merging.adapter_output import OVERSAMPLING, AdapterOutput, Fit, fit_lora
from stages.merging.merged import Merged
from stages.project.params import PARAMS, Params, load_params
from stages.settings.base import Base
from stages.settings.merge import AdapterSettings, Merge
from stages.weights.adapter import Factors
from stages.weights.places import misplaced
from tools.exporting.merge import EXPORT, in_float32
from tools.exporting.origin import origin

FOLDER = EXPORT / "lora"
ROUNDS = 8  # of randomized subspace iteration (arXiv 0909.4061)
EXACT = 1e-5  # a smaller relative error is that of float32
REFUSED = "which PEFT loads and vLLM refuses"
CARD = """\
# {name}

A plain LoRA of `{model}`, exported with Strata: all that sets {name} apart from it. {told}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "{folder}")
```
"""


@dataclass(frozen=True)
class Part:
    """What an adapter holds of one matrix.

    Attributes:
        fit: of its change.
        norm: Frobenius norm of the change.
        bias: of the model, float32 [out], and the base's; None where there is none.
    """

    fit: Fit
    norm: float
    bias: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def has_new_bias(self) -> bool:
        """Whether the bias changed."""
        return self.bias is not None and not torch.equal(*self.bias)


def main(rank: int, merged: bool) -> None:
    """Write export/lora/NAME for each stage of params.yaml, or export/lora/merged.

    Raises:
        MistakeError: a stage is not trained yet or changes nothing, or PEFT would not load the adapter.
    """
    params = load_params()
    torch.set_num_threads(params.thread_count)
    merges = {"merged": params.merge} if merged else {name: alone(params, name) for name in params.stages}
    for name, merge in merges.items():
        exact = in_float32(merge.model_copy(update={"adapter": AdapterSettings(rank=rank)}))
        facts = provenance(params.model_copy(update={"merge": exact.merge}))
        print(export(exact, name, rank, params.base, facts))


def alone(params: Params, name: str) -> Merge:
    """The merge that is a stage with its ancestors, each in full."""
    return Merge(weights=dict.fromkeys(params.lineage(name), 1.0), seed=params.merge.seed)


def export(merged: Merged, name: str, rank: int, base: Base, facts: dict[str, Any]) -> str:
    """Write the adapter of one model, and say how much of it is missing."""
    adapter, parts = AdapterOutput(), fit_all(merged, rank)
    if not parts and not merged.replaced:
        raise MistakeError(f"{PARAMS}: {name} changes nothing, and there is no LoRA of it; leave it out")
    width = max((len(part.fit.A) for part in parts.values()), default=1)
    for path, part in parts.items():
        bias, old_bias = (None, None) if part.bias is None else part.bias
        changed = {"bias": bias} if part.has_new_bias else {"old_bias": old_bias}
        adapter.add_linear(path, widened(part.fit, width), **changed)
    for path, whole in merged.replaced.items():
        weights = merged.module(path).items()
        adapter.add_replacement(whole, {f"{path}.{key}".removeprefix(f"{whole}."): value for key, value in weights})
    told, (model, revision) = sentences(merged, parts, width), base_name()
    with publish(FOLDER / name) as folder:
        metadata = {"format": "pt", "strata": json.dumps(facts, sort_keys=True)}
        adapter.save(folder, model, revision, any(map(merged.is_transposed, parts)), metadata)
        refuse_unopened(folder)
        make_card(base, name, model, told).save(folder / "README.md")
    return f"{FOLDER / name}: {' '.join(told)}"


def fit_all(merged: Merged, rank: int) -> dict[str, Part]:
    """By module, each matrix that changes and is not replaced as a whole."""
    parts = {}
    for path in tqdm([path for path in merged.changed() if path not in merged.replaced], desc="lora", leave=False):
        before, after = merged.base.module(path), merged.module(path)
        delta, factors = after["weight"] - before["weight"], merged.factors(path)
        if merged.is_transposed(path):
            delta, factors = delta.T, (factors[1].T, factors[0].T) if factors else None
        bias = (after["bias"], before["bias"]) if "bias" in after else None
        part = Part(fit(delta, factors, rank), float(torch.linalg.vector_norm(delta)), bias)
        if part.norm or part.has_new_bias:
            parts[path] = part
    return parts


def fit(delta: torch.Tensor, factors: Factors | None, rank: int) -> Fit:
    """The LoRA of at most `rank` that is nearest to a change in the Frobenius norm, within 1 % of the least error.

    Args:
        delta: the change, float32 [out, in].
        factors: the same as left [out, R] @ right [R, in], if it has that form.
        rank: of the LoRA.
    """
    if factors is not None and len((exact := fit_lora(*factors)).A) <= rank:
        return exact
    change = delta.double()
    with torch.random.fork_rng(devices=[]):  # its random start is the same at every run, and nobody else's
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(change, q=min(rank + OVERSAMPLING, *change.shape), niter=ROUNDS)
    found = fit_lora(left[:, :rank] * sizes[:rank], right[:, :rank].T)
    missed = torch.linalg.vector_norm(change - found.B.double() @ found.A.double())
    norm = torch.linalg.vector_norm(change).clamp_min(torch.finfo(change.dtype).tiny)
    return Fit(found.A, found.B, None, float(missed / norm))


def widened(fit: Fit, rank: int) -> Fit:
    """The same with rows and columns of zeros up to `rank`, for servers that know one rank for all modules."""
    more = rank - len(fit.A)
    pad = torch.nn.functional.pad
    return Fit(pad(fit.A, (0, 0, 0, more)), pad(fit.B, (0, more)), fit.magnitude, fit.error)


def sentences(merged: Merged, parts: dict[str, Part], rank: int) -> list[str]:
    """How much of the change the adapter holds, and what of it is no LoRA."""
    told = []
    if total := sum(part.norm**2 for part in parts.values()) ** 0.5:
        missed = sum((part.fit.error * part.norm) ** 2 for part in parts.values()) ** 0.5 / total
        worst = max(parts, key=lambda path: parts[path].fit.error)
        if missed < EXACT:
            told.append(f"Rank {rank} holds the change exactly.")
        else:
            share = percent(parts[worst].fit.error)
            told.append(f"Rank {rank} misses {percent(missed)} of the change, and most in {worst}, {share}.")
    if whole := sorted(set(merged.replaced.values())):
        told.append(f"{len(whole)} modules, {whole[0]} the first, are in it as a whole (modules_to_save), {REFUSED}.")
    if any(part.has_new_bias for part in parts.values()):
        told.append(f"It has biases, {REFUSED}.")
    return told


def refuse_unopened(folder: Path) -> None:
    """Raise a MistakeError unless PEFT, given the adapter on the base, has a place for each of its tensors."""
    if lost := misplaced(folder):
        raise MistakeError(
            f"PEFT would not take {lost[0]} of {folder.name.removesuffix('.tmp')} on this base, for it takes its module"
            " for another; export model"
        )


def make_card(base: Base, name: str, model: str, told: list[str]) -> ModelCard:
    """README.md of an adapter.

    Args:
        base: the section of params.yaml.
        name: of the stage, or `merged`.
        model: what it is loaded on, a hub id or a folder.
        told: what `sentences` says.
    """
    known = origin(base)
    rest: dict[str, Any] = {**known.licence}
    if known.id:
        rest |= {"base_model": [known.id], "base_model_relation": "adapter"}
    data = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=["strata", "lora"], **rest)
    text = CARD.format(name=name, model=model, folder=FOLDER / name, told=" ".join(told))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
