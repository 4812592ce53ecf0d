"""What a routed model is worth: `python benchmarks/routing.py NAME`, in a project that was run with that router.

Three tables beside the one of the report. *Mixed*: prompts that ask two questions of different skills at once, from the
evaluation splits; the score is the share of the two reference answers that stand in what a model says. *In a batch*:
of greedy answers to prompts of all skills and of none, in float32, how many are the same token by token when they are
asked together, left-padded, and one by one, and when the stage that was chosen is asked itself. *Price*: bytes of the
file, and the time of one prompt and its answer beside that of the stage itself, the least of five.
"""

import argparse
import itertools
import re
import time
from typing import Any

import torch

from stages.files import BASE, ROUTED
from stages.models.loading import compute_dtype, device, load_tokenizer
from stages.models.scoring import generate
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.records.record import Record, answer, asked
from stages.routing.loading import load_routed
from stages.routing.router import prompt_ids
from tools.models import load

PAIRS, PROMPTS, TOKENS, TIMES = 60, 8, 32, 5


def mixed(skills: list[str]) -> list[tuple[Record, tuple[str, str]]]:
    """Prompts with two questions, and the two reference answers."""
    splits = {skill: load_split(skill, "eval") for skill in skills}
    found = []
    for number, (one, other) in zip(range(PAIRS), itertools.cycle(itertools.permutations(skills, 2)), strict=False):
        first, second = splits[one][number], splits[other][number]
        text = f"Answer both questions, each on a line of its own.\n\n1. {asked(first)}\n\n2. {asked(second)}"
        found.append(({"prompt": text, "completion": ""}, (str(answer(first)), str(answer(second)))))
    return found


def share(said: str, references: tuple[str, str]) -> float:
    """How many of the references stand in an answer, as whole words."""
    return sum(bool(re.search(rf"(?<!\w){re.escape(each.strip())}(?!\w)", said)) for each in references) / 2


@torch.inference_mode()
def tokens(model: Any, prompts: list[list[int]], filler: int) -> list[list[int]]:
    """Greedy answers to prompts that are asked together."""
    width = max(map(len, prompts))
    ids = torch.tensor([[filler] * (width - len(each)) + each for each in prompts])
    present = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
    keys = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": filler}
    return [row[width:].tolist() for row in model.generate(ids, attention_mask=present, **keys)]


def same(one: list[int], other: list[int], filler: int) -> bool:
    """Whether two answers are the same but for what fills the shorter."""
    return all(a == b for a, b in itertools.zip_longest(one, other, fillvalue=filler))


def seconds(model: Any, prompt: list[int], filler: int) -> float:
    """Of one answer, the least of TIMES."""
    found = []
    for _ in range(TIMES):
        start = time.perf_counter()
        tokens(model, [prompt], filler)
        found.append(time.perf_counter() - start)
    return min(found)


def main(name: str) -> None:
    """Print the tables."""
    params, tokenizer = load_params(), load_tokenizer()
    torch.set_num_threads(params.thread_count)
    skills = list(dict.fromkeys(params.skills[stage] for stage in params.routers[name].stages))
    filler = tokenizer.pad_token_id

    asked_mixed, bounds = mixed(skills), params.evaluate
    print(f"| model | two skills in one prompt, {PAIRS} |\n|---|--:|")
    for each in params.models:
        said = generate(load(params, each), tokenizer, [record for record, _ in asked_mixed], bounds)
        scores = [share(one.text, references) for one, (_, references) in zip(said, asked_mixed, strict=True)]
        print(f"| {each} | {sum(scores) / len(scores):.0%} |", flush=True)

    routed = load_routed(ROUTED / name, BASE, compute_dtype(), device())
    choices = ["base", *routed.config.routed["choices"]]
    numbers = [int(routed.choose(torch.tensor([prompt_ids(record, tokenizer)]))) for record, _ in asked_mixed]
    print("chosen:", {choice: numbers.count(number) for number, choice in enumerate(choices)})

    routed = load_routed(ROUTED / name, BASE, torch.float32)
    records = [record for dataset in params.datasets for record in load_split(dataset, "eval")[:PROMPTS]]
    prompts = [prompt_ids(record, tokenizer) for record in records]
    together = tokens(routed, prompts, filler)
    alone = [tokens(routed, [prompt], filler)[0] for prompt in prompts]
    equal = sum(same(one, other, filler) for one, other in zip(together, alone, strict=True))
    print(f"in a batch of {len(prompts)}: {equal} answers are those of one by one")
    chosen = [int(routed.choose(torch.tensor([prompt]))) for prompt in prompts]
    for number, choice in enumerate(choices):
        rows = [row for row, each in enumerate(chosen) if each == number]
        if rows:
            stage = load(params, choice).float()
            equal = sum(same(alone[row], tokens(stage, [prompts[row]], filler)[0], filler) for row in rows)
            print(f"{choice}: {equal} of {len(rows)} answers are the stage's own")
            ratio = seconds(routed, prompts[rows[0]], filler) / seconds(stage, prompts[rows[0]], filler)
            print(f"  in {ratio:.2f} of its time")
    sizes = {path: path.stat().st_size for path in (BASE, ROUTED / name) for path in path.glob("*.safetensors")}
    print({str(path): f"{size / 1e6:.0f} MB" for path, size in sizes.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="routed")
    main(parser.parse_args().name)
