"""The merged delta as float64 arithmetic gives it, and how far a file is from it."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.merge_methods import BasePolicy, MergeMethod, merge_tensors
from subjects import Weights

from stages.files import read_json

SAMPLE = 12  # touched tensors, from the first layer to the last


@dataclass
class Error:
    """Squared distances over the sample: of the file, of the truth rounded to bfloat16, of the truth from the base."""

    wrong: float = 0.0
    rounding: float = 0.0
    size: float = 0.0

    def relative(self) -> tuple[float, float]:
        """‖out − base − Δ‖/‖Δ‖ of the file, and of the truth rounded: no bfloat16 file is nearer."""
        return math.sqrt(self.wrong / self.size), math.sqrt(self.rounding / self.size)


def errors(
    checkpoints: Path,
    method: MergeMethod,
    parameters: dict[str, float],
    stages: list[str],
    outputs: list[tuple[Path, bool]],
) -> list[Error | None]:
    """Compare merged files with the truth, tensor by tensor.

    Strata merges, in each tensor, the stages that touch it (all of them where the method does not take so few).
    mergekit and PEFT merge whole models, the untouched ones among them. The truths differ, and each output is
    held to its own.

    Args:
        checkpoints: holds base/ and the stages' adapters.
        method: of mergekit's registry.
        parameters: of the method, weights included.
        stages: those merged.
        outputs: folder of each merged model, and whether only touching stages take part in a tensor.

    Returns:
        An error for each output; None where chance decides, so that there is no truth.
    """
    base, results = Weights(checkpoints / "base"), [Error() for _ in outputs]
    for name in _sample(checkpoints, stages):
        weight = base[name].double()
        deltas = {stage: _delta(checkpoints / stage, name, weight) for stage in stages}
        models = {stage: weight + delta for stage, delta in deltas.items() if delta is not None}

        truths: dict[tuple[str, ...], torch.Tensor | None] = {}
        for (folder, touching), result in zip(outputs, results, strict=True):
            taking_part = tuple(models if touching and accepts(method, list(models)) else stages)
            if taking_part not in truths:
                truths[taking_part] = _merge(method, parameters, weight, models, taking_part)
            truth = truths[taking_part]
            if truth is None:
                return [None] * len(outputs)
            result.wrong += float((Weights(folder)[name].double() - truth).square().sum())
            result.rounding += float((truth.to(torch.bfloat16).double() - truth).square().sum())
            result.size += float((truth - weight).square().sum())
    return list(results)


def accepts(method: MergeMethod, stages: list[str]) -> bool:
    """Whether the method takes this number of stages."""
    try:
        method.validate_inputs(*_inputs(method, stages))
    except ValueError:
        return False
    return True


def _merge(
    method: MergeMethod,
    parameters: dict[str, float],
    base: torch.Tensor,
    models: dict[str, torch.Tensor],
    stages: tuple[str, ...],
) -> torch.Tensor | None:
    """Sums and means by plain algebra, the other methods by mergekit's kernel; a stage without a model is the base.

    Returns:
        None if the kernel drew random numbers.
    """
    if method.spec.name in ("linear", "task_arithmetic"):
        total = sum((models[stage] - base for stage in stages if stage in models), start=torch.zeros_like(base))
        return base + total / (len(stages) if method.spec.name == "linear" else 1)
    ids, base_id = _inputs(method, list(stages))
    before = torch.get_rng_state()
    merged = merge_tensors(
        [models.get(name, base) for name in ids],
        method,
        parameters=parameters,
        ids=ids,
        base_index=None if base_id is None else ids.index(base_id),
    )
    return merged if torch.equal(before, torch.get_rng_state()) else None


def _inputs(method: MergeMethod, stages: list[str]) -> tuple[list[str], str | None]:
    """Models that the method is given, and which of them is the base; some methods want none."""
    if method.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL):
        return ["base", *stages], "base"
    return stages, None


def _delta(folder: Path, name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """What a stage adds to `weight`, from the factors of its adapter; None where it has none."""
    factors, config = Weights(folder), read_json(folder / "adapter_config.json")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{key}.lora_A.weight" not in factors.where:
        return None
    a, b = factors[f"{key}.lora_A.weight"].double(), factors[f"{key}.lora_B.weight"].double()
    change = b @ a * (config["lora_alpha"] / config["r"])
    if not config["use_dora"]:
        return change
    direction, magnitude = weight + change, factors[f"{key}.lora_magnitude_vector"].double()
    return (magnitude / torch.linalg.vector_norm(direction, dim=1))[:, None] * direction - weight


def _sample(checkpoints: Path, stages: list[str]) -> list[str]:
    """Names of touched weights at equal distances through the model."""
    found = [
        re.fullmatch(r"base_model\.model\.(.+\.(\d+)\..+)\.lora_A\.weight", key)
        for stage in stages
        for key in Weights(checkpoints / stage).where
    ]
    names = sorted({(int(match[2]), f"{match[1]}.weight") for match in found if match})
    return [names[round(step * (len(names) - 1) / (SAMPLE - 1))][1] for step in range(SAMPLE)]
