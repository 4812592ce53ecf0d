"""Whether models answer a user as the report says: `python benchmarks/in_use.py`, in a project that has been run.

Nothing of Strata is imported. Plain transformers asks the base, every stage (adapters one on top of the other, through
PEFT) and merged/ new questions of the project's generated tasks, as one asks a chat model: messages in, greedy by the
model's own generation config, stopping where that says. Beside each share of right answers stands the report's, and
how many standard errors of their difference lie between them; two are what chance explains in 19 of 20 cells.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

BASE = Path("checkpoints/base")


def load(name: str, stages: dict[str, Any]) -> Any:
    """The base, the merged model, or a stage on top of its ancestors."""
    if name in ("base", "merged"):
        return AutoModelForCausalLM.from_pretrained(BASE if name == "base" else "merged", dtype=torch.float32)
    parent = load(stages[name]["parent"], stages)
    return PeftModel.from_pretrained(parent, f"checkpoints/{name}").merge_and_unload()


def ask(model: Any, entries: list[dict[str, Any]], longest: int) -> list[str]:
    """What the model says to each question."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chats = [[{"role": "user", "content": entry["question"]}] for entry in entries]
    answers = generate(chats, batch_size=25, max_new_tokens=longest, return_full_text=False)
    return [answer[0]["generated_text"] for answer in answers]


def main(count: int, seed: int, longest: int) -> None:
    """Print the table; exit with code 1 where a cell is further off than chance explains."""
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    matrix = json.loads(Path("reports/evaluation.json").read_text(encoding="utf-8"))["matrix"]
    tasks = {name: each for name, each in params["datasets"].items() if each["source"] == "reasoning_gym"}
    print(f"| model | task | in use, {count} questions | report | standard errors |\n|---|---|--:|--:|--:|")
    far = 0
    for name in ["base", *params["stages"], "merged"]:
        model = load(name, params["stages"])
        for task, settings in tasks.items():
            data = reasoning_gym.create_dataset(settings["task"], size=count, seed=seed, **settings.get("config", {}))
            entries = list(data)
            said = zip(ask(model, entries, longest), entries, strict=True)
            mine = sum(data.score_answer(answer.strip(), entry) >= 1 for answer, entry in said) / count
            theirs = matrix[name][task]["accuracy"]
            error = math.sqrt(mine * (1 - mine) / count + theirs * (1 - theirs) / settings["eval"])
            off = abs(mine - theirs) / error if error else (math.inf if mine != theirs else 0.0)
            far += off > 2
            print(f"| {name} | {task} | {mine:.2f} | {theirs:.2f} | {off:.1f} |", flush=True)
    print(f"\n{far} of {len(tasks) * (len(params['stages']) + 2)} further than two standard errors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=12345, help="of the questions")
    parser.add_argument("--longest", type=int, default=48, help="tokens of an answer at most")
    main(**vars(parser.parse_args()))
