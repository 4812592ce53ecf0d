"""Each method against its paper's formula in float64 and other algebra: eigenvectors instead of the SVD."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from torch import Tensor

import stages.merging.methods  # noqa: F401  registers them
from stages.merging.core_space import merge_in_core
from stages.merging.method import OURS

MATRIX_ONLY = ["tsv_m", "iso_c", "iso_cts"]  # they average what is no matrix
SPECTRAL = [*MATRIX_ONLY, "svc"]


def merge(method: str, deltas: list[Tensor], weight: list[float] | float = 1.0, **parameters: object) -> Tensor:
    return merge_tensors(
        [torch.zeros_like(deltas[0]), *deltas], method, base_index=0, parameters={"weight": weight, **parameters}
    )


def full(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def lora(out: int, inner: int, ranks: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"stage{index}": (torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator))
        for index, rank in enumerate(ranks)
    }


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def near(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return ((left.double() - right.double()).norm() <= tolerance * right.double().norm()).item()


def power(symmetric: Tensor, exponent: float) -> Tensor:
    """Of a positive semidefinite float64 matrix, on its range."""
    values, vectors = torch.linalg.eigh(symmetric)
    keep = values > 1e-9 * values.max()
    return (vectors[:, keep] * values[keep] ** exponent) @ vectors[:, keep].T


def polar(matrix: Tensor) -> Tensor:
    return matrix @ power(matrix.T @ matrix, -0.5)


def triplets(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    s, v = values.flip(0)[:k].sqrt(), vectors.flip(1)[:, :k]
    return matrix @ v / s, s, v


def truth_tsv_m(deltas: list[Tensor]) -> Tensor:
    parts = [triplets(delta, min(delta.shape) // len(deltas)) for delta in deltas]
    u, s, v = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return polar(u) @ torch.diag(s) @ polar(v).T


def truth_iso_c(deltas: list[Tensor]) -> Tensor:
    total = sum(deltas)
    return polar(total) * power(total.T @ total, 0.5).trace() / torch.linalg.matrix_rank(total)


def truth_iso_cts(deltas: list[Tensor]) -> Tensor:
    rank = min(deltas[0].shape)
    own = round((rank - int(0.8 * rank)) / len(deltas))
    common = triplets(sum(deltas), rank - own * len(deltas))
    outside = torch.eye(len(deltas[0]), dtype=torch.float64) - common[0] @ common[0].T
    parts = [common] + [triplets(outside @ delta, own) for delta in deltas]
    u, s, v = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return s.mean() * polar(u) @ polar(v).T


def truth_knots(deltas: list[Tensor], density: float = 1.0) -> Tensor:
    directions = torch.linalg.eigh(sum(delta @ delta.T for delta in deltas))[1]
    blocks = torch.stack([directions.T @ delta for delta in deltas])
    for block in blocks:
        block[block.abs() < block.abs().flatten().sort().values[-int(density * block.numel())]] = 0
    agree = blocks.sign() == blocks.sum(0).sign()
    return directions @ ((blocks * agree).sum(0) / agree.sum(0).clamp(min=1))


def truth_svc(deltas: list[Tensor], alpha: float = 1.0) -> Tensor:
    total = sum(deltas)
    directions = torch.linalg.eigh(total @ total.T)[1][:, -torch.linalg.matrix_rank(total) :]
    held = [
        torch.diag(directions.T @ total @ delta.T @ directions)
        / torch.diag(directions.T @ delta @ delta.T @ directions)
        for delta in deltas
    ]
    gamma = len(deltas) / torch.stack(held).clamp(min=alpha).sum(0)
    return (directions * gamma) @ directions.T @ total


@dataclass(frozen=True)
class Row:
    """What a method is compared with.

    Attributes:
        truth: its formula, in other algebra: from the weighted deltas, three float64 matrices of full rank, to the
            merged one. It takes the method's own parameters.
        parameters: settings of them that it is tried with.
        refused: settings out of range.
    """

    truth: Callable[..., Tensor]
    parameters: list[dict[str, float]] = field(default_factory=lambda: [{}])
    refused: list[dict[str, float]] = field(default_factory=list)


ROWS = {
    "tsv_m": Row(truth_tsv_m),
    "iso_c": Row(truth_iso_c),
    "iso_cts": Row(truth_iso_cts, refused=[{"common_fraction": 2}]),
    "knots": Row(truth_knots, [{}, {"density": 0.25}], [{"density": 0.0}, {"density": 1.5}]),
    "svc": Row(truth_svc, [{}, {"alpha": 0.3}], [{"alpha": 0.0}]),
}
ROTATION_FREE = [method for method in ROWS if OURS[method].rotation_free]


def test_every_method_has_its_row():
    missing = sorted(OURS.keys() - ROWS.keys())
    assert not missing, f"add to ROWS in {__file__}, with the formula in float64: {missing[0]!r}: Row(truth)"


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("weight", [1.0, [0.5, -1.0, 2.0]])
@pytest.mark.parametrize(
    ("method", "parameters"), [(method, parameters) for method, row in ROWS.items() for parameters in row.parameters]
)
def test_full_rank_deltas_follow_the_paper(method, parameters, weight, shape):
    deltas = full(*shape)
    weights = weight if isinstance(weight, list) else [weight] * 3
    weighted = [w * delta.double() for w, delta in zip(weights, deltas, strict=True)]
    assert near(merge(method, deltas, weight, **parameters), ROWS[method].truth(weighted, **parameters), 1e-4)


@pytest.mark.parametrize("method", ROWS)
def test_the_base_is_added_and_its_dtype_kept(method):
    base, *deltas = full(12, 20, count=4)
    merged = merge_tensors([base, *(base + d for d in deltas)], method, base_index=0, parameters={"weight": 0.5})
    assert near(merged - base, merge(method, deltas, 0.5), 1e-4)
    half = merge_tensors([base.bfloat16()] * 2, method, base_index=0, parameters={"weight": 1.0})
    assert half.dtype == torch.bfloat16
    assert half.equal(base.bfloat16())


@pytest.mark.parametrize("method", MATRIX_ONLY)
def test_scale_multiplies_the_merged_delta(method):
    for deltas in (full(12, 20), full(12)):
        assert near(merge(method, deltas, scale=0.3), 0.3 * merge(method, deltas), 1e-6)


@pytest.mark.parametrize("method", ["tsv_m", "knots", "svc"])
@pytest.mark.parametrize("delta", [full(12, 20)[0], full(30)[0], full(6, 4, 3)[0]], ids=["matrix", "vector", "3d"])
def test_one_stage_alone_is_its_weighted_delta(method, delta):
    assert near(merge(method, [delta], 0.7), 0.7 * delta)


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (1, 9), (9, 1), (5, 4, 3), (2, 3, 2, 2)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_shape_is_finite_and_zero_deltas_change_nothing(method, shape, count):
    base = torch.ones(shape)
    untouched = merge_tensors([base] * (count + 1), method, base_index=0, parameters={"weight": 1.0})
    assert untouched.equal(base)
    merged = merge(method, full(*shape, count=count))
    assert merged.shape == torch.Size(shape)
    assert merged.isfinite().all()
    assert merged.norm() > 0


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_tiny_and_huge_deltas_merge_alike(method, scale):
    deltas = [left @ right for left, right in lora(20, 30, [4, 4]).values()]
    assert near(merge(method, [scale * delta for delta in deltas]) / scale, merge(method, deltas))


LORA = [left @ right for left, right in lora(20, 30, [4, 4]).values()]


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize(("left", "right"), [LORA, full(20, 30, count=2)], ids=["lora", "full"])
def test_a_stage_without_a_delta_does_not_change_a_matrix(method, left, right):
    parameters = {"common_fraction": 1.0} if method == "iso_cts" else {}
    with_zero = merge(method, [left, torch.zeros_like(left), right], **parameters)
    assert near(with_zero, merge(method, [left, right], **parameters), 1e-6)


@pytest.mark.parametrize("method", [*SPECTRAL, "knots"])
def test_low_rank_deltas_stay_in_the_space_that_they_span(method):
    factors = lora(40, 60, [3, 5])
    merged = merge(method, [left @ right for left, right in factors.values()]).double()
    lefts = torch.cat([left for left, _ in factors.values()], 1).double()
    assert near(lefts @ torch.linalg.pinv(lefts) @ merged, merged)
    if method in SPECTRAL:
        assert torch.linalg.svdvals(merged)[8:].max() < 1e-4
        rights = torch.cat([right for _, right in factors.values()]).double()
        assert near(merged @ torch.linalg.pinv(rights) @ rights, merged)


@pytest.mark.parametrize("method", MATRIX_ONLY)
@pytest.mark.parametrize("shape", [(7,), (5, 4, 3)])
def test_what_is_no_matrix_is_averaged(method, shape):
    one, two = full(*shape, count=2)
    assert near(merge(method, [one, two], [1.0, 0.5]), (one + 0.5 * two) / 2, 1e-6)


def rotates(method: str, ranks: list[int]) -> bool:
    """Whether rotating the deltas rotates the result."""
    deltas = [left @ right for left, right in lora(30, 50, ranks).values()]
    left, right = orthogonal(30, 0), orthogonal(50, 1)
    return near(merge(method, [left @ delta @ right for delta in deltas]), left @ merge(method, deltas) @ right)


@pytest.mark.parametrize("method", ROWS)
def test_a_method_says_that_it_is_rotation_free_exactly_if_it_is(method):
    assert rotates(method, [4, 4, 4]) == OURS[method].rotation_free


@pytest.mark.parametrize("method", ROTATION_FREE)
@pytest.mark.parametrize("ranks", [[2, 7, 1], [6]])
def test_rotating_the_inputs_rotates_the_result(method, ranks):
    assert rotates(method, ranks)


@pytest.mark.parametrize("method", ROTATION_FREE)
@pytest.mark.parametrize("shape", [(300, 200), (14, 60)])
@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 9, 1], [6], [8, 8]])
def test_core_space_gives_the_dense_result(method, shape, ranks):
    factors = lora(*shape, ranks)
    weights = [1.0, 0.5, -2.0][: len(ranks)]
    dense = merge(method, [left @ right for left, right in factors.values()], weights)
    left, right = merge_in_core(factors, lambda cores: merge(method, list(cores.values()), weights))
    # Iso-CTS cuts the spectrum between close singular values, which magnifies the rounding of its float32 inputs.
    assert near(left @ right, dense, 1e-4 if method == "iso_cts" else 1e-5)


SVD = torch.linalg.svd


def svd_of_float64(matrix: Tensor, **settings: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD where LAPACK gives up in float32."""
    if matrix.dtype == torch.float32:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")
    return SVD(matrix, **settings)


