"""What rounding the merged file costs the running model: `python benchmarks/rounding.py`, in a project that was run.

The merge of params.yaml with its weights times SCALES, so that the change is as large as trained and as small as that
of preference tuning, is stored in 16 bits in three ways: to the nearest number, stochastically (three seeds), and
compensated: column after column, each taking up the errors of those before as the layer's inputs weigh them (GPTQ's
order, arXiv 2210.17323, on the grid of the dtype; Gram matrices of the float32 merge's inputs, damped by 1 %). Against
the merge in float32, in float32 arithmetic: KL in nats per token on eval texts and on others, each beside that of the
base; tokens that the two would choose differently; the error in the weights; seconds for all tensors.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.merging.merged import Merged
from stages.models.loading import load_model, load_tokenizer
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.records.tokens import encode
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_base, open_stages

SCALES = (1.0, 0.2, 0.05, 0.01)
SEEDS = (0, 1, 2)
RECORDS = {"train": 12, "eval": 10}  # of each dataset: inputs for the Grams, texts to compare on
NEUTRAL = 8  # texts of the probes among the inputs; the others are compared on
DAMPING = 0.01

Texts = list[torch.Tensor]
Stored = Callable[[str], torch.Tensor]


def read_texts(names: list[str]) -> dict[str, Texts]:
    """Token ids by what they are for: `inputs` of the Grams, `eval` and `other` to compare on."""
    tokenizer = load_tokenizer()

    def of(split: str) -> Texts:
        records = [record for name in names for record in load_split(name, split)[: RECORDS[split]]]
        return [torch.tensor(encode(record, tokenizer, 128)[-1].ids) for record in records]

    lines = Path("analysis/running/probes.jsonl").read_text(encoding="utf-8").splitlines()
    others = [torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"][:128]) for line in lines]
    return {"inputs": of("train") + others[:NEUTRAL], "eval": of("eval"), "other": others[NEUTRAL:]}


@torch.inference_mode()
def says(model: PreTrainedModel, texts: Texts) -> torch.Tensor:
    """Log-probabilities of every next token [tokens of all texts, vocabulary]."""
    return torch.cat([model(ids[None]).logits[0].log_softmax(-1) for ids in texts])


def apart(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """KL(first ‖ second) in nats per token, and the share of tokens that the two choose differently."""
    divergence = (first.exp() * (first - second)).sum(-1).mean()
    return float(divergence), float((first.argmax(-1) != second.argmax(-1)).float().mean())


def grams(model: PreTrainedModel, texts: Texts) -> dict[str, torch.Tensor]:
    """Σ xxᵀ over the inputs x of every linear layer [in, in], float64."""
    found: dict[str, torch.Tensor] = {}

    def seen(path: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1])
            found[path] = found.get(path, 0) + (inputs.T @ inputs).double()

        return add

    linear = [(path, each) for path, each in model.named_modules() if isinstance(each, nn.Linear)]
    hooks = [each.register_forward_pre_hook(seen(path)) for path, each in linear]
    says(model, texts)
    for hook in hooks:
        hook.remove()
    return found


def compensated(weight: torch.Tensor, gram: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight [out, in] on the grid of `dtype`, float32, with the outputs for such inputs as near as may be."""
    order = gram.diagonal().argsort(descending=True)
    left, gram = weight.double()[:, order], gram[order][:, order]
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    share = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    rounded = torch.empty_like(left)
    for column in range(left.shape[1]):
        rounded[:, column] = left[:, column].to(dtype).double()
        error = (left[:, column] - rounded[:, column]) / share[column, column]
        left[:, column + 1 :].addr_(error, share[column, column + 1 :], alpha=-1)
    return rounded[:, order.argsort()].float()


def ways_of(merge: Merge, exact: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """How each tensor is stored, by the name of the way.

    Args:
        merge: with the dtype of the file.
        exact: the merged tensors that stages change, float32.
        inputs: from `grams`.
    """
    dtype = getattr(torch, merge.dtype)
    base, stages = open_stages(sorted(merge.weights))

    def smooth(name: str) -> torch.Tensor:
        path, _, parameter = name.rpartition(".")
        is_linear = path in inputs and parameter == "weight"
        return compensated(exact[name], inputs[path], dtype) if is_linear else exact[name].to(dtype)

    drawn = [merge.model_copy(update={"rounding": "stochastic", "seed": seed}) for seed in SEEDS]
    return {
        "nearest": Merged(base, stages, merge.model_copy(update={"rounding": "nearest"})).stored,
        **{f"stochastic, seed {each.seed}": Merged(base, stages, each).stored for each in drawn},
        "compensated": smooth,
    }


def compare(merge: Merge, texts: dict[str, Texts], before: dict[str, torch.Tensor]) -> Iterator[str]:
    """Rows of the table for one size of the merge; `before` is what the base says on the texts to compare on."""
    base, stages = open_stages(sorted(merge.weights))
    merged = Merged(base, stages, merge.model_copy(update={"dtype": "float32"}))
    model = load_model(merged, torch.float32)
    truth = {domain: says(model, texts[domain]) for domain in before}
    yield f"{row('float32', 'none: the base', truth, before)} | |"
    exact = {name: model.get_parameter(name).detach().clone() for name in merged.names(merged.changed())}
    delta = sum(float((values - base.stored(name)).square().sum()) for name, values in exact.items())
    inputs = grams(model, texts["inputs"])
    for dtype in ("bfloat16", "float16"):
        for way, stored in ways_of(merge.model_copy(update={"dtype": dtype}), exact, inputs).items():
            started, error = time.monotonic(), 0.0
            for name, values in exact.items():
                with torch.no_grad():
                    model.get_parameter(name).copy_(stored(name))
                error += float((model.get_parameter(name) - values).square().sum())
            seconds = time.monotonic() - started
            after = {domain: says(model, texts[domain]) for domain in before}
            yield f"{row(dtype, way, truth, after)} {(error / delta) ** 0.5:.2f} | {seconds:.0f} |"


def row(dtype: str, way: str, truth: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> str:
    """The beginning of a row: how far what a file says is from what the float32 merge says."""
    (own, chosen), (others, _) = (apart(truth[domain], after[domain]) for domain in ("eval", "other"))
    return f"| {dtype} | {way} | {own:.1e} | {others:.1e} | {chosen:.4f} |"


def main(scales: list[float]) -> None:
    """Print the table."""
    settings = load_params()
    torch.set_num_threads(settings.thread_count)
    texts, model = read_texts(list(settings.datasets)), load_model(open_base(), torch.float32)
    before = {domain: says(model, texts[domain]) for domain in ("eval", "other")}
    print("| weights × | dtype | rounding | KL, eval texts | KL, others | chosen otherwise | error ÷ delta | s |")
    print("|--:|---|---|--:|--:|--:|--:|--:|")
    for scale in scales:
        weights = {name: scale * weight for name, weight in settings.merge.weights.items()}
        for told in compare(settings.merge.model_copy(update={"weights": weights}), texts, before):
            print(f"| {scale:g} {told}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="what the merge's weights are times")
    main(parser.parse_args().scales)
