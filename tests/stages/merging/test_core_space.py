"""Core space: what it gives back is compared with dense float64 sums."""

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from torch import Tensor

from stages.merging.core_space import merge_in_core


def factors(out: int, inner: int, ranks: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"stage{index}": (torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator))
        for index, rank in enumerate(ranks)
    }


def kernel(method: str, **parameters: object):
    def merge(cores: dict[str, Tensor]) -> Tensor:
        zero = torch.zeros_like(next(iter(cores.values())))
        return merge_tensors([zero, *cores.values()], method, base_index=0, parameters=parameters)

    return merge


def relative_error(left: Tensor, right: Tensor, truth: Tensor) -> float:
    return ((left.double() @ right.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("ranks", [[4], [4, 4, 4], [1, 9], [30, 30], [70, 70]])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64), (1, 20)])
def test_task_arithmetic_is_the_dense_weighted_sum(shape, ranks):
    given = factors(*shape, ranks)
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    left, right = merge_in_core(given, kernel("task_arithmetic", weight=weights))
    truth = sum(w * (a.double() @ b.double()) for w, (a, b) in zip(weights, given.values(), strict=True))
    assert relative_error(left, right, truth) < 1e-6
    assert left.dtype == right.dtype == torch.float32
    assert left.shape == (shape[0], min(sum(ranks), *shape))
    assert right.shape == (left.shape[1], shape[1])


def test_the_kernel_sees_every_stage_at_its_own_name_and_in_full():
    given = factors(50, 40, [3, 6])
    seen: dict[str, Tensor] = {}
    merge_in_core(given, lambda cores: seen.update(cores) or cores["stage0"])
    assert seen.keys() == given.keys()
    for stage, (left, right) in given.items():
        assert seen[stage].shape == (9, 9)
        assert seen[stage].dtype == torch.float32
        dense = torch.linalg.svdvals(left.double() @ right.double())[:9]
        assert torch.allclose(torch.linalg.svdvals(seen[stage].double()), dense, atol=1e-5)


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
def test_a_core_given_back_is_that_stage(stage):
    given = factors(50, 40, [3, 6])
    left, right = merge_in_core(given, lambda cores: cores[stage])
    assert relative_error(left, right, given[stage][0].double() @ given[stage][1].double()) < 1e-6


def test_both_factors_carry_the_square_roots_of_the_singular_values():
    given = factors(50, 40, [3, 6])
    left, right = merge_in_core(given, kernel("task_arithmetic", weight=1.0))
    roots = torch.linalg.svdvals(sum(a.double() @ b.double() for a, b in given.values()))[:9].sqrt()
    assert torch.allclose(left.T.double() @ left.double(), torch.diag(roots**2), atol=1e-4)
    assert torch.allclose(right.double() @ right.T.double(), torch.diag(roots**2), atol=1e-4)


def test_the_order_of_the_stages_does_not_matter_to_an_entrywise_method():
    given = factors(50, 40, [3, 6])
    ties = kernel("ties", weight=1.0, density=0.5)
    one = torch.matmul(*merge_in_core(given, ties))
    other = torch.matmul(*merge_in_core(dict(reversed(given.items())), ties))
    assert torch.allclose(one, other, atol=1e-4)
    assert one.norm() > 1


def test_dependent_and_zero_factors_are_exact():
    (left, right), *_ = factors(50, 40, [4]).values()
    given = {"a": (left, right), "b": (2 * left, right), "c": (left, torch.zeros_like(right))}
    merged = merge_in_core(given, kernel("task_arithmetic", weight=1.0))
    assert relative_error(*merged, 3 * left.double() @ right.double()) < 1e-6
    nothing = merge_in_core({"c": given["c"]}, kernel("task_arithmetic", weight=1.0))
    assert torch.matmul(*nothing).norm() == 0
