import pytest
import torch
from torch import Tensor

from lowbit.formats import tiles
from lowbit.formats.tiles import by_rows, product_dtype

CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WEIGHTS_ON_CPU", 20)


def product(weight: Tensor, x: Tensor, seen: list[int]) -> Tensor:
    """x @ weight.T; notes the rows of each tile."""

    def of(part: Tensor, rows: Tensor, numbers: Tensor) -> Tensor:
        seen.append(len(rows))
        assert part.shape == rows.shape and torch.equal(rows, weight[numbers])
        return x @ part.copy_(rows).T

    shape = (weight.shape[0], weight.shape[1])
    return by_rows(x, shape, of, (weight, torch.arange(len(weight))))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 4), (5, 20), (3, 50), (10, 4)])
def test_every_row_once(small_tiles: None, rows: int, columns: int) -> None:
    weight, x = torch.randn(rows, columns), torch.randn(3, columns)
    seen: list[int] = []
    with torch.no_grad():
        found = product(weight, x, seen)
    torch.testing.assert_close(found, x @ weight.T)
    assert sum(seen) == rows and max(seen) == min(rows, max(1, 20 // columns))
    assert not found.is_inference()


def test_gradients_of_every_tile(small_tiles: None) -> None:
    """Tiles have memory of their own then, and nothing that is saved for them is overwritten."""
    weight, x = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    target, seen = torch.randn(3, 9), []
    found = torch.autograd.grad((product(weight, x, seen) * target).sum(), [weight, x])
    wanted = torch.autograd.grad(((x @ weight.T) * target).sum(), [weight, x])
    assert len(seen) == 2
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [1, 15, 16, 4096])
@pytest.mark.parametrize("columns", [2048, 5632, 11008, 100, 10**7])
def test_tiles_of_wide_weights_are_small(columns: int, tokens: int) -> None:
    rows = tiles._rows_at_once(columns, tokens, CPU)
    assert rows == 1 or 4 * rows * columns <= (1 if tokens < 16 else 4) << 20  # bytes
    assert rows <= 16 or rows % 16 == 0


def test_half_precision_is_multiplied_in_float32_on_a_cpu() -> None:
    found = [product_dtype(torch.empty(0, dtype=dtype)) for dtype in (torch.half, torch.double)]
    assert found == [torch.float32, torch.float64]
    assert product_dtype(torch.empty(0, dtype=torch.half, device="meta")) == torch.float16