@pytest.mark.parametrize("svd", [SVD, svd_of_float64])
def test_tsv_m_and_svc_are_the_sum_where_stages_do_not_overlap(monkeypatch, svd):
    monkeypatch.setattr(torch.linalg, "svd", svd)
    u, v = orthogonal(30, 0), orthogonal(50, 1)
    deltas = [u[:, i : i + 3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ v[i : i + 3] for i in (0, 3, 6)]
    assert near(merge("tsv_m", deltas, [1.0, 2.0, -1.0]), deltas[0] + 2 * deltas[1] - deltas[2])
    for alpha in (0.3, 1.0):
        assert near(merge("svc", deltas, [1.0, 2.5, -0.3], alpha=alpha), deltas[0] + 2.5 * deltas[1] - 0.3 * deltas[2])


@pytest.mark.parametrize("method", ["tsv_m", "svc"])
def test_a_delta_that_two_stages_share_counts_once(method):
    (left, right), *_ = lora(30, 50, [4]).values()
    assert near(merge(method, [left @ right] * 2), left @ right)
    assert merge(method, [left @ right, left @ right * 0.3]).isfinite().all()


def test_tsv_m_adds_no_direction_where_stages_share_some_in_another_strength():
    (left, right), *_ = lora(30, 50, [4]).values()
    merged = merge("tsv_m", [left @ right, 0.3 * left @ right]).double()
    assert near(merged, 0.65 * left.double() @ right.double())


def test_svc_weakens_directions_and_never_strengthens_them_by_default():
    deltas = [left @ right for left, right in lora(30, 50, [6, 6, 6]).values()]
    total = sum(deltas).double()
    u = torch.linalg.svd(total, full_matrices=False)[0][:, :18]
    ratio = (u.T @ merge("svc", deltas).double()).norm(dim=1) / (u.T @ total).norm(dim=1)
    assert (ratio <= 1 + 1e-5).all()
    assert ratio.min() < 0.9
    opposed = [deltas[0], -0.5 * deltas[0]]
    assert near(merge("svc", opposed), 0.5 * deltas[0])
    assert merge("svc", opposed, alpha=0.25).norm() > 1.5 * (0.5 * deltas[0]).norm()


def test_svc_leaves_a_direction_that_only_rounding_tells_about():
    large, small = torch.zeros(2, 40, 40)
    large[0, 0], small[1, 1] = 1e6, 1.0
    assert merge("svc", [large + small, -large]).equal(small)


def test_svc_of_vectors_is_the_papers_formula_for_them():
    one, two = full(50, count=2)
    one = one + two
    held = [((one + two) @ delta / delta.square().sum()).clamp(min=1) for delta in (one, two)]
    assert near(merge("svc", [one, two]), 2 / sum(held) * (one + two))


@pytest.mark.parametrize(
    "deltas", [full(20, 30), [a @ b for a, b in lora(20, 30, [4, 4]).values()]], ids=["full", "lora"]
)
def test_iso_c_makes_all_directions_equally_strong(deltas):
    before = torch.linalg.svdvals(sum(deltas))
    after = torch.linalg.svdvals(merge("iso_c", deltas))
    before, after = before[before > 1e-4], after[after > 1e-4]
    assert len(after) == len(before)
    assert torch.allclose(after, before.mean().expand_as(after), rtol=1e-5)


def test_iso_cts_without_a_share_for_the_stages_is_iso_c():
    deltas = full(20, 30)
    assert near(merge("iso_cts", deltas, common_fraction=1.0), merge("iso_c", deltas))
    assert not near(merge("iso_cts", deltas), merge("iso_c", deltas), 0.1)
    too_small_to_share = full(4, 2)
    assert near(merge("iso_cts", too_small_to_share, common_fraction=0.0), merge("iso_c", too_small_to_share))


def test_iso_cts_takes_no_rounding_for_a_stages_own_direction():
    u, v = orthogonal(30, 0), orthogonal(50, 1)
    strong, weak = 100 * u[:, :8] @ v[:8], u[:, 8:10] @ v[8:10]
    after = torch.linalg.svdvals(merge("iso_cts", [strong, weak]))
    assert torch.allclose(after[:9], torch.tensor((8 * 100 + 1) / 9), rtol=1e-5)
    assert after[9:].max() < 1e-3
    assert merge("iso_cts", [strong, -strong]).norm() == 0


def test_knots_of_agreeing_stages_is_their_mean():
    delta = full(20, 30, count=1)[0]
    assert near(merge("knots", [delta, 3 * delta]), 2 * delta)
    assert near(merge("knots", [delta, 3 * delta], [1.0, 0.0]), delta)


def test_knots_of_vectors_is_ties():
    deltas = full(40)
    ties = merge_tensors(
        [torch.zeros(40), *deltas], "ties", base_index=0, parameters={"weight": 1.0, "density": 0.5, "lambda": 2.0}
    )
    assert near(merge("knots", deltas, density=0.5, scale=2.0), ties)


@pytest.mark.parametrize(
    ("method", "wrong"), [(method, wrong) for method, row in ROWS.items() for wrong in row.refused]
)
def test_parameters_out_of_range_are_refused(method, wrong):
    with pytest.raises(ValueError, match="should be"):
        merge(method, full(4, 4), **wrong)


@pytest.mark.parametrize("method", ROWS)
def test_a_base_alone_and_a_missing_weight_are_refused(method):
    with pytest.raises(ValueError, match="non-base"):
        merge_tensors([torch.zeros(3, 3)], method, base_index=0)
    with pytest.raises(TypeError, match="weight"):
        merge_tensors([torch.zeros(3, 3)] * 2, method, base_index=0)
