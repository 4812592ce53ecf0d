"""Training: gradients, frozen layers, replay, resume and reload, against plain torch where there is a truth."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from stages import base, data, train
from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, read_json, sha256
from stages.methods import METHODS
from stages.models.loading import load_model
from stages.project.params import load_params
from stages.records.tokens import Example
from stages.training import loop
from stages.training.batches import Source, derive_seed
from stages.training.loop import Run
from stages.training.model import build, put_on
from stages.weights.checkpoint import open_stages
from tests.conftest import ARCHITECTURES, ROOT, kill_once_saved, make_base


def make_stage(method="lora", **keys):
    settings = {"parent": "base", "dataset": "d", "lr": 1e-2, "steps": 6, "batch_size": 4, "layers": "1-2"}
    return METHODS[method](method=method, **(settings | keys))


def make_examples(count=12):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 20, (count,), generator=generator).tolist()
    return [
        Example(torch.randint(1, 128, (n,), generator=generator).tolist(), [float(i >= n // 2) for i in range(n)])
        for n in lengths
    ]


def fresh():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def source(examples, count=4, name="d"):
    return Source(name, examples, count, seed=3, order_seed=5)


def fit(model, stage, work, own=None, precision="no", **settings):
    work.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=precision)
    return loop.fit(model, stage, [source(own or make_examples())], 0, accelerator, work, title="test", **settings)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    make_base()
    gradients = []
    for size in (12, 5, 1):
        torch.manual_seed(0)
        model = put_on(make_stage(), fresh(), torch.float32)
        Run(model, make_stage(micro_batch_size=size), Accelerator()).together([make_examples()])
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(gradients[0], other, strict=True))


def test_the_loss_is_the_mean_over_supervised_tokens_as_transformers_has_it():
    make_base()
    model = fresh()
    examples = make_examples(1)
    labels = [i if learned else -100 for i, learned in zip(examples[0].ids, examples[0].weights, strict=True)]
    truth = model(input_ids=torch.tensor([examples[0].ids]), labels=torch.tensor([labels])).loss
    model = put_on(make_stage(), model, torch.float32)
    loss = Run(model, make_stage(), Accelerator()).together([examples])
    assert loss == pytest.approx(float(truth), rel=1e-6)


def test_full_on_a_layer_range_is_plain_unfreezing(workspace):
    make_base("qwen3")
    stage = make_stage("full", schedule="constant", warmup=0.0)
    curve = fit(put_on(stage, fresh(), torch.float32), stage, workspace / "a")

    plain = fresh().train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(".1." in name or ".2." in name)
    truth = fit(plain, stage, workspace / "b")

    assert [point["loss"] for point in curve] == [point["loss"] for point in truth]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "dora", "full", "ln"])
def test_each_method_learns_saves_and_leaves_the_rest_alone(workspace, method, architecture):
    make_base(architecture)
    stage = make_stage(method, steps=25, lr=0.05 if method == "ln" else 0.01)
    torch.manual_seed(0)
    model = put_on(stage, fresh(), torch.float32)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    curve = fit(model, stage, workspace / "work", make_examples(4))
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".1." in name or ".2." in name for name in trained)

    stage.save(model, CHECKPOINTS / "one")
    (CHECKPOINTS / "one" / "stage.json").write_text(json.dumps({"parent": "base"}))
    _, (checkpoint,) = open_stages(["one"])
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        truth, found = model.eval()(ids).logits, load_model(checkpoint, torch.float32)(ids).logits
    assert torch.allclose(found, truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["full", "ln"])
def test_small_steps_on_a_bfloat16_base_are_not_rounded_away(workspace, method):
    make_base(dtype=torch.bfloat16)
    stage = make_stage(method, lr=1e-5, warmup=0.0)
    model = put_on(stage, fresh(), torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    fit(model, stage, workspace / "work", precision="bf16")
    moved = [float((p != before[name]).float().mean()) for name, p in model.named_parameters() if name in before]
    assert min(moved) > 0.9


def test_stages_start_from_different_matrices():
    seeds = {derive_seed(0, name) for name in ("a", "b")} | {derive_seed(1, "a")}
    assert len(seeds) == 3


def prepare(name="sums"):
    base.main()
    for dataset in load_params().datasets:
        data.main(dataset)
    return CHECKPOINTS / name / "adapter_model.safetensors"


def test_a_stage_and_its_child_are_recorded_and_repeatable(project):
    weights = prepare()
    train.main("sums")
    train.main("words")
    first = {path: path.read_bytes() for path in sorted(CHECKPOINTS.rglob("*")) if path.is_file()}
    child = read_json(CHECKPOINTS / "words" / "stage.json")
    assert child["parent_sha256"] == read_json(CHECKPOINTS / "sums" / "stage.json")["sha256"]
    assert set(child["dataset_sha256"]) == {"sums", "words"}
    assert child["layers"] == [2, 3]
    assert not list(Path(".dvc/tmp/resume").iterdir())
    assert str(project) not in (CHECKPOINTS / "words" / "adapter_config.json").read_text()

    train.main("sums")
    train.main("words")

    assert first == {path: path.read_bytes() for path in sorted(CHECKPOINTS.rglob("*")) if path.is_file()}
    assert weights.exists()


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(project):
    content = Path("params.yaml").read_text().replace("steps: 25", "steps: 150")
    Path("params.yaml").write_text(content.replace("rank: 4", "rank: 4\n    dropout: 0.1"))
    weights = prepare()
    train.main("sums")
    truth = sha256([weights])
    weights.unlink()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.train", "sums"]

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    kill_once_saved(process, 120)
    assert process.wait() == -signal.SIGKILL
    assert not weights.exists()

    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert " 0/150" not in done.stderr  # it did not start again
    assert sha256([weights]) == truth


def write(*changes):
    """Change the tiny project's params.yaml."""
    text = Path("params.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    Path("params.yaml").write_text(text)


def test_answers_that_never_fit_are_refused(project):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("rank: 4", "rank: 4\n    max_length: 2"))
    prepare()
    with pytest.raises(MistakeError, match=r"stages.sums.max_length 2 cuts off every answer"):
        train.main("sums")


