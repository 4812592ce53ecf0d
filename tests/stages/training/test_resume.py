"""Going on after a kill: every method to the same bits, the lock of the folder, and systems that have no locks."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from stages.files import CHECKPOINTS
from stages.methods import METHODS
from stages.models.layers import linear_modules, select
from stages.models.losses import pad
from stages.settings.stage import Training
from stages.training import loop, resume
from stages.training.batches import Source
from stages.training.model import put_on
from stages.training.protection import input_bases, save_bases
from stages.training.resume import load_state, random_states, resume_folder, save_state, set_random_states
from tests.conftest import ROOT, make_base
from tests.stages.methods import test_matrix as matrix
from tests.stages.test_train import make_examples

FOLDER = Path(".dvc/tmp/resume")
ROWS = matrix.ROWS | {
    "adalora": matrix.Row({"rank": 4, "lr": 0.02, "steps": 60}),  # directions are dropped from step 6 to step 40
    "lora with dropout": matrix.Row({"rank": 4, "dropout": 0.2}, "lora"),
    "the best step": matrix.Row({"keep": "best", "patience": 2}, "full"),
    "decay": matrix.Row({"schedule": "linear", "weight_decay": 0.1, "warmup": 0.5}, "full"),
    "surgery": matrix.Row({"surgery": "pcgrad"}, "lora"),  # in random order
    "protection": matrix.Row({"protect": ["first"], "gradient_checkpointing": True}, "full"),
}


class KilledError(Exception):
    pass


def run(case, work, monkeypatch, killed=None):
    """Train, to the end or until a kill before step `killed`; returns what is trained, by name, and what is saved."""
    method = ROWS[case].method or case
    keys = {"parent": "base", "dataset": "d", "method": method, "lr": 0.01, "steps": 30, "layers": "1-2"}
    stage = METHODS[method](**keys | ROWS[case].keys)
    torch.manual_seed(0)
    model = put_on(stage, matrix.fresh(), torch.float32)
    step = loop.Run.step

    def step_or_die(self, groups, number):
        if number == killed:
            raise KilledError
        return step(self, groups, number)

    work.mkdir(exist_ok=True)
    examples = make_examples()
    sources = [Source("d", examples[:5], 3, 3, 5), Source("replay", examples[5:8], 1, 3, 5, replayed=True)]
    tuning = examples[8:] if stage.keep == "best" else None
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", step_or_die)
        curve = loop.fit(model, stage, sources, 0, Accelerator(), work, tuning=tuning, title=case)
    stage.save(model, work / "saved")
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return curve, trained, load_file(work / "saved" / "adapter_model.safetensors")


def test_every_method_is_tried():
    trained = {name for name, method in METHODS.items() if issubclass(method, Training)}
    assert trained == {row.method or case for case, row in ROWS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
def test_a_method_that_is_killed_early_and_late_goes_on_to_the_same_bits(workspace, case, monkeypatch):
    make_base("qwen2")
    matrix.make_room(ROWS[case])
    plain = matrix.fresh()
    bases = input_bases(plain, linear_modules(plain, select(plain, "all")), [pad(make_examples(2), 0)], 0.9)
    (CHECKPOINTS / "first").mkdir()
    save_bases(bases, CHECKPOINTS / "first")
    truth = run(case, workspace / "whole", monkeypatch)
    steps = len(truth[0])
    for killed in (steps // 3 + 3, 5 * steps // 6 + 2):
        with pytest.raises(KilledError):
            run(case, workspace / f"killed{killed}", monkeypatch, killed)
        saved = load_state(workspace / f"killed{killed}")
        assert 0 < len(saved[1]["curve"]) < killed
        found = run(case, workspace / f"killed{killed}", monkeypatch)
        assert found[0] == truth[0]
        for tensors, same in zip(found[1:], truth[1:], strict=True):
            assert tensors.keys() == same.keys()
            assert all(torch.equal(tensors[name], same[name]) for name in same), killed


def test_a_state_of_a_stage_that_is_killed_twice_is_that_of_the_last_step(workspace, monkeypatch):
    make_base("qwen2")
    truth = run("adalora", workspace / "whole", monkeypatch)
    for killed in (15, 35, 55):
        with pytest.raises(KilledError):
            run("adalora", workspace / "killed", monkeypatch, killed)
    found = run("adalora", workspace / "killed", monkeypatch)
    assert all(torch.equal(found[1][name], tensor) for name, tensor in truth[1].items())


def test_the_generator_of_a_device_is_saved_with_that_of_the_processor(monkeypatch):
    state = [torch.arange(16, dtype=torch.uint8)]
    fake = SimpleNamespace(get_rng_state=lambda: state[0], set_rng_state=lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: fake)
    before = random_states(torch.device("cuda"))
    first, state[0] = torch.rand(3), torch.zeros(16, dtype=torch.uint8)
    set_random_states(before)
    assert torch.equal(torch.rand(3), first)
    assert state[0].tolist() == list(range(16))


def test_the_state_of_a_process_may_be_a_row_of_all():
    states = [torch.get_rng_state()]
    truth = [torch.rand(3)]
    states.append(torch.get_rng_state())
    truth.append(torch.rand(3))
    rows = torch.stack(states)
    for row in (1, 0):
        set_random_states({"cpu": rows[row]})
        assert torch.equal(torch.rand(3), truth[row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_dropout_on_a_gpu_is_drawn_again():
    device = torch.device("cuda")
    before, ones = random_states(device), torch.ones(64, device=device)
    first = torch.nn.functional.dropout(ones)
    set_random_states(before)
    assert torch.equal(torch.nn.functional.dropout(ones), first)


HOLD = """
import sys
from stages.training.resume import resume_folder
with resume_folder({"a": 1}):
    print("in", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""


def hold():
    """Another process that takes the folder, tells so, and leaves it once it is sent a line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD], env=environment, **pipes)


def leave(process):
    process.stdin.write("\n")
    process.stdin.flush()


def tell(process, told):
    """Wait in the background until a process tells that it is in."""
    thread = threading.Thread(target=lambda: told.append(process.stdout.readline()))
    thread.start()
    return thread


@pytest.mark.skipif(resume.fcntl is None, reason="no locks of files here")
def test_who_waited_for_a_folder_that_was_removed_has_one_that_nobody_else_gets(workspace):
    first = hold()
    assert first.stdout.readline() == "in\n"
    threading.Timer(1, leave, [first]).start()  # while this process waits
    with resume_folder({"a": 1}) as folder:
        assert first.stdout.readline() == "out\n"
        assert first.wait() == 0
        save_state(folder, {"a": torch.zeros(1)}, {})
        second, told = hold(), []
        waiting = tell(second, told)
        waiting.join(6)
        assert not told  # it waits, for the folder is not free
        assert load_state(folder) is not None
    waiting.join()
    assert told == ["in\n"]
    leave(second)
    assert second.wait() == 0
    assert not list(FOLDER.iterdir())


@pytest.mark.skipif(resume.fcntl is None, reason="no locks of files here")
def test_the_folder_of_a_killed_process_is_free_and_as_it_was(workspace):
    first = hold()
    assert first.stdout.readline() == "in\n"
    save_state(next(FOLDER.iterdir()), {"a": torch.ones(1)}, {"step": 3})
    first.send_signal(signal.SIGKILL)
    first.wait()
    with resume_folder({"a": 1}) as folder:
        assert load_state(folder)[1] == {"step": 3}


@pytest.mark.parametrize("locks", [True, False])
def test_the_folder_is_removed_after_success_and_kept_after_an_error(workspace, locks, monkeypatch):
    if not locks:
        monkeypatch.setattr(resume, "fcntl", None)  # as on Windows
    with pytest.raises(FileNotFoundError), resume_folder({"a": 1}) as folder:  # the lock's own kind of error
        save_state(folder, {"a": torch.zeros(1)}, {"step": 1})
        raise FileNotFoundError
    with resume_folder({"a": 1}) as again:
        assert again == folder and load_state(again)[1] == {"step": 1}
    assert not list(FOLDER.iterdir())


def test_two_keys_have_two_folders(workspace):
    with resume_folder({"a": 1}) as one, resume_folder({"a": 2}) as other:
        assert one != other
