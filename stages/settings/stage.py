"""What every training stage can be told, whatever its method."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stages.errors import MistakeError
from stages.settings.ranges import Layers, check_layers
from stages.settings.section import Chosen

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from stages.settings.base import Base

Share = Annotated[float, Field(ge=0, lt=1)]


class Stage(Chosen):
    """One post-training step: what it starts from, and the dataset that shows its skill.

    Methods import torch and peft when they are used, not at the top: params.yaml is read by every
    stage of the pipeline, and most of them need neither.
    """

    chooser = "method"

    parent: str
    """Where the stage starts: `base` or the name of another stage."""
    dataset: str
    """What it learns: a name under `datasets` or `selections`."""
    method: str
    """How it is trained; docs/methods.md compares the methods."""
    layers: Annotated[Layers, BeforeValidator(check_layers)] = "all"
    """What is trained, all else being frozen: `all`, `5`, `0-3,20-24`, `last 6`, a list of numbers, or one of these for
    each group (`attention`, `mixer`, `mlp`, its `experts` and `router`, `norms`, `embeddings`) or module name."""

    def check(self, name: str, base: Base, stages: dict[str, Stage], num_layers: int | None) -> None:
        """Refuse what the method cannot do with this base, or beside these stages.

        Args:
            name: of this stage.
            base: the section of params.yaml.
            stages: all of them, by name.
            num_layers: of the base, where it is known already.

        Raises:
            MistakeError: it needs something else; the sentence begins with the key below `stages.NAME`.
        """

    def try_out(self) -> None:
        """Refuse what only a library or a file can tell; called before anything is trained.

        Raises:
            MistakeError: as `check`.
        """

    def try_on_base(self) -> None:
        """Refuse what only the base in checkpoints/ can tell.

        Raises:
            MistakeError: as `check`, or the sentence names a file.
        """


class Training(Stage, ABC):
    """A stage that is trained here; a method adds its own keys and says how it is put on the model."""

    protectable: ClassVar[bool] = False  # whether `protect` can take out what acts on protected inputs

    lr: float = Field(gt=0)
    """Peak learning rate. LoRA: 1e-4 to 2e-3; all weights: a tenth of that."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(default=16, gt=0)
    """Examples per step."""
    micro_batch_size: int = Field(default=8, gt=0)
    """Examples at once in memory; lower it when memory runs out."""
    max_length: int = Field(default=1024, gt=1)
    """Tokens per example, or as many as the base reads; longer ones are cut."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Share = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of what is trained, per step, times the learning rate."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    replay: Share = 0.0
    """Share of every batch that comes from the datasets of the stage's ancestors; against forgetting, try 0.25."""
    surgery: Literal["upgrad", "pcgrad", "mgda", "aligned_mtl"] | None = None
    """How the gradients of several sources (parts of a mix, replay) are combined; without it they are added."""
    remember: Share = 0.0
    """Save a basis that holds this share of the energy of the stage's inputs, such as 0.999, for others to protect."""
    protect: list[str] = []
    """Ancestors that remember their inputs: what they make of them, this stage must not change."""
    keep: Literal["last", "best"] = "last"
    """`best` ends with the weights that had the lowest loss on the tuning split, looked at every 10 steps."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after so many looks at the tuning split without a lower loss."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    processes: int = Field(default=1, gt=0)
    """Processes (GPUs) that train together; they divide every batch, so the result differs by rounding."""

    @property
    def is_tuned(self) -> bool:
        """Whether the stage looks at its dataset's tuning split."""
        return self.keep == "best" or self.patience is not None

    @abstractmethod
    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> PeftConfig:
        """PEFT configuration that trains this method on `modules` of `model` and nothing else.

        Args:
            model: the base or the parent, maybe without its weights.
            modules: those with parameters in the stage's layers.

        Raises:
            MistakeError: as `check`.
        """

    def trained(self, config: PeftConfig, modules: list[str]) -> list[str]:
        """Those of `modules` that the configuration, which `adapter_config` just gave, has something to train in."""
        pattern = getattr(config, "target_modules", None)  # a list is one of no modules
        owners = {name.rpartition(".")[0] for name in getattr(config, "target_parameters", None) or []}
        named = [path for path in modules if isinstance(pattern, str) and re.fullmatch(pattern, path)]
        return [path for path in modules if path in owners.union(named)]

    def started(self, model: PeftModel) -> None:
        """Called once with the wrapped model, before anything is frozen in a lower precision."""

    def stepped(self, model: PeftModel, step: int) -> None:
        """Called after every optimizer step, with its number from 0."""

    def state(self, model: PeftModel) -> dict[str, torch.Tensor]:
        """What the next step depends on beside the trained parameters, their optimizer and the random generators."""
        return {}

    def load_state(self, model: PeftModel, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave before the stage was killed; it comes in main memory."""

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the trained adapter in PEFT's format, without the model card that names this machine's paths.

        Nor has it a copy of the base's embedding or output layer, which PEFT adds where one of them has an adapter, and
        to know that asks the hub for the parent's config.
        """
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)


class Imported(Stage, ABC):
    """A stage whose adapter was trained elsewhere."""

    @abstractmethod
    def locate(self) -> Path:
        """Folder with the adapter, once its content is known to be what params.yaml names.

        Raises:
            MistakeError: it is not there, or is another; the sentence begins with the key below `stages.NAME`.
        """

    def check(self, name: str, base: Base, stages: dict[str, Stage], num_layers: int | None) -> None:
        """An imported adapter stands on the base."""
        if self.parent != "base":
            raise MistakeError(f"parent is {self.parent!r}, but an imported adapter stands on the base; write base")
