"""A tiny project in a temporary folder: a base, three stages, a merge, and what the other stages report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from analysis import measure, report
from analysis.telling.answers import ANSWERS
from analysis.telling.facts import Facts, gather
from stages import evaluate, pick
from stages.files import rounded, write_json
from stages.merge import write
from stages.merging.merged import Merged
from stages.methods import METHODS
from stages.models.layers import select
from stages.project.params import load_params
from stages.settings.ranges import Layers, parse
from stages.weights.checkpoint import open_stages

STAGES = {"sums": ("base", "lora", "0-1"), "names": ("sums", "dora", "1-2"), "prose": ("base", "full", "3")}


class Project:
    """The folder that the tests run in."""

    def __init__(self) -> None:
        self.stages = dict(STAGES)
        self.params()
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=True,
            )
        )  # fmt: skip
        model.to(torch.bfloat16).save_pretrained("checkpoints/base")
        write_json(
            Path("checkpoints/base/stage.json"), {"name": "base", "model": "tiny", "dtype": "bfloat16", "layers": 4}
        )
        for name in STAGES:
            self.train(name)
        self.answers({})

    def params(self, dtype: str = "float32", weights: tuple = (1.0, 1.0, 1.0), rounding: str = "stochastic") -> None:
        lines = ["seed: 0", "threads: 1", "base: {model: tiny}", "evaluate: {batch_size: 8}", "datasets:"]
        lines += [f"  {name}: {{source: file, path: {name}.jsonl, eval: 100}}" for name in self.stages]
        lines += ["stages:"]
        for name, (parent, method, layers) in self.stages.items():
            settings = f"dataset: {name}, method: {method}, layers: {layers!r}, lr: 1.0e-3, steps: 2"
            lines.append(f"  {name}: {{parent: {parent}, {settings}}}")
        listed = ", ".join(f"{name}: {weight}" for name, weight in zip(self.stages, weights, strict=True) if weight)
        lines += ["merge:", "  method: task_arithmetic", f"  dtype: {dtype}", f"  rounding: {rounding}"]
        lines.append(f"  weights: {{{listed}}}")
        Path("params.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def train(self, name: str, secretly: Layers | None = None) -> None:
        """Random changes in place of training; `secretly` in other layers than stage.json will tell."""
        parent, method, layers = self.stages[name]
        stage = METHODS[method](parent=parent, dataset=name, method=method, layers=layers, lr=1e-3, steps=2)
        declared = parse(layers, 4)
        model = LlamaForCausalLM.from_pretrained("checkpoints/base", dtype=torch.float32)
        wrapped = get_peft_model(model, stage.adapter_config(model, select(model, secretly or layers)))
        torch.manual_seed(len(name) + ord(name[0]))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01 * torch.randn_like(parameter)
        folder = Path("checkpoints") / name
        stage.save(wrapped, folder)
        settings = {"lr": 1e-3, "steps": 2, "replay": 0.0}
        record = {"name": name, "parent": parent, "dataset": name, "method": method, "layers": declared}
        write_json(folder / "stage.json", record | {"settings": settings, "trained_parameters": 7})
        curve = [{"stage": name, "step": step, "loss": 2.0 / step} for step in (1, 2)]
        write_json(Path("reports/train") / f"{name}.curve.json", curve)
        write_json(Path("reports/train") / f"{name}.json", {name: {"steps": 2, "tokens": 64}})
        scorers = {name: {"scorer": "exact", "why": "answers are short"}}
        write_json(Path("reports/data") / f"{name}.json", {name: {"eval": 100, "scorers": scorers}})

    def plant(self, name: str, layers: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Make it a stage on the base that changes every tensor of some layers as told: by name, given the weights."""
        self.stages[name] = ("base", "full", layers)
        self.params()
        self.train(name)
        file = Path("checkpoints") / name / "adapter_model.safetensors"
        base, _ = open_stages([])
        planted = {}
        for key in load_file(file):
            path, _, parameter = key.removeprefix("base_model.model.").replace(".ln_tuning_layers", "").rpartition(".")
            weights = base.module(path)[parameter]
            planted[key] = (weights + change(f"{path}.{parameter}", weights)).contiguous()
        save_file(planted, file)

    def merge(self) -> None:
        self.probe()
        settings = load_params()
        base, stages = open_stages(sorted(settings.merge.weights))
        Path("merged").mkdir(exist_ok=True)
        write(Merged(base, stages, settings.merge), Path("merged"), {})

    def probe(self) -> None:
        """What analysis.probe would leave, with made-up numbers."""
        drift = {"mean": [0.0, 0.1, 0.2, 0.3], "low": [0.0, 0.0, 0.1, 0.2], "high": [0.1, 0.2, 0.3, 0.4]}
        domain = {"drift": drift, "kl": {"mean": 0.2, "low": 0.1, "high": 0.3}}
        looks = {"sink": [[0.1, 0.4, 0.5, 0.5]] * 4, "entropy": [[2.0, 1.0, 1.0, 1.0]] * 4, "sets_in": 1}
        written = {"self_attn": [0.2] * 4, "mlp": [0.5] * 4}
        found = {"on": domain, "off": domain, "attention": looks | {"divergence": [[0.0, 0.1, 0.2, 0.1]] * 4}}
        found |= {
            "written": written,
            "trained": [1, 2],
            "lens": [0.1] * 4,
            "early": {"layers": 1, "left": 0.1, "share": 0.5},
        }
        for name in [*self.stages, "merged"]:
            rows = [
                {"stage": name, "layers": [1, 2], "dataset": skill, "loss": 1.0, "without": 1.5} for skill in STAGES
            ]
            write_json(Path("reports/probe") / f"{name}.json", found | {"ablation": rows if name in STAGES else []})
        base = {"attention": looks, "written": written}
        floor = {"drift": [0.01] * 4, "lens": [0.0] * 4, "kl": 0.001, "attention": 0.01}
        write_json(Path("reports/probe/base.json"), {"layers": 4, "floor": floor, "base": base})
        write_json(Path("reports/rounding.json"), {"rounding": 1e-4, "training": 0.1})

    def answers(self, skills: dict[str, list[dict[str, Any]]]) -> None:
        """What the models say: by skill, records of `question`, `reference` and, by model, an answer and its score."""
        columns = ["dataset", "record", "model", "question", "reference", "answer", "score", "end", "loss", "weight"]
        rows = [
            (skill, number, model, each["question"], each["reference"], *each[model], "stop", 1.0, 1.0)
            for skill, records in skills.items()
            for number, each in enumerate(records, start=1)
            for model in each.keys() - {"question", "reference"}
        ]
        table = pd.DataFrame(rows, columns=columns).astype({"record": "int64", "score": "float64"})
        Path("reports").mkdir(exist_ok=True)
        table.to_parquet(ANSWERS, index=False)

    def facts(self) -> Facts:
        """What the report tells, measured now."""
        pick.main("checkpoints")
        measure.main()
        return gather(load_params())

    def report(self) -> None:
        """Measure and write the report."""
        report.write(self.facts())

    def evaluation(
        self,
        merged: float = 0.8,
        names_on_sums: float = 0.8,
        reached: dict[tuple[str, str], float] | None = None,
        questions: int = 100,
        scorer: str = "exact",
    ) -> None:
        """Every stage reaches 0.8 on its own skill, and 0.1 on the others.

        Args:
            merged: accuracy of the merged model on `sums`.
            names_on_sums: accuracy of the stage `names` there.
            reached: other accuracies, by model and skill; a model answers the first questions rightly.
            questions: of each skill.
            scorer: what scores them.
        """
        shares = {(name, name): 0.8 for name in STAGES} | {("merged", skill): 0.8 for skill in STAGES}
        shares |= {("merged", "sums"): merged, ("names", "sums"): names_on_sums, **(reached or {})}
        rows = [
            {"dataset": skill, "record": number, "model": model, "scorer": scorer, "loss": 1.0, "weight": 1.0}
            | {"score": float(number <= round(shares.get((model, skill), 0.1) * questions))}
            for skill in STAGES
            for number in range(1, questions + 1)
            for model in ("base", *STAGES, "merged")
        ]
        content = evaluate.evaluation(pd.DataFrame(rows), load_params())
        write_json(Path("reports/evaluation.json"), rounded(content))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Project()
