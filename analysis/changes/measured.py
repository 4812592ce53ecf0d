"""What was measured of weights, as `analysis.measure` leaves it for the report. Reading it needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.changes.metrics import PARTS
from stages.files import read_json, write_json
from stages.models.architecture import OUTSIDE

MERGED = "merged"  # the merged model's name among the stages'
STRONGEST = 16  # directions of a delta that are compared
TESTED = 10  # strongest directions of W + Δ that are tested for being new (arXiv 2410.21228)

KEYS = ["stage", "layer", "module", "parameter"]  # what names a tensor of a checkpoint
COLUMNS = [*KEYS, *(part.name for part in PARTS)]
SPECTRUM = ["spectral_norm", "stable_rank", "effective_rank", "directions", "intruders"]
CONFLICT = ["entries", "disagreeing", "size", "summed", "summed_by_chance"]
INTERFERENCE = ["interference", "interference_by_chance"]
PAIRS = ["layer", "module", "first", "second"]
PAIRS += ["reads", "reads_by_chance", "reads_spread", "writes", "writes_by_chance", "writes_spread"]
TABLES = ["rows", "conflicts", "pairs", "heads"]

Matrix = np.ndarray


@dataclass(frozen=True)
class Measured:
    """Everything the report needs to know about weights.

    Attributes:
        names: the stages in the order of params.yaml, then `merged`.
        rows: one per checkpoint and tensor that it changes: stage, layer, module, parameter, and the parts of
            METRICS; for the matrices of stages also `spectral_norm` σ₁, `stable_rank` ‖Δ‖²/σ₁², `effective_rank`,
            and of how many `directions` at most; for matrices of layers, the merge's too, how many `intruders` the
            changed weights have.
        conflicts: one row per tensor that several merged stages change: layer, stages (their names), what
            `sign_conflict` returns, and of matrices what `interference` does.
        pairs: one row per matrix and two stages that change it: layer, module, their names, and how far the subspaces
            that they read and write overlap, beside the mean and the standard deviation of random ones.
        heads: of attention, from `measure_heads`.
        grams: by layer, inner products of all pairs of `names`, float64 [names, names].
        modules: kinds of modules in the order of the model, such as `self_attn.q_proj`.
        layers: how many layers the model has.
        dtype: of the merged file, such as `bfloat16`.
        untouched: how many tensors no merged stage changes.
        untouched_max: max|merged − base| over them, the base rounded to the merged file's dtype.
    """

    names: list[str]
    rows: pd.DataFrame
    conflicts: pd.DataFrame
    pairs: pd.DataFrame
    heads: pd.DataFrame
    grams: dict[int, Matrix]
    modules: list[str]
    layers: int
    dtype: str
    untouched: int
    untouched_max: float

    @property
    def inside(self) -> pd.DataFrame:
        """The rows of tensors that lie in a layer."""
        return self.rows[self.rows["layer"] != OUTSIDE]

    def write(self, folder: Path) -> None:
        """Write tables as parquet, and the rest as JSON; the same bytes for the same content."""
        for table in TABLES:
            getattr(self, table).to_parquet(folder / f"{table}.parquet", index=False)
        rest = {key: value for key, value in vars(self).items() if key not in [*TABLES, "grams"]}
        write_json(folder / "rest.json", rest | {"grams": {k: gram.tolist() for k, gram in sorted(self.grams.items())}})

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """What `write` left."""
        rest = read_json(folder / "rest.json")
        told = {each.name: rest[each.name] for each in dataclasses.fields(cls) if each.name not in TABLES}
        grams = {int(layer): np.array(gram) for layer, gram in rest["grams"].items()}
        tables = {table: pd.read_parquet(folder / f"{table}.parquet") for table in TABLES}
        return cls(**told | tables | {"grams": grams})