def test_answers_beyond_what_the_base_reads_are_refused(project):
    prepare()
    lines = [json.dumps({"prompt": "x" * 300 + str(number), "completion": "1"}) for number in range(40)]
    Path("data/sums/train.jsonl").write_text("\n".join(lines))
    with pytest.raises(MistakeError, match=r"stages.sums learns sums, and base.model reads 256 tokens, which cuts off"):
        train.main("sums")


def test_a_rate_that_explodes_is_refused_and_leaves_no_checkpoint(project):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("lr: 1.0e-2", "lr: 1.0e30"))
    weights = prepare()
    with pytest.raises(MistakeError, match=r"stages.sums.lr 1e\+30 made the loss infinite"):
        train.main("sums")
    assert not weights.exists()


def test_matrices_are_made_smaller_before_anything_is_on_the_device(monkeypatch):
    make_base()
    stage, seen = make_stage("lora", load_in_4bit=True), []
    monkeypatch.setattr(
        "stages.training.model.quantize",
        lambda model, dtype, device: seen.append((device, {p.device for p in model.parameters()})),
    )
    place = SimpleNamespace(device=torch.device("meta"), distributed_type=DistributedType.NO)
    model = build("one", stage, torch.float32, place)
    assert seen == [(place.device, {torch.device("cpu")})]
    assert {p.device for p in model.parameters()} == {place.device}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 0.0), (2, 0.1), (2, 0.99), (5, 0.9), (80, 0.1), (50, 0.1)])
def test_some_step_of_every_stage_has_a_rate_and_enough_steps_have_transformers_own(steps, warmup, schedule):
    make_base()
    stage = make_stage(steps=steps, warmup=warmup, schedule=schedule)
    run = Run(put_on(stage, fresh(), torch.float32), stage, Accelerator())

    def rates(schedule, optimizer):
        found = []
        for _ in range(steps):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    own = rates(run.schedule, run.optimizer)
    assert max(own) > 0
    if math.ceil(warmup * steps) < steps:
        other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=stage.lr)
        assert own == rates(get_scheduler(schedule, other, math.ceil(warmup * steps), steps), other)


def test_one_step_trains(project):
    write(("steps: 25", "steps: 1"))
    weights = prepare()
    train.main("sums")
    assert any(tensor.any() for name, tensor in load_file(weights).items() if ".lora_B." in name)


def test_a_tuning_split_that_max_length_cuts_is_refused(project):
    write(
        ("path: sums.jsonl\n    train: 40", "path: sums.jsonl\n    tune: 5\n    train: 40"),
        ("rank: 4", "rank: 4\n    keep: best\n    max_length: 6"),
    )
    prepare()
    records = [{"prompt": "123456", "completion": "7"}] * 5
    Path("data/sums/tune.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(MistakeError, match=r"stages.sums.max_length 6 cuts off every answer of sums"):
        train.main("sums")
