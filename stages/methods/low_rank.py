"""What LoRA and DoRA share: two small factors beside every weight matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PrivateAttr

from stages.models.architecture import describe, exactly
from stages.models.layers import all_in_modules, beside, linear_modules, lone_matrices, plain_matrices
from stages.settings.stage import Share, Training

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class LowRank(Training):
    """W' = W + (alpha/rank)·B·A, with A [rank, in] and B [out, rank] trained in float32."""

    use_dora: ClassVar[bool] = False

    rank: int = Field(default=16, gt=0)
    """Directions that a matrix can change in, and each expert's in a mixture of them."""
    alpha: float | None = Field(default=None, gt=0)
    """The change is scaled by alpha/rank; twice the rank unless it is given."""
    dropout: Share = 0.0
    """Share of the inputs of A that are dropped at random."""
    rslora: bool = False
    """Scale by alpha/√rank, for ranks of 64 and more (arXiv 2312.03732)."""
    init: Literal["default", "pissa", "olora"] = "default"
    """Where the factors start: at zero, or from the matrix itself (arXiv 2404.02948, arXiv 2406.01775)."""
    load_in_4bit: bool = False
    """Hold the frozen matrices in four bits while training (QLoRA); needs `uv sync --extra four-bit`."""

    _start: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _mistaken: list[str] = PrivateAttr(default_factory=list)

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LoraConfig:
        """Adapt each weight matrix among `modules`, those of experts and routers as parameters."""
        from peft import LoraConfig

        is_plain = self.init == "olora" or self.load_in_4bit
        matrices = plain_matrices(self.method, model, modules) if is_plain else linear_modules(model, modules)
        parameters = lone_matrices(model, modules)
        if parameters and (self.use_dora or self.dropout or self.init != "default"):
            all_in_modules(f"{self.method!r} (or its dropout or init)", model, modules)
        targets, architecture = beside(self.method, model, matrices), describe(model)
        self._mistaken = [path for path in targets if architecture.is_mistaken(path)]
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
            use_rslora=self.rslora,
            init_lora_weights=True if self.init == "default" else self.init,
            target_modules=exactly(targets) if targets or not parameters else [],
            target_parameters=parameters or None,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )

    def started(self, model: PeftModel) -> None:
        """Keep the start of PiSSA and OLoRA, which they take off the weights."""
        if self.init != "default":
            self._start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def save(self, model: PeftModel, folder: Path) -> None:
        """Save the change as a LoRA of the unchanged parent: B·A − B₀·A₀ = [B, B₀]·[A; −A₀], of twice the rank."""
        super().save(model, folder)
        if self.init != "default":
            _subtract_start(folder, self._start)
        if self._mistaken and not self.use_dora:
            _name_weights(folder, self._mistaken, model.targeted_module_names)


def _name_weights(folder: Path, mistaken: list[str], modules: list[str]) -> None:
    """Tell PEFT by the parameters what it would take for other modules; the adapter's tensors have the same names."""
    from stages.files import read_json, write_json

    path = folder / "adapter_config.json"
    config, others = read_json(path), sorted(set(modules) - set(mistaken))
    parameters = [*(config["target_parameters"] or []), *(f"{each}.weight" for each in mistaken)]
    config |= {"target_modules": exactly(others) if others else [], "target_parameters": parameters}
    write_json(path, config | {"lora_dropout": 0.0})  # PEFT has none for parameters, and only training has any


def _subtract_start(folder: Path, start: dict[str, torch.Tensor]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from stages.files import read_json, write_json

    file, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    before = {name.replace(".default", ""): values.cpu() for name, values in start.items()}
    for name, values in tensors.items():
        parts = [values, -before[name]] if ".lora_A." in name else [values, before[name]]
        tensors[name] = torch.cat(parts, 0 if ".lora_A." in name else 1).contiguous()
    save_file(tensors, file, {"format": "pt"})
    config = read_json(path)
    growth = 2**0.5 if config["use_rslora"] else 2  # the scaling alpha/r, or alpha/√r, stays what it was
    config |= {"r": 2 * config["r"], "lora_alpha": growth * config["lora_alpha"], "init_lora_weights": True}
    write_json(path, config)
