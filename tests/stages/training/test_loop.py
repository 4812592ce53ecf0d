"""Token weights, sources apart, best step, several processes: against plain torch where there is a truth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from stages import train
from stages.files import BASE, sha256
from stages.models import losses as losses_module
from stages.records.tokens import Example
from stages.training import loop
from stages.training.batches import Source
from stages.training.launch import TORCHRUN
from stages.training.loop import Run, is_stale
from stages.training.model import put_on
from tests.conftest import ROOT, kill_once_saved, make_base, make_tokenizer
from tests.stages.models.test_every_architecture import ATTEMPTS, build
from tests.stages.test_train import make_examples, make_stage, prepare, write


def gradient_of(weights, ids=(5, 6, 7, 8, 9)):
    stage = make_stage("full")
    wrapped = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64), torch.float64)
    run = Run(wrapped, stage, Accelerator())
    (run.loss([Example(list(ids), weights)])).backward()
    return torch.cat([p.grad.flatten() for p in run.trained.values()])


def test_a_weight_of_nought_removes_a_tokens_gradient_and_two_doubles_it():
    make_base()
    one, two = gradient_of([0.0, 0.0, 1.0, 0.0, 0.0]), gradient_of([0.0, 0.0, 0.0, 1.0, 0.0])
    assert torch.equal(gradient_of([0.0, 0.0, 2.0, 0.0, 0.0]), 2 * one)
    assert (gradient_of([0.0, 0.0, 1.0, 1.0, 0.0]) - one - two).norm() < 1e-6 * (one + two).norm()
    # A token that comes after all learned ones is predicted, and has no weight: its identity does not matter.
    assert torch.equal(gradient_of([0.0, 0.0, 1.0, 0.0, 0.0], (5, 6, 7, 8, 42)), one)


def test_negative_weights_count_by_their_size():
    make_base()
    stage, example = make_stage(), Example([1, 2, 3, 4], [0.0, 1.0, -0.5, 0.0])
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    losses = cross_entropy(plain(torch.tensor([[1, 2, 3]])).logits[0], torch.tensor([2, 3, 4]), reduction="none")
    run = Run(put_on(stage, plain, torch.float32), stage, Accelerator())
    assert run.together([[example]]) == pytest.approx(float((losses[0] - 0.5 * losses[1]) / 1.5), rel=1e-6)


@pytest.mark.filterwarnings("ignore:the logits of")
@pytest.mark.parametrize("surgery", [None, "upgrad"])
def test_experts_that_no_token_goes_to_stay_as_they_are_and_go_on_when_one_does(recwarn, surgery):
    build("longcat_flash", ATTEMPTS[2] | {"zero_expert_num": 4}).save_pretrained(BASE)
    make_tokenizer().save_pretrained(BASE)
    stage = make_stage(layers={"mlp.experts": "all"}, surgery=surgery)
    wrapped = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32)
    biases = [values for name, values in wrapped.named_buffers() if name.endswith("e_score_correction_bias")]
    run, groups = Run(wrapped, stage, Accelerator(cpu=True)), [make_examples(2), make_examples(4)[2:]]
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    for bias in biases:
        bias[4:] = 10.0  # the experts that give back what they get are the last four
    assert run.step(groups, 0)["gradient_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in run.trained.items())
    for bias in biases:
        bias[4:] = -10.0
    assert run.step(groups, 1)["gradient_norm"] > 0
    assert not [each for each in recwarn if "learns nothing" in str(each.message)]


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("chosen", ["all", {"embeddings": "all", "mlp": "all"}])  # the output layer frozen, and trained
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, chunk, chosen):
    make_base("qwen2")
    monkeypatch.setattr(losses_module, "CHUNK", chunk)
    stage = make_stage("full", layers=chosen)
    wrapped = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32)
    run, examples = Run(wrapped, stage, Accelerator()), make_examples()
    found = run.together([examples])
    gradients = torch.cat([p.grad.flatten() for p in run.trained.values()])
    run.optimizer.zero_grad()
    truth = torch.zeros(())
    for example in examples:
        logits = wrapped(torch.tensor([example.ids[:-1]])).logits[0]
        losses = cross_entropy(logits, torch.tensor(example.ids[1:]), reduction="none")
        truth = truth + losses @ torch.tensor(example.weights[1:])
    truth = truth / sum(example.learned for example in examples)
    truth.backward()
    assert found == pytest.approx(float(truth), rel=1e-6)
    assert torch.allclose(gradients, torch.cat([p.grad.flatten() for p in run.trained.values()]), rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_nothing():
    make_base()
    found = []
    for checkpointing in (False, True):
        stage = make_stage("lora", gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        run = Run(put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32), stage, Accelerator())
        run.together([make_examples()])
        found.append(torch.cat([p.grad.flatten() for p in run.trained.values()]))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("surgery", ["upgrad", "pcgrad", "mgda", "aligned_mtl"])
def test_sources_are_combined_as_torchjd_does(surgery):
    from torchjd import aggregation

    names = {"upgrad": "UPGrad", "pcgrad": "PCGrad", "mgda": "MGDA", "aligned_mtl": "AlignedMTL"}
    make_base()
    examples = make_examples()
    groups = [examples[:5], examples[5:]]
    rows = []
    for group in groups:
        torch.manual_seed(0)
        run = Run(
            put_on(make_stage(), AutoModelForCausalLM.from_pretrained(BASE), torch.float32),
            make_stage(),
            Accelerator(),
        )
        run.together([group])
        rows.append(torch.cat([p.grad.flatten() for p in run.trained.values()]))
    torch.manual_seed(0)
    stage = make_stage(surgery=surgery)
    run = Run(put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32), stage, Accelerator())
    torch.manual_seed(7)
    run.apart(groups)
    found = torch.cat([p.grad.flatten() for p in run.trained.values()])
    torch.manual_seed(7)
    truth = getattr(aggregation, names[surgery])()(torch.stack(rows))
    assert torch.allclose(found, truth, rtol=1e-4, atol=1e-7)


def train_with_tuning(work, **settings):
    work.mkdir()
    stage = make_stage("full", steps=60, lr=0.02, **settings)
    examples, tuning = make_examples()[:4], make_examples()[4:]
    torch.manual_seed(0)
    wrapped = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32)
    source = Source("d", examples, 4, 0, 0)
    curve = loop.fit(wrapped, stage, [source], 0, Accelerator(), work, tuning=tuning, title="t")
    return curve, Run(wrapped, stage, Accelerator()), tuning


def test_the_best_step_is_kept_and_training_stops_when_nothing_gets_better(workspace):
    make_base()
    curve, run, tuning = train_with_tuning(workspace / "a", keep="best")
    checks = [point["tuning_loss"] for point in curve if "tuning_loss" in point]
    assert len(checks) == 6 and min(checks) < checks[-1]  # four examples are soon learned by heart
    with torch.no_grad():
        wrapped = run.model.eval()
        total = sum(
            float(
                cross_entropy(wrapped(torch.tensor([e.ids[:-1]])).logits[0], torch.tensor(e.ids[1:]), reduction="none")
                @ torch.tensor(e.weights[1:])
            )
            for e in tuning
        )
    assert total / sum(e.learned for e in tuning) == pytest.approx(min(checks), rel=1e-5)

    stopped, *_ = train_with_tuning(workspace / "b", keep="best", patience=1)
    assert len(stopped) < 60 and stopped == curve[: len(stopped)]


def test_patience():
    def curve(*losses):
        return [{"tuning_loss": loss} for loss in losses]

    assert not is_stale(curve(3, 2, 1), 1)
    assert not is_stale(curve(3, 1, 2), 2)
    assert is_stale(curve(3, 1, 2, 1), 2)
    assert not is_stale(curve(1, 2, 3), None)


def run_train(name, *program):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(program or ("-m", "stages.train")), name]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def curve_of(name):
    return [point["loss"] for point in json.loads(Path(f"reports/train/{name}.curve.json").read_text())]


# Tells, beside training, how many processes there are and how many examples each has passed through its model.
COUNTED = """
import sys
from pathlib import Path
from stages import train
from stages.training import loop
passed, loss = [], loop.Run.loss
def counted(self, piece):
    passed.append(len(piece))
    a = self.accelerator
    Path(f"process{a.process_index}").write_text(f"{a.distributed_type.value} {a.num_processes} {sum(passed)}")
    return loss(self, piece)
