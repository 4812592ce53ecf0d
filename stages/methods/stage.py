"""What every training stage can be told, whatever its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from stages.errors import MistakeError
from stages.layers import Layers, linear_modules

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

Share = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A mapping of params.yaml: every key known, every value of the stated type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Stage(Settings):
    """One post-training step: what it starts from, and the dataset that shows its skill.

    Methods import torch and peft when they are used, not at the top: params.yaml is read by every
    stage of the pipeline, and most of them need neither.
    """

    parent: str
    dataset: str
    method: str
    layers: Layers = "all"

    @classmethod
    def name(cls) -> str:
        """The value of `method` that selects this class."""
        return str(get_args(cls.model_fields["method"].annotation)[0])

    @classmethod
    def methods(cls) -> Iterator[type[Stage]]:
        """Every class below this one that names a method."""
        for subclass in cls.__subclasses__():
            if subclass.model_fields["method"].annotation is not str:
                yield subclass
            yield from subclass.methods()


class Training(Stage, ABC):
    """A stage that is trained here; a method adds its own keys and says how it is put on the model."""

    lr: float = Field(gt=0)
    steps: int = Field(gt=0)
    batch_size: int = Field(default=16, gt=0)
    micro_batch_size: int = Field(default=8, gt=0)
    max_length: int = Field(default=1024, gt=1)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Share = 0.1
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    replay: Share = 0.0
    surgery: Literal["upgrad", "pcgrad", "mgda", "aligned_mtl"] | None = None
    protect: list[str] = []
    remember: Share = 0.0
    keep: Literal["last", "best"] = "last"
    patience: int | None = Field(default=None, gt=0)
    gradient_checkpointing: bool = False

    @abstractmethod
    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> PeftConfig:
        """PEFT configuration that trains this method on `modules` of `model` and nothing else."""

    def started(self, model: PeftModel) -> None:
        """Called once with the wrapped model, before anything is frozen in a lower precision."""

    def stepped(self, model: PeftModel, step: int) -> None:
        """Called after every optimizer step, with its number from 0."""

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the trained adapter in PEFT's format, without the model card that names this machine's paths."""
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)


def plain_matrices(stage: Training, model: PreTrainedModel, modules: list[str]) -> list[str]:
    """The weight matrices among `modules`, where all are Linear.

    Raises:
        MistakeError: they are GPT-2's Conv1D, which PEFT does not adapt by this method.
    """
    from torch import nn

    matrices = linear_modules(model, modules)
    if not all(isinstance(model.get_submodule(path), nn.Linear) for path in matrices):
        raise MistakeError(
            f"params.yaml: method {stage.method!r} (or its init or load_in_4bit) does not go with"
            f" {type(model).__name__}, whose weights are no Linear modules; choose lora, dora, ia3, adalora, bitfit, ln"
            " or full"
        )
    return matrices
