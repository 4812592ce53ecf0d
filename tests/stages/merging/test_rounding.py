import pytest
import torch
from safetensors.torch import load_file

from analysis.changes.deltas import measure
from stages.files import BASE
from stages.merging.merged import Merged
from stages.merging.rounding import PART, round_stochastically
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_model, open_stages
from tests.conftest import make_base, make_stage
from tests.stages.test_merge import load_base, merged

SIXTEEN = [torch.bfloat16, torch.float16]


def drawn(values, dtype, seed=0):
    return round_stochastically(values, dtype, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_a_number_goes_to_one_of_its_neighbours_and_is_itself_on_average(dtype):
    exact = torch.tensor([1.0001, -1.0001, 0.3, -2.7e-3, 3e-8, -3e-8, 0.0, 60000.0, 1.5])
    draws = torch.stack([drawn(exact, dtype, seed).float() for seed in range(4000)])
    found, width = draws.unique(dim=0), torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    below, above = found.amin(0), found.amax(0)
    assert ((below <= exact) & (exact <= above)).all()
    assert (above - below <= width * 1.001).all()
    for number, low, high in zip(exact, below, above, strict=True):  # nothing between them
        between = torch.nextafter(low.to(dtype).double(), high.double()).to(dtype)
        assert between in (low.to(dtype), high.to(dtype)), number
    error = (draws.double().mean(0) - exact.double()).abs()
    assert (error <= 4 * (above - below) / 2 / 4000**0.5).all()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_numbers_that_the_dtype_has_stay_as_they_are(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    assert torch.equal(drawn(finite.float(), dtype).view(torch.int16), finite.view(torch.int16))


def test_of_more_than_16_bits_nothing_is_rounded():
    values = torch.randn(100)
    assert torch.equal(drawn(values, torch.float32), values)


def test_a_long_tensor_is_rounded_to_its_end():
    ends = drawn(torch.full((PART + 100,), 1.0 + 2**-9), torch.bfloat16)[-100:].float().unique()
    assert set(ends.tolist()) == {1.0, 1.0 + 2**-7}


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_a_change_below_the_spacing_is_in_the_file_on_average(architecture):
    make_base(architecture, torch.bfloat16)
    make_stage("tiny", load_base(), "lora", "1-2", size=0.05)
    weights = {"method": "task_arithmetic", "weights": {"tiny": 1e-4}}
    exact = merged("exact", dtype="float32", **weights)
    nearest = merged("nearest", dtype="bfloat16", rounding="nearest", **weights)
    first, again = (merged(name, dtype="bfloat16", **weights) for name in ("one", "two"))
    before = load_file(BASE / "model.safetensors")
    kept = {}
    for name, stored in before.items():
        assert torch.equal(first[name], again[name])
        asked = (exact[name] - stored.float()).double()
        if not asked.any():
            assert torch.equal(first[name], stored)
            continue
        for kind, file in (("nearest", nearest), ("stochastic", first)):
            moved = (file[name].float() - stored.float()).double()
            kept.setdefault(kind, []).append(torch.stack([(moved * asked).sum(), (asked * asked).sum()]))
    shares = {kind: torch.stack(parts).sum(0) for kind, parts in kept.items()}
    assert shares["nearest"][0] / shares["nearest"][1] < 0.5
    assert shares["stochastic"][0] / shares["stochastic"][1] == pytest.approx(1, abs=0.1)


def test_what_no_stage_changed_goes_to_the_nearest():
    make_base("gpt2")
    make_stage("one", load_base(), "lora", "1-2")
    merge = {"method": "task_arithmetic", "weights": {"one": 1.0}, "dtype": "bfloat16"}
    file = merged(**merge)
    base, stages = open_stages(["one"])
    assert measure(stages, Merged(base, stages, Merge(**merge)), open_model("merged")).untouched_max == 0
    before = load_file(BASE / "model.safetensors")
    biases = [name for name in before if name.endswith("c_attn.bias")]
    assert biases and all(torch.equal(file[name], before[name].bfloat16()) for name in biases)
