"""What a routed model makes of a module's output, against the algebra of DoRA in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.merging.adapter_output import Fit
from stages.routing.changes import is_sound, low_rank
from stages.routing.modeling_routed import LowRank


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("biases", ["none", "old", "new"])
def test_a_low_rank_change_is_that_of_the_adapter(kind, biases):
    torch.manual_seed(0)
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5) * 0.1, torch.randn(6, 2)
    magnitude = torch.rand(6) + 1 if kind == "dora" else None
    old, new = (torch.randn(6) if has else None for has in (biases != "none", biases == "new"))
    x = torch.randn(3, 5, dtype=torch.float64)

    changed = (weight + b @ a).double()
    if magnitude is not None:
        changed *= (magnitude / torch.linalg.vector_norm(changed, dim=1))[:, None]
    wanted = x @ changed.T + (0 if old is None else (old if new is None else new))

    tensors = low_rank(Fit(a, b, magnitude, 0.0), weight, old, new)
    made = LowRank(6, 5, 2, gain="gain" in tensors, shift="shift" in tensors).double()
    made.load_state_dict(tensors)
    output = x @ weight.T.double() + (0 if old is None else old)
    torch.testing.assert_close(made(output, x), wanted, rtol=1e-5, atol=1e-5)
    assert ("gain" in tensors) == (kind == "dora")
    assert ("shift" in tensors) == (biases == "new" or (biases == "old" and kind == "dora"))


def test_a_fit_of_two_large_terms_that_cancel_is_not_sound():
    base = SimpleNamespace(module=lambda _: {"weight": torch.eye(3)})
    settings = SimpleNamespace(adapter=SimpleNamespace(tolerance=1e-4))
    merged: Any = SimpleNamespace(base=base, merge=settings, is_transposed=lambda _: False)
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[-0.9999], [0], [0]])  # all but a ten-thousandth of the first row
    assert not is_sound(merged, "path", Fit(a, b, torch.ones(3), 1e-6))
    assert is_sound(merged, "path", Fit(a, b * 0.1, torch.ones(3), 1e-6))
    assert not is_sound(merged, "path", Fit(a, b * 0.1, torch.ones(3), 1e-3))
