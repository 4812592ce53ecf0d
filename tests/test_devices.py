"""Training, scores and the probe on a device that is not the processor: nothing is made on the wrong one."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from analysis import probe
from analysis.running import watching
from stages import base, data, pick, score, select, train
from stages.files import BASE, read_json
from stages.training.loop import Run
from stages.training.model import put_on
from tests.conftest import PARAMS, make_base
from tests.pretended import DEVICE, device
from tests.stages.methods.test_matrix import ROWS, make, make_room
from tests.stages.test_train import make_examples

pytestmark = pytest.mark.gpu


def test_tensors_on_two_devices_do_not_meet():
    with device():
        ours = torch.ones(3, device=DEVICE)
        assert ours.device == DEVICE and (ours + 1).sum().item() == 6
        assert (ours.cpu() + torch.ones(3)).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match=r"tensors on the device and tensors of|on the same device"):
            ours + torch.ones(3)
        weights = torch.ones(3, device=DEVICE, requires_grad=True)
        (weights * ours).sum().backward()
        assert weights.grad.device == DEVICE and weights.grad.tolist() == [1, 1, 1]


def fresh():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _generator(monkeypatch):
    """The pretended device draws its random numbers as the processor does."""
    if DEVICE.type == "cuda":
        return
    generator = SimpleNamespace(get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state)
    others = torch.get_device_module
    monkeypatch.setattr(
        torch, "get_device_module", lambda kind=None: generator if str(kind) == str(DEVICE) else others(kind)
    )


QUICK = ("lora", "adalora", "full")


@pytest.mark.parametrize("method", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS])
def test_steps_of_a_method(workspace, method, monkeypatch):
    """The losses are those on the processor, and a killed run goes on from what it saved."""
    make_base("qwen2")
    make_room(ROWS[method])
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


@pytest.fixture
def everywhere(monkeypatch):
    """Makes the device that of all stages; models are loaded into main memory first, as ever."""

    def load(*args, **kwargs):
        with _disable_current_modes():
            return own(*args, **kwargs)

    own = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)

    def use():
        for module in (score, probe, watching, select, train):
            monkeypatch.setattr(module, "device", lambda: DEVICE)
        monkeypatch.setattr(Accelerator, "device", DEVICE)
        return device()

    return use


@pytest.mark.slow
def test_stages(project, monkeypatch, everywhere):
    """Training with replay, a selection, scores and the probe come to what they come to on the processor."""
    text = PARAMS.replace("method: ln", "method: full\n    surgery: pcgrad\n    protect: [sums]")
    text = text.replace("steps: 25", "steps: 12\n    remember: 0.9\n    gradient_checkpointing: true\n    keep: best")
    text = text.replace("    eval: 10\n", "    eval: 10\n    tune: 5\n")
    hard = "selections:\n  hard: {dataset: words, parent: base, reference: sums, keep: 0.5}\n"
    Path("params.yaml").write_text(text.replace("selections: {}\n", hard))
    base.main()
    for name in ("sums", "words"):
        data.main(name)
    pick.main("data")

    def run():
        for name in ("sums", "words"):
            AcceleratorState._reset_state(reset_partial_state=True)
            train.main(name)
        select.main("hard")
        for name in ("base", "words"):
            score.main(name)
            probe.main(name)
        curves = [read_json(Path(f"reports/train/{name}.curve.json"), list) for name in ("sums", "words")]
        answers = pd.read_parquet("reports/answers/words.parquet")
        return curves, answers, read_json(Path("reports/probe/words.json")), Path("data/hard/train.jsonl").read_text()

    curves, answers, probed, chosen = run()
    with everywhere():
        again = run()
    assert [[p["loss"] for p in curve] for curve in again[0]] == [
        pytest.approx([p["loss"] for p in curve], abs=1e-4) for curve in curves
    ]
    assert again[1]["answer"].tolist() == answers["answer"].tolist()
    assert again[1]["loss"].tolist() == pytest.approx(answers["loss"].tolist(), rel=1e-3)
    assert again[2].keys() == probed.keys() and again[3] == chosen
