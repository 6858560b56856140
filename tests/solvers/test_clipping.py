import pytest
import torch
from torch import Tensor

from lowbit.solvers.clipping import START, WIDEST, LearnedClipping, clipped_grid, search_clipping
from lowbit.solvers.rounding import GridShape, extremes, fake_quantize, grid_from_range, minmax_grid

both_kinds = pytest.mark.parametrize("symmetric", [False, True])


def weight(rows: int = 8, columns: int = 40, outliers: bool = False) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=draw)
    if outliers:
        matrix[:, ::17] *= 6
    return matrix


def measure(
    matrix: Tensor, importance: Tensor, low: Tensor, high: Tensor, size: int | None, symmetric: bool
) -> Tensor:
    """The weighted squared error of every group, (out, groups)."""
    least, most = extremes(matrix, size)
    grid = grid_from_range(low * least, high * most, 3, size, symmetric)
    wrong = (fake_quantize(matrix, grid) - matrix).square() * importance
    step = size or matrix.shape[1]
    return torch.stack([wrong[:, i : i + step].sum(1) for i in range(0, matrix.shape[1], step)], 1)


@both_kinds
@pytest.mark.parametrize("group_size", [None, 16])
def test_logits_without_end_are_rounding_to_nearest(
    group_size: int | None, symmetric: bool
) -> None:
    matrix = weight()
    clipping = LearnedClipping.start(matrix, group_size)
    with torch.no_grad():
        for logit in clipping.parameters():
            logit.fill_(100)
    found, wanted = (
        clipping.grid(matrix, GridShape(3, group_size, symmetric)),
        minmax_grid(matrix, 3, group_size, symmetric),
    )
    assert torch.equal(found.scale, wanted.scale)
    assert found.zero is wanted.zero is None or torch.equal(found.zero, wanted.zero)


@both_kinds
def test_the_start_clips_1_8_percent(symmetric: bool) -> None:
    matrix = weight()
    clipping = LearnedClipping.start(matrix, 16)
    assert START == 4 and (clipping.low == 4).all() and (clipping.high == 4).all()
    assert clipping.low.shape == clipping.high.shape == (8, 3)
    assert clipping.low.data_ptr() != clipping.high.data_ptr()
    ratio = (
        clipping.grid(matrix, GridShape(4, 16, symmetric)).scale
        / minmax_grid(matrix, 4, 16, symmetric).scale
    )
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.98201), rtol=1e-5, atol=0)


def test_each_end_has_its_own_logit() -> None:
    matrix = torch.tensor([[-4.0, 1, 8]])
    clipping = LearnedClipping(torch.tensor([[0.0]]), torch.tensor([[100.0]]))
    grid = clipping.grid(matrix, GridShape(2, None, False))
    assert grid.scale.item() == pytest.approx((8 + 2) / 3)
    assert [name for name, _ in clipping.named_parameters()] == ["low", "high"]


@both_kinds
def test_gradients_reach_both_logits_and_the_weight(symmetric: bool) -> None:
    matrix = weight(outliers=True)
    matrix[::2] *= -1  # symmetric: one row reaches further up, another further down
    matrix.requires_grad_()
    clipping = LearnedClipping.start(matrix, None)
    fake_quantize(
        matrix, clipping.grid(matrix, GridShape(3, None, symmetric))
    ).square().sum().backward()
    for gradient in (clipping.low.grad, clipping.high.grad, matrix.grad):
        assert gradient.isfinite().all() and gradient.any()


def test_ratios_become_logits_with_a_gradient() -> None:
    ratios = torch.tensor([[1.0, 0.9, 0.5, 0.0]])
    clipping = LearnedClipping.from_ratios(ratios, ratios.flip(1))
    torch.testing.assert_close(
        torch.sigmoid(clipping.low), torch.tensor([[WIDEST, 0.9, 0.5, 1 - WIDEST]])
    )
    assert torch.equal(clipping.high, clipping.low.flip(1))


@both_kinds
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("outliers", [False, True])
def test_a_search_is_never_worse_than_the_whole_range(
    group_size: int | None, symmetric: bool, outliers: bool
) -> None:
    matrix = weight(outliers=outliers)
    importance = torch.rand(40, generator=torch.Generator().manual_seed(1))
    low, high = search_clipping(matrix, importance, GridShape(3, group_size, symmetric))
    assert low.min() >= 0.5 - 1e-6 and low.max() <= 1 and low.shape == high.shape
    found = measure(matrix, importance, low, high, group_size, symmetric)
    one = torch.ones_like(low)
    whole = measure(matrix, importance, one, one, group_size, symmetric)
    assert found.shape == low.shape and bool((found <= whole).all())
    assert float(found.sum()) < 0.97 * float(whole.sum())
    rounded = fake_quantize(
        matrix, clipped_grid(matrix, importance, GridShape(3, group_size, symmetric))
    )
    torch.testing.assert_close((rounded - matrix).square() @ importance, found.sum(1))
    for ratio in torch.arange(0.5, 1.01, 0.05):  # nor than any other that both ends share
        together = measure(matrix, importance, one * ratio, one * ratio, group_size, symmetric)
        assert bool((found <= together * (1 + 1e-4)).all())


def test_channels_count_by_their_importance() -> None:
    """An outlier that no input ever meets is clipped away; one that matters is kept."""
    matrix = weight(4, 32)
    matrix[:, 3] = 6
    deaf, loud = torch.ones(32), torch.ones(32)
    deaf[3], loud[3] = 0, 1e4
    assert (search_clipping(matrix, deaf, GridShape(3, None, False))[1] <= 0.6).all()
    assert (search_clipping(matrix, loud, GridShape(3, None, False))[1] > 0.9).all()


def test_clips_are_searched_for_the_rounding_that_is_asked_for() -> None:
    """A rounding that loses nothing leaves the whole range; the default is that of the grid."""
    weight, importance = torch.randn(4, 32), torch.ones(32)
    low, high = search_clipping(
        weight, importance, GridShape(2, 16, False), squared_error=lambda w, grid: w * 0
    )
    assert (low == 1).all() and (high == 1).all()
    low, high = search_clipping(weight, importance, GridShape(2, 16, False))
    assert not (low == 1).all() and not (high == 1).all()


@pytest.mark.parametrize("group_size", [None, 16, 13])
def test_a_search_by_tiles_finds_the_same(
    group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    matrix, importance = torch.randn(9, 48, generator=draw), torch.rand(48, generator=draw)
    shape = GridShape(2, group_size, False)
    whole = search_clipping(matrix, importance, shape)
    monkeypatch.setattr("lowbit.solvers.clipping.TILE", 100)
    parts = search_clipping(matrix, importance, shape)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
