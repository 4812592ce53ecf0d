"""What a training step sees: examples from the stage's own dataset, its parts, and what it replays."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset

from stages.errors import MistakeError
from stages.models.loading import load_tokenizer
from stages.project.params import Params
from stages.records.lines import load_split
from stages.records.sources.mix import Mix
from stages.records.tokens import Example, encode
from stages.settings.stage import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLAY = "replay"  # the source of what the ancestors learned


class Encoded(Sequence[Example]):
    """The records that have something to learn, turned into tokens when they are asked for.

    A dataset may be larger than the memory, which holds a number for each record.

    Args:
        records: any sequence of them.
        tokenizer: of the base.
        max_length: tokens that an example has at most.
        part: of a mix; other parts are left out.
    """

    def __init__(
        self, records: Any, tokenizer: "PreTrainedTokenizerBase", max_length: int, part: str | None = None
    ) -> None:
        self._records, self._tokenizer, self._max_length = records, tokenizer, max_length
        self._places = array("Q")
        self.cut = 0  # how many were cut to `max_length`
        for place in range(len(records)):
            if part in (None, records[place].get("part")):
                example = self._encode(place)
                if example.learned:
                    self._places.append(place)
                    self.cut += len(example.ids) == max_length

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return self._encode(self._places[place])

    def _encode(self, place: int) -> Example:
        return encode(self._records[place], self._tokenizer, self._max_length)


@dataclass(frozen=True)
class Source:
    """Examples that have a share of every batch.

    Args:
        name: of the dataset, a part of it, or REPLAY.
        examples: all of them.
        count: how many there are in a batch.
        seed: of the batches' composition.
        order_seed: of their order.
        cut: how many of the examples were cut to the stage's `max_length`.
    """

    name: str
    examples: Sequence[Example]
    count: int
    seed: int
    order_seed: int
    cut: int = 0

    def batch(self, step: int) -> list[Example]:
        """Examples of one step, a function of its number alone; the shortest first, for less padding.

        Which examples go together stays the same, only the order of the batches changes with every pass: so what
        a frozen layer makes of a batch can be kept.
        """
        turn, position = divmod(step, -(-len(self.examples) // self.count))
        first = int(self._order(turn)[position]) * self.count
        chosen = [int(self._shuffled[i % len(self.examples)]) for i in range(first, first + self.count)]
        return sorted((self.examples[i] for i in chosen), key=lambda example: len(example.ids))

    @cached_property
    def _shuffled(self) -> torch.Tensor:
        return torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(self.seed))

    def _order(self, turn: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.order_seed << 20) + turn)
        return torch.randperm(-(-len(self.examples) // self.count), generator=generator)


def sources(settings: Params, name: str, stage: Training, seed: int) -> list[Source]:
    """The stage's dataset (each of its parts, if it is a mix), and its ancestors' where it replays them.

    Raises:
        MistakeError: `max_length` cuts off every answer, or the batch is too small to hold all sources.
    """
    dataset = settings.datasets[settings.selected_from(stage.dataset)]
    if isinstance(dataset, Mix):
        weights = dataset.weights()
        examples = {part: _encode([stage.dataset], name, stage, part) for part in weights}
    else:
        weights, examples = {stage.dataset: 1.0}, {stage.dataset: _encode([stage.dataset], name, stage)}
    earlier = [settings.stages[a].dataset for a in settings.ancestors(name)] if stage.replay else []
    replayed = [dataset for dataset in dict.fromkeys(earlier) if dataset != stage.dataset]
    if replayed:
        weights = {part: (1 - stage.replay) * weight for part, weight in weights.items()} | {REPLAY: stage.replay}
        examples[REPLAY] = _encode(replayed, name, stage)
    counts = apportion(weights, stage.batch_size)
    if missed := [source for source, count in counts.items() if count == 0]:
        raise MistakeError(
            f"params.yaml: stages.{name}.batch_size {stage.batch_size} leaves no room for {', '.join(missed)}; raise it"
        )
    # The composition is the dataset's and not the stage's, so that stages with one parent share what is cached.
    composition = derive_seed(settings.seed, stage.dataset)
    return [
        Source(source, examples[source], count, composition, seed, examples[source].cut)
        for source, count in counts.items()
    ]


def derive_seed(seed: int, name: str) -> int:
    """A seed of its own for every name, from the global seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def apportion(weights: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total`, as near to the weights' shares as can be (largest remainders)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    largest = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    return counts | {name: counts[name] + 1 for name in largest[: total - sum(counts.values())]}


def _encode(datasets: list[str], name: str, stage: Training, part: str | None = None) -> Encoded:
    """Examples of the datasets' train splits, one after the other, or of one part of a mix."""
    splits: Any = [load_split(dataset, "train") for dataset in datasets]
    found = Encoded(ConcatDataset(splits), load_tokenizer(), stage.max_length, part)
    if not found:
        raise MistakeError(
            f"params.yaml: stages.{name}.max_length {stage.max_length} cuts off every answer of"
            f" {part or ', '.join(datasets)}; raise it"
        )
    return found
