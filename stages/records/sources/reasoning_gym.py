"""Tasks that the reasoning-gym library generates and scores (`source: reasoning_gym`)."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.errors import MistakeError, first_line
from stages.records.record import mark_tuples, restore_tuples
from stages.records.rows import Rows
from stages.records.source import Single

TRIED = 8  # entries that the scorer is tried on; some scorers take 20 ms


class ReasoningGym(Single):
    """Generated questions of one task, each with its answer, and a scorer of its own."""

    shuffled: ClassVar[bool] = False  # they come in random order

    source: Literal["reasoning_gym"]
    task: str
    """Name of the task, such as `chain_sum`; `reasoning_gym.factory.DATASETS` lists them."""
    config: dict[str, Any] = {}
    """The task's own settings."""
    train: int = Field(ge=0)
    """Records to train on; 0 for a guard, which no stage learns."""

    def rows(self, seed: str, where: str) -> Rows:
        """Up to four times as many as are wanted, for some questions come up twice.

        Raises:
            MistakeError: there is no such task with this config, its questions have no answers, or its scorer does not
                go with its answers.
        """
        entries = self._entries(random.Random(seed).randrange(2**31), where)
        if any(entry["answer"] is None or not str(entry["answer"]).strip() for entry in entries):
            raise MistakeError(
                f"{where}.task {self.task!r} has questions without an answer to learn; choose another task"
            )
        kept = self._find_storage(entries[:TRIED], where)
        rows = [
            {
                "prompt": entry["question"],
                "completion": str(entry["answer"]),
                "task": self.task,
                "entry": json.loads(json.dumps(kept(entry), default=str)),
            }
            for entry in entries
        ]
        return Rows(rows, lambda place: f"{where}: question {place + 1}", f"generated {self.task}")

    def _entries(self, seed: int, where: str) -> list[Any]:
        warnings.filterwarnings("ignore", category=SyntaxWarning)  # from a dependency, when it is first compiled
        import reasoning_gym

        size = 4 * (self.train + self.eval + self.tune)
        try:
            return list(reasoning_gym.create_dataset(self.task, size=size, seed=seed, **self.config))
        except (TypeError, ValueError, AssertionError) as error:
            raise MistakeError(
                f"{where}: reasoning_gym does not make task {self.task!r} with this config ({first_line(error)});"
                " see its list of tasks and their settings"
            ) from None

    def _find_storage(self, entries: list[Any], where: str) -> Callable[[Any], Any]:
        """What makes an entry such that the task's scorer sees no difference once JSON has been written and read."""
        from reasoning_gym import get_score_answer_fn

        score = get_score_answer_fn(self.task)
        try:
            scores = [score(str(entry["answer"]), entry) for entry in entries]
        except Exception as error:  # each scorer has its own ways to fail
            raise MistakeError(
                f"{where}.task {self.task!r} has a scorer that fails on the task's own answers ({first_line(error)});"
                " choose another task"
            ) from None
        for kept in (_as_it_is, mark_tuples):
            with suppress(Exception):
                if [score(str(entry["answer"]), _read_back(kept(entry))) for entry in entries] == scores:
                    return kept
        raise MistakeError(
            f"{where}.task {self.task!r} has a scorer that cannot be used once a question is in a file; choose another"
            " task"
        )


def _as_it_is(entry: Any) -> Any:
    return entry


def _read_back(entry: Any) -> Any:
    return restore_tuples(json.loads(json.dumps(entry, default=str)))
