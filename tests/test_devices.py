"""Training, scores and the probe on a device that is not the processor: nothing is made on the wrong one."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from analysis import probe
from analysis.running.watching import watch
from stages.files import BASE
from stages.models.loading import load_tokenizer
from stages.models.losses import record_losses
from stages.models.scoring import generate
from stages.settings.evaluate import Evaluate
from stages.training.loop import Run
from stages.training.model import put_on
from stages.training.prefix import Prefix
from stages.training.protection import Protection, remember_inputs
from stages.training.resume import load_state
from tests.conftest import make_base
from tests.pretended import DEVICE, device
from tests.stages.methods.test_matrix import ROWS, make, make_room
from tests.stages.test_train import make_examples

RECORDS = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(12)]


def test_tensors_on_two_devices_do_not_meet():
    with device():
        ours = torch.ones(3, device=DEVICE)
        assert ours.device == DEVICE and (ours + 1).sum().item() == 6
        assert (ours.cpu() + torch.ones(3)).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="tensors on the device and tensors of"):
            ours + torch.ones(3)
        weights = torch.ones(3, device=DEVICE, requires_grad=True)
        (weights * ours).sum().backward()
        assert weights.grad.device == DEVICE and weights.grad.tolist() == [1, 1, 1]


def fresh():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.mark.parametrize("method", ROWS)
def test_steps_of_a_method(workspace, method, monkeypatch):
    """The losses are those on the processor, and a killed run goes on from what it saved."""
    make_base("qwen2")
    make_room(ROWS[method])
    generator = SimpleNamespace(get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state)
    others = torch.get_device_module
    monkeypatch.setattr(
        torch, "get_device_module", lambda kind=None: generator if str(kind) == str(DEVICE) else others(kind)
    )
    stage, examples = make(method), make_examples(4)

    def losses(steps, work, place=torch.device("cpu")):  # noqa: B008
        torch.manual_seed(3)
        accelerator = Accelerator(cpu=True)
        monkeypatch.setattr(type(accelerator), "device", place)
        model = put_on(stage, fresh(), torch.float32)
        with device() if place == DEVICE else nullcontext():
            run = Run(model.to(place).train(), stage, accelerator)
            done = len(run.restore(work))
            found = [run.step([examples], step)["loss"] for step in range(done, steps)]
            run.save(work, [{"step": step} for step in range(steps)])
        return found

    truth = losses(4, workspace / "here")
    found = losses(2, workspace / "there", DEVICE) + losses(4, workspace / "there", DEVICE)
    assert found == pytest.approx(truth, rel=1e-5)


def test_scores(workspace):
    make_base("qwen2")
    model, tokenizer = fresh().eval(), load_tokenizer()
    truth = record_losses(model, tokenizer, RECORDS, 4), generate(model, tokenizer, RECORDS, Evaluate())
    with device():
        model.to(DEVICE)
        assert generate(model, tokenizer, RECORDS, Evaluate()) == truth[1]
        found = record_losses(model, tokenizer, RECORDS, 4)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in truth[0]], rel=1e-5)
