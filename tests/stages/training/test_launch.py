"""How the processes of a stage are started, and that nothing depends on it."""

import os
import subprocess
import sys

import pytest
from accelerate.utils import DistributedType

from stages import train
from stages.errors import MistakeError
from stages.files import read_json, sha256
from stages.training import launch
from tests.conftest import ROOT
from tests.stages.test_train import prepare, write


@pytest.mark.parametrize(
    ("command", "processes", "words"),
    [
        ("python", 1, None),
        ("torchrun", 1, None),
        ("", 1, None),
        ("python", 2, [sys.executable, *launch.TORCHRUN, "2"]),
        ("torchrun", 3, [sys.executable, *launch.TORCHRUN, "3"]),
        ("python -u", 1, [sys.executable, "-u"]),
        ("torchrun --nproc_per_node 2", 2, ["torchrun", "--nproc_per_node", "2"]),
        (
            "accelerate launch --config_file 'my fsdp.yaml'",
            2,
            ["accelerate", "launch", "--config_file", "my fsdp.yaml"],
        ),
    ],
)
def test_a_process_becomes_the_launcher_once(command, processes, words, monkeypatch):
    told = []
    monkeypatch.setattr(os, "execvp", lambda program, words: told.append((program, words)))
    for name in launch.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    launch.launch("sums", command, processes)
    assert told == ([] if words is None else [(words[0], [*words, "-m", "stages.train", "sums"])])
    launch.launch("sums", command, processes)  # what it starts finds its environment
    assert len(told) == (words is not None)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):  # a launcher that was started by hand
        monkeypatch.setattr(os, "environ", {name: "0"})
        launch.launch("sums", command, processes)
    assert len(told) == (words is not None)


def test_a_launcher_that_is_not_there_is_told(project, monkeypatch):
    write(("launch: python", "launch: acelerate launch"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(MistakeError, match=r"launch starts with 'acelerate', which does not start \(No such file"):
        train.main("sums")


def test_a_launcher_that_is_no_command_is_told():
    with pytest.raises(MistakeError, match=r"launch .* is no command \(No closing quotation\); correct it"):
        launch.launch("sums", "accelerate launch 'x", 1)


def test_a_launcher_that_is_not_known_is_refused(project, monkeypatch):
    prepare()
    monkeypatch.setattr(train.Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(MistakeError, match="launch asks for DEEPSPEED, which is not known here"):
        train.main("sums")


def run_train(*launcher):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "stages.train", "sums"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "processes", "sentence"),
    [
        ("python -m torch.distributed.run --standalone --nproc_per_node 2", 1, "is 1, but launch started 2; write"),
        # On a CPU accelerate starts one process whatever it is asked for.
        ("python -m accelerate.commands.launch --cpu --num_processes 2", 2, "is 2, but launch started 1; write"),
    ],
)
def test_another_number_of_processes_than_the_stage_asks_for_is_refused(project, command, processes, sentence):
    write(("launch: python", f"launch: {command}"), ("rank: 4", f"rank: 4\n    processes: {processes}"))
    weights = prepare()
    done = run_train()
    assert done.returncode and f"stages.sums.processes {sentence}" in done.stderr, done.stderr
    assert not weights.exists()


@pytest.mark.slow
def test_how_a_stage_is_launched_changes_nothing(project):
    write(("steps: 25", "steps: 5"))
    weights, found = prepare(), []
    for command in ("python", "python -X utf8"):
        write(("launch: python\n", f"launch: {command}\n"))
        assert run_train().returncode == 0
        found.append((sha256([weights]), read_json(weights.parent / "stage.json")))
    assert found[0] == found[1]


def test_four_bits_are_not_divided(project, monkeypatch):
    write(("rank: 4", "rank: 4\n    load_in_4bit: true"))
    prepare()
    monkeypatch.setattr(train.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(MistakeError, match=r"stages.sums.load_in_4bit does not go with launch, which asks for FSDP"):
        train.main("sums")
