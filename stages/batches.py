"""What a training step sees: examples from the stage's own dataset, its parts, and what it replays."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from stages import params
from stages.errors import MistakeError
from stages.methods.stage import Training
from stages.model import load_tokenizer
from stages.records import Example, encode, load_split

REPLAY = "replay"  # the source of what the ancestors learned


@dataclass(frozen=True)
class Source:
    """Examples that have a share of every batch.

    Args:
        name: of the dataset, a part of it, or REPLAY.
        examples: all of them.
        count: how many there are in a batch.
        seed: of the batches' composition.
        order_seed: of their order.
    """

    name: str
    examples: list[Example]
    count: int
    seed: int
    order_seed: int

    def batch(self, step: int) -> list[Example]:
        """Examples of one step, a function of its number alone; the shortest first, for less padding.

        Which examples go together stays the same, only the order of the batches changes with every pass: so what
        a frozen layer makes of a batch can be kept.
        """
        turn, position = divmod(step, -(-len(self.examples) // self.count))
        first = int(self._order(turn)[position]) * self.count
        chosen = [self._shuffled[i % len(self.examples)] for i in range(first, first + self.count)]
        return sorted((self.examples[i] for i in chosen), key=lambda example: len(example.ids))

    @cached_property
    def _shuffled(self) -> list[int]:
        return torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(self.seed)).tolist()

    def _order(self, turn: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.order_seed << 20) + turn)
        return torch.randperm(-(-len(self.examples) // self.count), generator=generator)


def sources(settings: params.Params, name: str, stage: Training, seed: int) -> list[Source]:
    """The stage's dataset (each of its parts, if it is a mix), and its ancestors' where it replays them.

    Raises:
        MistakeError: `max_length` cuts off every answer, or the batch is too small to hold all sources.
    """
    dataset = settings.datasets[settings.selected_from(stage.dataset)]
    if dataset.source == "mix":
        weights = dataset.weights()
        examples = {part: _encode(stage.dataset, name, stage, part) for part in weights}
    else:
        weights, examples = {stage.dataset: 1.0}, {stage.dataset: _encode(stage.dataset, name, stage)}
    earlier = [settings.stages[a].dataset for a in settings.ancestors(name)] if stage.replay else []
    replayed = [dataset for dataset in dict.fromkeys(earlier) if dataset != stage.dataset]
    if replayed:
        weights = {part: (1 - stage.replay) * weight for part, weight in weights.items()} | {REPLAY: stage.replay}
        examples[REPLAY] = list(itertools.chain.from_iterable(_encode(d, name, stage) for d in replayed))
    counts = apportion(weights, stage.batch_size)
    if missed := [source for source, count in counts.items() if count == 0]:
        raise MistakeError(
            f"params.yaml: stages.{name}.batch_size {stage.batch_size} leaves no room for {', '.join(missed)}; raise it"
        )
    # The composition is the dataset's and not the stage's, so that stages with one parent share what is cached.
    composition = derive_seed(settings.seed, stage.dataset)
    return [Source(source, examples[source], count, composition, seed) for source, count in counts.items()]


def derive_seed(seed: int, name: str) -> int:
    """A seed of its own for every name, from the global seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def apportion(weights: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total`, as near to the weights' shares as can be (largest remainders)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    largest = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    return counts | {name: counts[name] + 1 for name in largest[: total - sum(counts.values())]}


def _encode(dataset: str, name: str, stage: Training, part: str | None = None) -> list[Example]:
    """Examples of a dataset's train split, or of one part of a mix, that have something to learn."""
    tokenizer = load_tokenizer()
    records = (record for record in load_split(dataset, "train") if part in (None, record.get("part")))
    found = [encode(record, tokenizer, stage.max_length) for record in records]
    kept = [example for example in found if example.learned]
    if not kept:
        raise MistakeError(
            f"params.yaml: stages.{name}.max_length {stage.max_length} cuts off every answer of"
            f" dataset {part or dataset!r}; raise it"
        )
    return kept


def cut(sources: Iterable[Source], max_length: int) -> int:
    """How many examples were cut to `max_length`."""
    return sum(len(example.ids) == max_length for source in sources for example in source.examples)