loop.Run.loss = counted
train.main(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(project):
    write(("rank: 4", "rank: 4\n    micro_batch_size: 4"))
    prepare()
    train.main("sums")
    one = curve_of("sums")
    write(("rank: 4", "rank: 4\n    processes: 2"))
    Path("counted.py").write_text(COUNTED)
    done = run_train("sums", *TORCHRUN, "2", "counted.py")
    assert done.wait() == 0, done.stderr.read()
    assert [Path(f"process{rank}").read_text() for rank in range(2)] == ["MULTI_CPU 2 100"] * 2  # 25 steps of 4 and 4
    assert curve_of("sums") == pytest.approx(one, rel=1e-4) and len(one) == 25


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_killed_in_the_middle_go_on_to_the_same_bits(project):
    write(("steps: 25", "steps: 200"), ("rank: 4", "rank: 4\n    dropout: 0.2\n    processes: 2"))
    # Pieces of three of eight examples are three, so one process draws more random numbers than the other.
    write(("rank: 4", "rank: 4\n    micro_batch_size: 3"))
    weights = prepare()
    assert run_train("sums").communicate() and weights.exists()
    truth = sha256([weights])
    weights.unlink()

    process = run_train("sums")
    kill_once_saved(process, 120)
    process.communicate()
    assert not weights.exists()

    done = run_train("sums")
    errors = done.communicate()[1]
    assert done.returncode == 0, errors
    assert " 0/200" not in errors  # it did not start again
    assert sha256([weights]) == truth
