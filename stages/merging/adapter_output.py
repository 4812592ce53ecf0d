"""The merged delta as one adapter in PEFT's format, and how much of the delta it holds.

A sum of LoRA deltas is a LoRA, exactly. With DoRA among the stages it is none, but a DoRA of the summed ranks: each
stage rescales rows of the base and adds something of low rank. What a sparsifying merge leaves has no low rank; its
fit reports a large error, which `check_errors` turns down.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.errors import MistakeError
from stages.weights.single_file import single_file
from stages.weights.tensor_file import NAMES

OVERSAMPLING = 8  # directions beyond the rank, which speed the subspace iteration up
LEAST_FREE = 0.55  # no row's scale moves further than 1/0.55 of the way to its optimum: below 2 no error can grow
CONVERGED = 3e-6  # a round whose row scales move the target by this much of the delta was the last one
FUTILE = 1e-2  # or by this much of what the rank cannot hold, for then more rounds would hardly change the error


@dataclass(frozen=True)
class Fit:
    """An adapter of one weight matrix W [out, in]: W + B·A, its rows brought to `magnitude` if it is a DoRA.

    `A` [r, in], `B` [out, r] and `magnitude` [out] are float32. `error` is ‖fit − Δ‖/‖Δ‖, where Δ is the delta that
    was asked for and ‖·‖ the Frobenius norm, computed in float64 from the float32 factors.
    """

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None
    error: float


def fit_lora(left: torch.Tensor, right: torch.Tensor) -> Fit:
    """Recompress the delta left·right exactly, with the smallest rank that holds it to float32's precision.

    QR of both factors and SVD of the small matrix between them, in float64; no [out, in] matrix is built.

    Args:
        left: [out, R], the stages' B side by side, each times its scaling and its merge weight.
        right: [R, in], the stages' A one below the other.
    """
    left, right = left.double(), right.double()
    frame_left, core_left = torch.linalg.qr(left)
    frame_right, core_right = torch.linalg.qr(right.T)
    u, sizes, vh = torch.linalg.svd(core_left @ core_right.T)
    rank = max(1, int((sizes > torch.finfo(torch.float32).eps * sizes[0]).sum()))  # PEFT takes no rank 0
    root = sizes[:rank].sqrt()
    b, a = (frame_left @ u[:, :rank] * root).float(), (root[:, None] * vh[:rank] @ frame_right.T).float()
    missed_left = torch.linalg.qr(torch.cat([b, -left], 1), mode="r").R
    missed_right = torch.linalg.qr(torch.cat([a, right], 0).T, mode="r").R
    return Fit(a, b, None, _ratio(missed_left @ missed_right.T, sizes))


def fit_dora(base: torch.Tensor, target: torch.Tensor, rank: int, rounds: int = 500) -> Fit:
    """Fit a DoRA (arXiv 2402.09353) of rank `rank` that turns `base` into `target`.

    A DoRA's magnitude takes any scale of a row, so it is enough that c·T − W has low rank for some scale c per row.
    Each round makes one step of randomized subspace iteration (arXiv 0909.4061) towards the row space of c·T − W,
    then moves c to its least-squares solution outside of that space, where c·T must equal W (variable projection,
    Golub & Pereyra 1973), and further in rows that the column space can follow. Seeded, and thus repeatable; torch's
    global random state is left alone.

    Args:
        base: W, [out, in]; GPT-2's Conv1D has to be transposed.
        target: T, the merged weights, [out, in], not equal to the base.
        rank: at most this; the sum of the stages' ranks holds a sum of LoRA and DoRA deltas.
        rounds: at most so many; most sums converge in four, a rank near `out` takes hundreds.
    """
    w, t = base.double(), target.double()
    w_squares, products, t_squares = w.square().sum(1), (w * t).sum(1), t.square().sum(1)
    scale = torch.nan_to_num(products / t_squares, nan=1)  # rows of zeros
    enough = CONVERGED**2 * (t - w).square().sum()
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(t.shape[1], min(rank + OVERSAMPLING, *t.shape), dtype=t.dtype, generator=random)
    t_inside, w_inside = t @ basis, w @ basis
    for _ in range(rounds):
        inside = scale[:, None] * t_inside - w_inside
        basis = torch.linalg.qr(t.T @ (scale[:, None] * inside) - w.T @ inside).Q
        t_inside, w_inside = t @ basis, w @ basis
        frame, core = torch.linalg.qr(scale[:, None] * t_inside - w_inside)
        u, sizes, vh = torch.linalg.svd(core)
        top = vh[:rank].T
        t_top, w_top = t_inside @ top, w_inside @ top
        missed = (scale**2 * t_squares - 2 * scale * products + w_squares).sum() - sizes[:rank].square().sum()
        outside = t_squares - t_top.square().sum(1)
        solution = (products - (t_top * w_top).sum(1)) / outside
        free = 1 - (frame @ u[:, :rank]).square().sum(1)
        step = (solution - scale) / free.clamp_min(LEAST_FREE)
        step = torch.where(outside > 1e-9 * t_squares, step, 0)  # all of the row is inside: any scale will do
        scale = scale + step
        if (step.square() * t_squares).sum() < max(enough, FUTILE**2 * missed):
            break
    return as_dora(fit_lora(scale[:, None] * t_top - w_top, (basis @ top).T), base, target)


def as_dora(fit: Fit, base: torch.Tensor, target: torch.Tensor) -> Fit:
    """The same B and A with the magnitude that suits the target best, and the error against the target.

    That is the target's row norms, negative where a row has turned round.

    One file holds LoRA or DoRA and no mixture. This makes a DoRA of a LoRA's fit, without loss.

    Args:
        fit: of target − base, or of any rescaling of the target's rows.
        base: [out, in].
        target: [out, in], not equal to the base.
    """
    direction = base.double() + fit.B.double() @ fit.A.double()
    direction /= torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    magnitude = (direction * target).sum(1).float()
    return Fit(fit.A, fit.B, magnitude, _ratio(magnitude[:, None] * direction - target, target.double() - base))


class AdapterOutput:
    """Collects what the merge changed, module by module, and saves it as one adapter in PEFT's format.

    Attributes:
        fits: of weight matrices, by module.
        replaced: parameters of the modules that are replaced as a whole, and of those in them, by module.
        biases: of weight matrices, where they changed, by module.
    """

    def __init__(self) -> None:
        self.fits: dict[str, Fit] = {}
        self.replaced: dict[str, dict[str, torch.Tensor]] = {}
        self.biases: dict[str, torch.Tensor] = {}
        self._old_biases: dict[str, torch.Tensor] = {}

    def add_linear(
        self, path: str, fit: Fit, bias: torch.Tensor | None = None, old_bias: torch.Tensor | None = None
    ) -> None:
        """Adapt the weight matrix of module `path`, such as `model.layers.0.mlp.up_proj`.

        Args:
            path: the module's full name in the model.
            fit: A and B of the weight as [out, in], also for GPT-2's Conv1D, which stores [in, out].
            bias: the merged bias [out] if it changed. PEFT writes it over the base's while it loads the adapter, so
                that disabling the adapter does not bring the base's back.
            old_bias: the base's bias if it did not change; PEFT has those of all modules in a file, or of none.
        """
        self.fits[path] = fit
        if old_bias is not None:
            self._old_biases[path] = old_bias
        if bias is not None:
            self.biases[path] = bias

    def add_replacement(self, path: str, parameters: dict[str, torch.Tensor]) -> None:
        """Replace a module that is no weight matrix, such as a norm, as a whole.

        Args:
            path: the module's full name in the model; neither it nor what is in it is given to `add_linear`.
            parameters: of it and of the modules in it after the merge, all in one call or in several, by their names in
                it and in the model's own shapes.
        """
        self.replaced.setdefault(path, {}).update(parameters)

    def replace(self, path: str, parameters: dict[str, torch.Tensor]) -> None:
        """Replace a module as a whole that was given to `add_linear`; `parameters` are those after the merge."""
        for known in (self.fits, self.biases, self._old_biases):
            known.pop(path, None)
        self.add_replacement(path, parameters)

    def save(
        self, folder: Path, base_name: str, revision: str | None, fan_in_fan_out: bool, metadata: dict[str, str]
    ) -> dict[str, float]:
        """Write adapter_model.safetensors and adapter_config.json, the same bytes for the same content.

        Args:
            folder: an existing folder.
            base_name: of the model to adapt, a hub id or a path as the user shall see it.
            revision: the commit of a hub model.
            fan_in_fan_out: whether the model's weight matrices are Conv1D, as GPT-2's are.
            metadata: of the safetensors file; `save_file` would write its keys in another order each time.

        Returns:
            The fit's error of each weight matrix by module; what was replaced is exact.

        Raises:
            ValueError: some fits have a magnitude and some have none; `as_dora` gives them one.
        """
        if len({fit.magnitude is None for fit in self.fits.values()}) > 1:
            raise ValueError("an adapter is LoRA or DoRA throughout; use as_dora")
        tensors = {f"base_model.model.{name}": tensor for name, tensor in self._tensors().items()}
        specifications = {name: (list(tensor.shape), NAMES[tensor.dtype]) for name, tensor in tensors.items()}
        with single_file(folder / "adapter_model.safetensors", specifications, metadata) as file:
            for name, tensor in tensors.items():
                file.put(name, tensor)
        self._config(base_name, revision, fan_in_fan_out).save_pretrained(str(folder))
        return {path: fit.error for path, fit in sorted(self.fits.items())}

    def _tensors(self) -> dict[str, torch.Tensor]:
        biases = self._old_biases | self.biases if self.biases else {}
        tensors = {f"{path}.base_layer.bias": bias for path, bias in biases.items()}
        for path, parameters in self.replaced.items():
            tensors |= {f"{path}.{name}": value for name, value in parameters.items()}
        for path, fit in self.fits.items():
            tensors |= {f"{path}.lora_A.weight": fit.A, f"{path}.lora_B.weight": fit.B}
            if fit.magnitude is not None:
                tensors[f"{path}.lora_magnitude_vector"] = fit.magnitude
        return tensors

    def _config(self, base_name: str, revision: str | None, fan_in_fan_out: bool) -> Any:
        from peft import LoraConfig
        from peft.utils.constants import DUMMY_TARGET_MODULES

        ranks = {path: len(fit.A) for path, fit in sorted(self.fits.items())}
        rank = max(ranks.values(), default=1)
        others = {f"^{path}": other for path, other in ranks.items() if other != rank}  # ^ as in PEFT's documentation
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_name,
            revision=revision,
            inference_mode=True,
            r=rank,
            lora_alpha=rank,  # a scaling of 1, here and in alpha_pattern
            rank_pattern=others,
            alpha_pattern=dict(others),
            use_dora=any(fit.magnitude is not None for fit in self.fits.values()),
            bias="lora_only" if self.biases else "none",
            target_modules=list(ranks) or DUMMY_TARGET_MODULES,  # a regex would be taken for names of old experts
            modules_to_save=sorted(self.replaced) or None,
            fan_in_fan_out=fan_in_fan_out,
        )


def check_errors(errors: dict[str, float], tolerance: float) -> None:
    """Refuse an adapter that does not hold the merged delta.

    Args:
        errors: of `AdapterOutput.save`, relative Frobenius errors by module.
        tolerance: the largest that is accepted.

    Raises:
        MistakeError: an error is larger, or is no number.
    """
    failed = {path: error for path, error in errors.items() if not error <= tolerance}
    if failed:
        worst = max(failed, key=failed.__getitem__)
        raise MistakeError(
            f"params.yaml: merge.adapter.tolerance is {tolerance:g}, but the adapter misses {failed[worst]:.2g} of the"
            f" delta of {worst}; raise merge.adapter.rank or the tolerance, or choose a merge.method that keeps rank,"
            " such as task_arithmetic"
        )


def _ratio(difference: torch.Tensor, delta: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(delta).clamp_min(torch.finfo(delta.dtype).tiny)  # stages can cancel out
    return float(torch.linalg.vector_norm(difference) / norm)
