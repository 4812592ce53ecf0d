"""A file of every kind in one run of the pipeline: however questions are written, it gives the same numbers."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.files import read_json
from stages.project.params import load_params
from tests.conftest import ARCHITECTURES, make_tokenizer
from tests.forked import Pipeline, copy_repository
from tools.show import told

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": f"say {a}{b}:", "completion": f"{b}{a}"} for a in "abcd" for b in "xyz"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(pair: dict[str, str], wrap: Callable[[str], Any] = str) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "completion": "assistant"}
    return [{"role": role, "content": wrap(pair[part])} for part, role in roles.items()]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def sharegpt(pair: dict[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": pair["prompt"]}, {"from": "gpt", "value": pair["completion"]}]}


def parted(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]


CSV = "prompt,completion\n" + "".join(f"{pair['prompt']},{pair['completion']}\n" for pair in PAIRS)
NESTED = [{"q": {"text": pair["prompt"]}, "answers": [pair["completion"], "?"]} for pair in PAIRS]
DIRT = [*PAIRS[:6], {"prompt": "", "completion": "?"}, *PAIRS[6:], PAIRS[0], {"prompt": "say ax:", "completion": None}]
COUNTS = {"rows": 12, "empty": 0, "repeated": 0, "other_answers": 0}
PROMPTS = "prompts and completions (prompt, completion)"

# By name of the dataset: the file, what is in it, what it is said to be, more of params.yaml, and other counts.
FILES: dict[str, tuple[str, Any, str, dict[str, Any], dict[str, int]]] = {
    "jsonl": ("a.jsonl", lines(PAIRS), f"jsonl, {PROMPTS}", {}, {}),
    "windows": ("b.jsonl", f"\ufeff{lines(PAIRS)}".replace("\n", "\r\n\r\n"), f"jsonl, {PROMPTS}", {}, {}),
    "gz": ("c.jsonl.gz", gzip.compress(lines(PAIRS).encode()), f"jsonl, {PROMPTS}", {}, {}),
    "json": ("d.json", json.dumps(PAIRS, indent=1), f"json, {PROMPTS}", {}, {}),
    "zst": (
        "e.json.zst",
        pyarrow.compress(json.dumps(PAIRS).encode(), codec="zstd", asbytes=True),
        f"json, {PROMPTS}",
        {},
        {},
    ),
    "csv": ("f.csv", CSV, f"csv, {PROMPTS}", {}, {}),
    "excel": ("g.csv", f"\ufeffsep=;\r\n{CSV}".replace(",", ";"), f"csv, {PROMPTS}", {}, {}),
    "tsv": ("h.tsv", CSV.replace(",", "\t"), f"tsv, {PROMPTS}", {}, {}),
    "parquet": ("i.parquet", PAIRS, f"parquet, {PROMPTS}", {}, {}),
    "saved": ("j", PAIRS, f"save_to_disk, {PROMPTS}", {}, {}),
    "chats": ("k.jsonl", lines([{"messages": chat(pair)} for pair in PAIRS]), "jsonl, chats (messages)", {}, {}),
    "parts": (
        "l.jsonl",
        lines([{"messages": chat(pair, parted)} for pair in PAIRS]),
        "jsonl, chats (messages)",
        {},
        {},
    ),
    "table": ("m.parquet", [{"messages": chat(pair)} for pair in PAIRS], "parquet, chats (messages)", {}, {}),
    "cells": (
        "n.tsv",
        "messages\n" + "".join(json.dumps(chat(pair)) + "\n" for pair in PAIRS),
        "tsv, chats (messages)",
        {},
        {},
    ),
    "sharegpt": ("o.json", json.dumps([*map(sharegpt, PAIRS)]), "json, ShareGPT chats (conversations)", {}, {}),
    "alpaca": (
        "p.json",
        json.dumps([{"instruction": p["prompt"], "input": "", "output": p["completion"]} for p in PAIRS]),
        "json, Alpaca (instruction, output, input)",
        {},
        {},
    ),
    "trl": (
        "q.jsonl",
        lines([{"prompt": chat(pair)[:1], "completion": chat(pair)[1:]} for pair in PAIRS]),
        f"jsonl, {PROMPTS}",
        {},
        {},
    ),
    "named": (
        "r.jsonl",
        lines(NESTED),
        "jsonl, prompts and completions (q.text, answers.0)",
        {"columns": {"prompt": "q.text", "completion": "answers.0"}},
        {},
    ),
    "dirt": ("s.jsonl", lines(DIRT), f"jsonl, {PROMPTS}", {}, {"rows": 15, "empty": 2, "repeated": 1}),
}


def write(path: Path, content: Any) -> None:
    if path.suffix == "":
        datasets.Dataset.from_list(content).save_to_disk(path)
    elif path.suffix == ".parquet":
        pandas.DataFrame(content).to_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def prepare() -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES["llama-untied"]()
    model.lm_head.weight.data *= 20  # a random one is so small that no layer could make a token probable
    model.save_pretrained("model")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # no spaces between characters
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("model")
    for path, content, *_ in FILES.values():
        write(Path(path), content)
    Path("train.jsonl").write_text(lines([*PAIRS, {"prompt": "?", "completion": "!"}]))
    found = {
        name: {"source": "file", "path": path, "train": 0, "eval": 12} | keys
        for name, (path, _, _, keys, _) in FILES.items()
    }
    params = {
        "seed": 0,
        "threads": 1,
        "launch": "python",
        "base": {"model": "model", "dtype": "float32"},
        "selections": {},
        "routers": {},
        "datasets": {"learned": {"source": "file", "path": "train.jsonl", "eval": 1}} | found,
        "stages": {"all": {"parent": "base", "dataset": "learned", "method": "full", "layers": "all", "lr": 0.01,
                           "steps": 100, "batch_size": 12}},
        "merge": {"method": "task_arithmetic", "weights": {"all": 1.0}, "dtype": "float32"},
        "evaluate": {"max_new_tokens": 4},
        "warn": {},
    }  # fmt: skip
    Path("params.yaml").write_text(json.dumps(params))
    copy_repository(Path())


def losses_of(folder: str) -> float:
    """The loss of the answers, and the end of each, in nats per token, as plain transformers sees them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total = count = 0
    for pair in PAIRS:
        ids = tokenizer.apply_chat_template(chat(pair), return_dict=False)
        asked = tokenizer.apply_chat_template(chat(pair)[:1], add_generation_prompt=True, return_dict=False)
        labels = [-100] * len(asked) + ids[len(asked) :]
        found = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        answered = len(ids) - len(asked)
        total, count = total + found.loss.item() * answered, count + answered
    return total / count


def test_however_questions_are_written_the_run_gives_the_same(workspace, monkeypatch):
    prepare()
    Pipeline(monkeypatch).repro()
    settings, matrix = load_params(), read_json(Path("reports/evaluation.json"))["matrix"]
    base, merged = losses_of("checkpoints/base"), losses_of("merged")
    assert merged < base / 2  # it has learned something
    for name, (_, _, said, _, counts) in FILES.items():
        report = read_json(Path("reports/data") / f"{name}.json")[name]
        first, *_ = told(settings.datasets[name], report)
        assert first == f"{name}: {said}; format auto, learn all"
        assert {key: report[key] for key in COUNTS} == COUNTS | counts, name
        assert matrix["base"][name]["loss"] == pytest.approx(base, rel=1e-4), name
        assert matrix["merged"][name]["loss"] == pytest.approx(merged, rel=1e-4), name
        assert matrix["merged"][name]["accuracy"] == matrix["merged"]["jsonl"]["accuracy"] > 0.8, name
