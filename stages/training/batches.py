"""What a training step sees: examples from the stage's own dataset, its parts, and what it replays."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import ConcatDataset

from stages.errors import MistakeError
from stages.files import BASE, DATA, read_json, sha256
from stages.models.architecture import Architecture
from stages.models.loading import load_tokenizer
from stages.records.lines import load_split
from stages.records.tokens import Example, encode
from stages.settings.stage import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.project.params import Params

MIX = "mix.json"  # beside the splits of a mix: the share of every batch that each part has
REPLAY = "replay"  # what the source of the ancestors' examples is called; a dataset may have the same name

Key = TypeVar("Key")


class Encoded(Sequence[Example]):
    """The examples of records that have something to learn, turned into tokens when they are asked for.

    A dataset may be larger than the memory, which holds two numbers for each example.

    Args:
        records: any sequence of them.
        tokenizer: of the base.
        max_length: tokens that an example has at most.
        part: of a mix; other parts are left out.

    Attributes:
        cut: how many examples lost tokens to `max_length`, those among them that have nothing left to learn.
    """

    def __init__(
        self, records: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, part: str | None = None
    ) -> None:
        self._records, self._tokenizer, self._max_length = records, tokenizer, max_length
        self._places, self._turns = array("Q"), array("Q")
        self.cut = 0
        for place in range(len(records)):
            if part in (None, records[place].get("part")):
                longer = encode(records[place], tokenizer, max_length + 1)  # one token more shows what is cut
                for turn, example in enumerate(longer):
                    self.cut += len(example.ids) > max_length
                    if Example(example.ids[:max_length], example.weights[:max_length]).learned:
                        self._places.append(place)
                        self._turns.append(turn)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return encode(self._records[self._places[place]], self._tokenizer, self._max_length)[self._turns[place]]


@dataclass(frozen=True)
class Source:
    """Examples that have a share of every batch.

    Args:
        name: of the dataset, or a part of it.
        examples: all of them.
        count: how many there are in a batch.
        seed: of the batches' composition.
        order_seed: of their order.
        cut: how many records lost tokens to the stage's `max_length`.
        replayed: whether these are the ancestors' examples and not the stage's own.
    """

    name: str
    examples: Sequence[Example]
    count: int
    seed: int
    order_seed: int
    cut: int = 0
    replayed: bool = False

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
    """The stage's dataset (each of its parts, if it is a mix), then its ancestors' where it replays them.

    Raises:
        MistakeError: a source has nothing to learn, or the batch is too small to hold all of them.
    """
    parts, earlier = shares(stage.dataset), replays(settings, name, stage)
    own = 1 - stage.replay if earlier else 1.0
    # The keys say what is replayed, for a dataset or a part may be called `replay` too.
    weights = {(source, False): own * share for source, share in (parts or {stage.dataset: 1.0}).items()}
    weights |= {(REPLAY, True): stage.replay} if earlier else {}
    counts = apportion(weights, stage.batch_size)
    if missed := [source for (source, _), count in counts.items() if count == 0]:
        raise MistakeError(
            f"params.yaml: stages.{name}.batch_size {stage.batch_size} leaves no room for {', '.join(missed)}; raise it"
        )
    # Seeded by dataset and not by stage, so that stages with the same parent and dataset share what is cached.
    composition = derive_seed(settings.seed, stage.dataset)
    found = []
    for (source, replayed), count in counts.items():
        datasets, part = (earlier, None) if replayed else ([stage.dataset], source if parts else None)
        examples = encode_split(datasets, "train", name, stage, part)
        found.append(Source(source, examples, count, composition, seed, examples.cut, replayed))
    return found


def shares(dataset: str) -> dict[str, float]:
    """Each part's share of what is seen of a mix; nothing for a dataset without parts."""
    path = DATA / dataset / MIX
    return read_json(path) if path.exists() else {}


def replays(settings: Params, name: str, stage: Training) -> list[str]:
    """The datasets that the stage replays: its ancestors' but for its own, the oldest first."""
    earlier = [settings.stages[ancestor].dataset for ancestor in settings.ancestors(name)] if stage.replay else []
    return [dataset for dataset in dict.fromkeys(earlier) if dataset != stage.dataset]


def hash_of(dataset: str, splits: Sequence[str] = ("train",)) -> str:
    """Hash of some splits of a dataset, and of its parts' shares if it is a mix."""
    mix = DATA / dataset / MIX
    return sha256([*(DATA / dataset / f"{split}.jsonl" for split in splits), *([mix] if mix.exists() else [])])


def derive_seed(seed: int, name: str) -> int:
    """A seed of its own for every name, from the global seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def apportion(weights: dict[Key, float], total: int) -> dict[Key, int]:
    """Whole numbers that sum to `total`, as near to the weights' shares as can be (largest remainders)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    largest = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    return counts | {name: counts[name] + 1 for name in largest[: total - sum(counts.values())]}


def encode_split(datasets: list[str], split: str, name: str, stage: Training, part: str | None = None) -> Encoded:
    """Examples of one split of the datasets, one after the other, or of one part of a mix.

    Raises:
        MistakeError: the stage's `max_length` or the model's own cuts off every answer, no token has a weight, or a
            record does not go with the base's chat template or tokenizer.
    """
    records: Any = [load_split(dataset, split) for dataset in datasets]
    which = part or ", ".join(datasets)
    positions = Architecture.of(BASE).positions or stage.max_length
    try:
        found = Encoded(ConcatDataset(records), load_tokenizer(), min(stage.max_length, positions), part)
    except MistakeError as error:
        raise MistakeError(f"params.yaml: stages.{name} learns {which}, where {error}") from None
    if not found:
        if found.cut and positions < stage.max_length:
            raise MistakeError(
                f"params.yaml: stages.{name} learns {which}, and base.model reads {positions} tokens, which cuts off"
                " every answer; take shorter records"
            )
        raise MistakeError(
            f"params.yaml: stages.{name}.max_length {stage.max_length} cuts off every answer of {which}; raise it"
            if found.cut
            else f"params.yaml: stages.{name} learns nothing of {which}, where no token has a weight; take another"
            " dataset, or a selection that keeps more"
        )
    return found
