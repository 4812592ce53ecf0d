"""Frozen weights divided between two processes: against one that holds them all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import train
from stages.files import BASE, CHECKPOINTS
from stages.project.params import load_params
from stages.training.launch import TORCHRUN
from stages.training.loop import Run
from stages.training.model import load_parent, put_on
from stages.training.protection import BASES
from stages.training.shard import shard
from tests.conftest import ROOT, make_tokenizer
from tests.stages.models.test_every_architecture import ATTEMPTS, build
from tests.stages.test_train import make_examples, make_stage, prepare, write
from tests.stages.training.test_loop import curve_of, run_train

# Accelerate knows FSDP on accelerators only. Here two processes of a CPU are told to do what they would do there, in
# the environment that its launcher makes; each leaves how many numbers of the frozen weights it holds.
DIVIDED = """
import sys
from pathlib import Path
from accelerate.utils import DistributedType
from stages import train
from stages.project.params import load_params
from stages.training import shard
shard.DIVIDED = (DistributedType.MULTI_CPU,)
def fit(model, stage, sources, seed, accelerator, *args, **kwargs):
    held = [getattr(p, "_local_tensor", p).numel() for p in model.parameters() if not p.requires_grad]
    Path(f"held{accelerator.process_index}").write_text(str(sum(held)))
    return original(model, stage, sources, seed, accelerator, *args, **kwargs)
original, train.fit = train.fit, fit
train.main(sys.argv[1])
"""


# Pieces of three of eight examples are an odd number, so that one process has nothing to do in the end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("lora\n    rank: 4", "\n    remember: 0.9\n    micro_batch_size: 3\n    gradient_checkpointing: true"),
        ("full", ""),
    ],
)
def test_divided_weights_give_the_curve_and_the_adapter_of_whole_ones(project, method, keys, monkeypatch):
    write(
        ("steps: 25", "steps: 8"),
        ("lr: 1.0e-2", "lr: 1.0e-3"),
        ("method: lora\n    layers: 0-1\n    rank: 4", f"method: {method}\n    layers: 2-3{keys}"),
    )
    weights = prepare()
    train.main("sums")
    curve, truth = curve_of("sums"), load_file(weights)
    bases = load_file(CHECKPOINTS / "sums" / BASES) if keys else {}
    frozen = sum(p.numel() for p in load_parent(load_params().stages["sums"], torch.float32).parameters())

    Path("divided.py").write_text(DIVIDED)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for name, value in fsdp.items():
        monkeypatch.setenv(name, value)
    write(("layers: 2-3", "layers: 2-3\n    processes: 2"))
    done = run_train("sums", *TORCHRUN, "2", "divided.py")
    assert done.wait() == 0, done.stderr.read()
    assert curve_of("sums") == pytest.approx(curve, rel=1e-4)
    found = load_file(weights)
    assert found.keys() == truth.keys()
    assert all(torch.allclose(found[name], truth[name], rtol=1e-3, atol=1e-5) for name in truth)
    again = load_file(CHECKPOINTS / "sums" / BASES) if keys else {}
    assert {name: basis.shape for name, basis in again.items()} == {name: basis.shape for name, basis in bases.items()}
    held = [int(Path(f"held{process}").read_text()) for process in range(2)]
    assert frozen <= sum(held) < 1.1 * frozen


UNEVEN = """
from accelerate import Accelerator
from safetensors.torch import save_file
from tests.stages.training.test_shard import uneven
accelerator = Accelerator(cpu=True)
save_file(uneven(accelerator), f"uneven{accelerator.process_index}.safetensors")
accelerator.end_training()
"""
UNREACHED = [[], [0, 1, 2], [], [0]]  # by example: layers in which its tokens go to no expert that is trained


def uneven(accelerator):
    """What is trained of experts in two steps, of which each process gets every other example."""
    stage = make_stage(layers={"mlp.experts": "all"}, micro_batch_size=1)
    torch.manual_seed(0)
    model = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32)
    biases = [values for name, values in model.named_buffers() if name.endswith("e_score_correction_bias")]
    if accelerator.num_processes > 1:
        shard(model, accelerator)
    run, examples = Run(model, stage, accelerator), make_examples(4)
    whole_loss = run.loss

    def loss(piece):
        for layer, bias in enumerate(biases):  # the experts that give back what they get are the last four
            bias[4:] = 10.0 if layer in UNREACHED[examples.index(piece[0])] else -10.0
        return whole_loss(piece)

    run.loss = loss
    for step in range(2):
        run.step([examples], step)
    return {name: values.detach().clone() for name, values in run.trained.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_process_whose_tokens_reach_no_trained_expert_holds_up_no_other(workspace):
    build("longcat_flash", ATTEMPTS[2] | {"zero_expert_num": 4, "num_layers": 3}).save_pretrained(BASE)
    make_tokenizer().save_pretrained(BASE)
    truth = uneven(Accelerator(cpu=True))
    Path("uneven.py").write_text(UNEVEN)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", "uneven.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100
    )
    assert done.returncode == 0
    for process in range(2):
        found = load_file(f"uneven{process}.safetensors")
        assert all(torch.allclose(found[name], truth[name], rtol=1e-4, atol=1e-6) for name in truth)
