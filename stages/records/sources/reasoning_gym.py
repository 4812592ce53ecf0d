"""Tasks that the reasoning-gym library generates and scores (`source: reasoning_gym`)."""

from __future__ import annotations

import random
import warnings
from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.errors import MistakeError
from stages.records.record import Record
from stages.records.source import Single


class ReasoningGym(Single):
    """Generated questions of one task, each with its answer, and a scorer of its own."""

    shuffled: ClassVar[bool] = False  # they come in random order

    source: Literal["reasoning_gym"]
    task: str
    """Name of the task, such as `chain_sum`; `reasoning_gym.factory.DATASETS` lists them."""
    config: dict[str, Any] = {}
    """The task's own settings."""
    train: int = Field(gt=0)
    """Records to train on."""

    def records(self, seed: str, where: str) -> list[Record]:
        """Up to four times as many as are wanted, for some questions come up twice."""
        warnings.filterwarnings("ignore", category=SyntaxWarning)  # from a dependency, when it is first compiled
        import reasoning_gym

        try:
            tasks = list(
                reasoning_gym.create_dataset(
                    self.task,
                    size=4 * (self.train + self.eval + self.tune),
                    seed=random.Random(seed).randrange(2**31),
                    **self.config,
                )
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise MistakeError(
                f"{where}: reasoning_gym does not make task {self.task!r} with this config"
                f" ({str(error).strip() or type(error).__name__}); see its list of tasks and their settings"
            ) from None
        return [
            {
                "prompt": entry["question"].rstrip() + "\n",
                "completion": str(entry["answer"]),
                "task": self.task,
                "entry": entry,
            }
            for entry in tasks
        ]
