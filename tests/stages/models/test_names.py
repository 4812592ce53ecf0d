"""Names in memory and in the file: what transformers loads is what is read, and what cannot be undone is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.errors import MistakeError
from stages.files import BASE
from stages.models.names import pieces_of, refuse_lost, shapes_in, whole_shape
from stages.weights.checkpoint import Checkpoint
from tests.stages.models.test_every_architecture import TINY, build


@pytest.mark.parametrize(
    ("kind", "pieced"),
    [("mixtral", True), ("nemotron_h", True), ("olmo_hybrid", True), ("gpt_neox", True), ("llama", False)],
)
def test_a_file_gives_the_weights_that_transformers_loads_from_it(workspace, kind, pieced):
    build(kind, TINY | {"head_dim": 8}).save_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    checkpoint = Checkpoint(BASE, "base")
    pieces = checkpoint.architecture.pieces
    assert bool(pieces) == pieced
    for name, weights in model.state_dict().items():
        assert torch.equal(checkpoint.stored(name), weights), name
        assert checkpoint.specification(name) == (list(weights.shape), "F32")
    assert {f"{path}.{name}" for path, names in checkpoint.modules.items() for name in names} == set(model.state_dict())
    checkpoint.architecture.write(BASE)
    again = Checkpoint(BASE, "base")  # from what was written down, and no longer from transformers
    assert all(torch.equal(again.stored(name), weights) for name, weights in model.state_dict().items())


def test_a_file_that_lacks_a_weight_or_has_another_is_refused(workspace):
    model = build("mixtral", TINY)
    model.save_pretrained(BASE)
    pieces = pieces_of(model, shapes_in(BASE))
    refuse_lost(model, BASE, pieces)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] += 1
    with pytest.raises(
        MistakeError, match=r"^MixtralForCausalLM keeps model.layers.1.mlp.experts.down_proj in its file"
    ):
        refuse_lost(model, BASE, pieces)
    del pieces["model.layers.0.mlp.experts.gate_up_proj"]
    with pytest.raises(MistakeError, match=r"keeps model.layers.0.mlp.experts.gate_up_proj in its file in a way"):
        refuse_lost(model, BASE, pieces)


def test_what_cannot_be_undone_in_a_file_is_refused(workspace):
    model = build("hrm_text", TINY)
    model.save_pretrained(BASE)
    with pytest.raises(
        MistakeError, match=r"^transformers makes .*gate_proj.* by Chunk\(dim=0\), which cannot be undone"
    ):
        pieces_of(model, shapes_in(BASE))


def test_the_shape_of_a_whole_is_that_of_its_pieces():
    assert whole_shape([4, 5], [("a", [0, [0, 4]]), ("b", [1, [0, 4]]), ("c", [0, [4, 8]]), ("d", [1, [4, 8]])]) == [
        2,
        8,
        5,
    ]
    assert whole_shape([3, 5], [("a", [[0, 3]]), ("b", [[3, 5]])]) == [5, 5]
    assert whole_shape([3, 5], [("a", [])]) == [3, 5]
